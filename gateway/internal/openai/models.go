package openai

import (
	"context"
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	pb "understudy.dev/gen/understudy/v1"
)

// modelList answers two callers on one path: OpenAI's clients read object and data, those of the REST API models and nextPageToken.
type modelList struct {
	Object        string            `json:"object"`
	Data          []modelEntry      `json:"data"`
	Models        []json.RawMessage `json:"models"`
	NextPageToken string            `json:"nextPageToken"`
}

type modelEntry struct {
	ID         string    `json:"id"`
	Object     string    `json:"object"`
	Created    int64     `json:"created"`
	OwnedBy    string    `json:"owned_by"`
	Understudy modelKind `json:"understudy"`
}

// modelKind tells what an id stands for: "skill", "model", "adapter" or "provider", and which task it does.
type modelKind struct {
	Kind         string `json:"kind"`
	Task         string `json:"task,omitempty"`
	Version      string `json:"version,omitempty"`
	RolloutStage string `json:"rollout_stage,omitempty"`
}

const mostPages = 50

var (
	// What only ListModels of the REST API takes: such a request is answered by it alone.
	pageFields = []string{"page_size", "pageSize", "page_token", "pageToken", "task", "loaded_only", "loadedOnly"}
	// Paths below /v1/models/ that are the REST API's.
	restPath = regexp.MustCompile(`^[^/]+/(versions/[^/]+|adapters(/.*)?)$`)
	// Tasks of local models that one of this API's routes serves.
	servedTasks = []string{generation, featureExtraction, textRanking}
	// Tasks of skills that work on pairs, which no route of this API can carry.
	pairTasks = []string{"question-answering", "table-question-answering", "sentence-similarity"}
	restJSON  = protojson.MarshalOptions{EmitUnpopulated: true}
)

func (s *server) listModels(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	if s.deps.REST != nil && slices.ContainsFunc(pageFields, query.Has) {
		s.deps.REST.ServeHTTP(w, r)
		return nil
	}
	local, err := s.localModels(ctx)
	if err != nil {
		return err
	}
	entries, err := s.entries(ctx, local)
	if err != nil {
		return err
	}
	list := modelList{Object: "list", Data: entries, Models: make([]json.RawMessage, 0, len(local))}
	for _, model := range local {
		data, err := restJSON.Marshal(model)
		if err != nil {
			return err
		}
		list.Models = append(list.Models, data)
	}
	return writeJSON(w, list)
}

func (s *server) getModel(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	if s.deps.REST != nil && restPath.MatchString(id) {
		s.deps.REST.ServeHTTP(w, r)
		return nil
	}
	models, err := s.localModels(ctx)
	if err != nil {
		return err
	}
	entries, err := s.entries(ctx, models)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.ID == id || (local+entry.ID == id && (entry.Understudy.Kind == "model" || entry.Understudy.Kind == "adapter")) {
			entry.ID = id
			return writeJSON(w, entry)
		}
	}
	return notFound(id)
}

func (s *server) localModels(ctx context.Context) ([]*pb.Model, error) {
	var found []*pb.Model
	request := &pb.ListModelsRequest{PageSize: 1000}
	for range mostPages {
		page, err := s.models.ListModels(ctx, request)
		if err != nil {
			return nil, err
		}
		found = append(found, page.GetModels()...)
		if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
			break
		}
	}
	return found, nil
}

// entries are the ids that work in this API: configured skills, loaded models with their adapters, and the providers' models that skills name.
func (s *server) entries(ctx context.Context, models []*pb.Model) ([]modelEntry, error) {
	found := []modelEntry{}
	var providers []modelEntry
	skills, err := s.allSkills(ctx)
	if err != nil {
		return nil, err
	}
	for _, skill := range skills {
		for _, id := range append([]string{skill.GetTeacher()}, skill.GetFallbacks()...) {
			known := func(entry modelEntry) bool { return entry.ID == id }
			if id != "" && !slices.ContainsFunc(providers, known) {
				owner, _, _ := strings.Cut(id, "/")
				providers = append(providers, modelEntry{id, "model", 0, owner, modelKind{Kind: "provider"}})
			}
		}
		if !skill.GetBuiltIn() && !slices.Contains(pairTasks, skill.GetTask()) {
			kind := modelKind{Kind: "skill", Task: skill.GetTask(), RolloutStage: skill.GetRolloutStage()}
			found = append(found, modelEntry{strings.TrimPrefix(skill.GetName(), "skills/"), "model", 0, "understudy", kind})
		}
	}
	for _, model := range models {
		if model.GetState() != pb.ModelState_MODEL_STATE_READY || !model.GetCurrent() || !slices.Contains(servedTasks, model.GetTask()) {
			continue
		}
		kind := modelKind{Kind: "model", Task: model.GetTask(), Version: model.GetVersion()}
		entry := modelEntry{model.GetModelId(), "model", model.GetLoadTime().GetSeconds(), "understudy", kind}
		found = append(found, entry)
		adapters, err := s.adapters(ctx, entry)
		if err != nil {
			return nil, err
		}
		found = append(found, adapters...)
	}
	return append(found, providers...), nil
}

func (s *server) allSkills(ctx context.Context) ([]*pb.Skill, error) {
	var found []*pb.Skill
	request := &pb.ListSkillsRequest{PageSize: 1000}
	for range mostPages {
		page, err := s.targets.skills.ListSkills(ctx, request)
		if err != nil {
			return nil, err
		}
		found = append(found, page.GetSkills()...)
		if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
			break
		}
	}
	return found, nil
}

// adapters of a model, the current version of each.
func (s *server) adapters(ctx context.Context, base modelEntry) ([]modelEntry, error) {
	page, err := s.models.ListAdapters(ctx, &pb.ListAdaptersRequest{Parent: "models/" + base.ID, PageSize: 1000, LoadedOnly: true})
	switch status.Code(err) {
	case codes.OK:
	case codes.NotFound, codes.FailedPrecondition, codes.Unimplemented, codes.InvalidArgument: // it takes none
		return nil, nil
	default:
		return nil, err
	}
	var found []modelEntry
	for _, adapter := range page.GetAdapters() {
		if adapter.GetCurrent() {
			kind := modelKind{Kind: "adapter", Task: base.Understudy.Task, Version: adapter.GetVersion()}
			found = append(found, modelEntry{base.ID + ":" + adapter.GetAdapterId(), "model", base.Created, "understudy", kind})
		}
	}
	return found, nil
}
