package paths

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"

	pb "understudy.dev/gen/understudy/v1"
)

// Names by which a body may say which model is meant.
var modelNames = []string{"model", "model_id", "model_name", "name"}

// resource turns "name", "name@version", "models/name" or "models/name/versions/version" into a resource name.
func resource(model string) string {
	model = strings.TrimPrefix(model, "models/")
	if name, version, ok := strings.Cut(model, "@"); ok {
		return "models/" + name + "/versions/" + version
	}
	return "models/" + model
}

// split gives the name and the version of a resource name; the version may be empty.
func split(resource string) (name, version string) {
	name, version, _ = strings.Cut(strings.TrimPrefix(resource, "models/"), "/versions/")
	return name, version
}

// allModels reads every page.
func (a *api) allModels(ctx context.Context) ([]*pb.Model, error) {
	var models []*pb.Model
	request := &pb.ListModelsRequest{PageSize: 1000}
	for {
		page, err := a.models.ListModels(ctx, request)
		if err != nil {
			return nil, err
		}
		models = append(models, page.Models...)
		if request.PageToken = page.NextPageToken; request.PageToken == "" {
			return models, nil
		}
	}
}

// versionsOf gives the versions that a path's {id} means: one, or all of the model. The server says what is wrong where there is none.
func (a *api) versionsOf(ctx context.Context, id string) ([]*pb.Model, error) {
	name, version := split(resource(id))
	if version != "" {
		response, err := a.models.GetModel(ctx, &pb.GetModelRequest{Name: resource(id)})
		if err != nil {
			return nil, err
		}
		return []*pb.Model{response.GetModel()}, nil
	}
	models, err := a.allModels(ctx)
	if err != nil {
		return nil, err
	}
	models = slices.DeleteFunc(models, func(model *pb.Model) bool { return model.ModelId != name })
	if len(models) == 0 {
		_, err := a.models.GetModel(ctx, &pb.GetModelRequest{Name: resource(id) + "/versions/current"})
		return nil, cmp.Or(err, invalid("id", "there is no model of this name any more; list them with GET /api/models"))
	}
	return models, nil
}

// listModels lists the versions in the repository.
func (a *api) listModels(ctx context.Context, _ *http.Request) (any, error) {
	models, err := a.allModels(ctx)
	if err != nil {
		return nil, err
	}
	answer, err := flat(&pb.ListModelsResponse{Models: models})
	if err != nil {
		return nil, err
	}
	delete(answer, "nextPageToken") // there is one page
	answer["total"] = rawOf(len(models))
	return answer, nil
}

// getModel shows a model with its versions.
func (a *api) getModel(ctx context.Context, r *http.Request) (any, error) {
	versions, err := a.versionsOf(ctx, r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	shown := versions[len(versions)-1]
	for _, version := range versions {
		if version.Current {
			shown = version
		}
	}
	model, err := flat(shown)
	if err != nil {
		return nil, err
	}
	all, err := flat(&pb.ListModelsResponse{Models: versions})
	if err != nil {
		return nil, err
	}
	return object{"id": rawOf(shown.ModelId), "status": rawOf(word(shown.State.String(), "MODEL_STATE_")), "model": rawOf(model), "versions": all["models"]}, nil
}

// deleteModel deletes a version ("name@2"), or all versions of a model. Loaded ones are tried first, so that their refusal comes before
// anything is gone.
func (a *api) deleteModel(ctx context.Context, r *http.Request) (any, error) {
	versions, err := a.versionsOf(ctx, r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(versions, func(one, other *pb.Model) int { return cmp.Compare(asleep(one), asleep(other)) })
	deleted := []string{}
	for _, version := range versions {
		if _, err := a.models.DeleteModel(ctx, &pb.DeleteModelRequest{Name: version.Name}); err != nil {
			return nil, err
		}
		deleted = append(deleted, version.Name)
	}
	return object{"id": rawOf(versions[0].ModelId), "status": rawOf("deleted"), "deleted": rawOf(deleted)}, nil
}

func asleep(model *pb.Model) int {
	if model.State == pb.ModelState_MODEL_STATE_UNLOADED || model.State == pb.ModelState_MODEL_STATE_FAILED {
		return 1
	}
	return 0
}

// deployModel loads the path's model, so that it answers callers who name no version.
func (a *api) deployModel(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	return a.load(ctx, b, r.PathValue("id"))
}

// loadModel loads the model that the body names.
func (a *api) loadModel(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	model, err := b.text(modelNames...)
	if err != nil {
		return nil, err
	}
	if model == "" {
		return nil, invalid("model", "nothing says which model is to be loaded; expected one of %s, for example {\"model\": \"all-minilm-l6-v2\"}", quoted(modelNames, ", "))
	}
	return a.load(ctx, b, model)
}

func (a *api) load(ctx context.Context, b body, model string) (any, error) {
	name, err := b.versioned(model)
	if err != nil {
		return nil, err
	}
	replace, err := b.flag("replace")
	if err != nil {
		return nil, err
	}
	if err := b.done("version", "replace"); err != nil {
		return nil, err
	}
	response, err := a.models.LoadModel(ctx, &pb.LoadModelRequest{Name: name, Replace: replace})
	if err != nil {
		return nil, err
	}
	loaded, err := flat(response)
	if err != nil {
		return nil, err
	}
	loaded["id"] = rawOf(response.GetModel().GetModelId())
	loaded["status"] = rawOf(word(response.GetModel().GetState().String(), "MODEL_STATE_"))
	return loaded, nil
}

// versioned gives the resource name of a model whose version may stand in the name or in the field `version`, a string or a number.
func (b body) versioned(model string) (string, error) {
	name := resource(model)
	raw, _, err := b.take("version")
	if err != nil || raw == nil {
		return name, err
	}
	var version string
	if json.Unmarshal(raw, &version) != nil {
		var number json.Number
		if err := json.Unmarshal(raw, &number); err != nil {
			return "", invalid("version", "`version` is neither a string nor a number; expected for example \"2\"")
		}
		version = number.String()
	}
	base, already := split(name)
	if already != "" && already != version {
		return "", invalid("version", "`version` is %q and the model's name says %q; expected one of them", version, already)
	}
	if version == "" {
		return name, nil
	}
	return "models/" + base + "/versions/" + version, nil
}

// modelStatus shows what is in memory, and its queues.
func (a *api) modelStatus(ctx context.Context, _ *http.Request) (any, error) {
	response, err := a.stats.GetStatus(ctx, &pb.GetStatusRequest{})
	if err != nil {
		return nil, err
	}
	answer, err := flat(response)
	if err != nil {
		return nil, err
	}
	state := "ready"
	if response.Draining {
		state = "draining"
	}
	return object{"status": rawOf(state), "models": answer["models"], "total": rawOf(len(response.Models))}, nil
}
