package openai

import (
	"context"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "understudy.dev/gen/understudy/v1"
)

// target is who a model id means: a skill, a model of this server (with an adapter), or a provider's model.
type target struct {
	skill    string
	task     string // of the skill
	model    string
	version  string
	adapter  string
	provider bool
}

func (t target) selector() *pb.ModelSelector {
	return &pb.ModelSelector{Name: t.model, Version: t.version}
}

// routed: a route of skills and providers answers, one answer a call.
func (t target) routed() bool {
	return t.skill != "" || t.provider
}

// generates: InferenceService.Generate answers it; what does not is a skill of another task, and Run's.
func (t target) generates() bool {
	return t.skill == "" || t.task == generation
}

const (
	generation   = "text-generation"
	local        = "local:"
	keptSkills   = 1024
	skillKept    = 30 * time.Second
	notSkillKept = 5 * time.Second
)

// targets finds out what ids mean. Whether a bare name is a skill is asked of the server once in a while and kept: it tells only which RPC
// to call, and the server checks that call's rights itself.
type targets struct {
	skills pb.SkillServiceClient
	now    func() time.Time

	mutex sync.Mutex
	known map[string]knownSkill
}

type knownSkill struct {
	task  string // empty: the name is no skill's
	until time.Time
}

func newTargets(skills pb.SkillServiceClient) *targets {
	return &targets{skills: skills, now: time.Now, known: map[string]knownSkill{}}
}

// find reads an id: "local:<model>", "<provider>/<model>", "<base>:<adapter>", a skill's name, or a local model's. Models and adapters may
// carry a version, "name@3".
func (t *targets) find(ctx context.Context, id string) (target, error) {
	if id == "" {
		return target{}, invalid("model", "model is missing; expected a skill, a model of this server, or \"<provider>/<model>\".")
	}
	if name, ok := strings.CutPrefix(id, local); ok {
		return localTarget(name), nil
	}
	if provider, model, ok := strings.Cut(id, "/"); ok {
		if provider == "" || model == "" {
			return target{}, notFound(id)
		}
		return target{model: id, provider: true}, nil
	}
	if strings.ContainsAny(id, ":@") {
		return localTarget(id), nil
	}
	task, err := t.taskOf(ctx, id)
	if err != nil {
		return target{}, err
	}
	if task != "" {
		return target{skill: id, task: task}, nil
	}
	return localTarget(id), nil
}

func localTarget(name string) target {
	base, adapter, _ := strings.Cut(name, ":")
	if head, rest, ok := strings.Cut(base, "/"); ok && adapter == "" { // as decisions write it
		base, adapter = head, rest
	}
	model, version, _ := strings.Cut(base, "@")
	return target{model: model, version: version, adapter: adapter}
}

// taskOf gives the task of a skill; empty: there is no such skill.
func (t *targets) taskOf(ctx context.Context, name string) (string, error) {
	now := t.now()
	t.mutex.Lock()
	known, ok := t.known[name]
	t.mutex.Unlock()
	if ok && now.Before(known.until) {
		return known.task, nil
	}
	found, err := t.skills.GetSkill(ctx, &pb.GetSkillRequest{Name: "skills/" + name})
	switch status.Code(err) {
	case codes.OK:
		known = knownSkill{found.GetSkill().GetTask(), now.Add(skillKept)}
	case codes.NotFound, codes.InvalidArgument: // the second: no skill could have such a name
		known = knownSkill{"", now.Add(notSkillKept)}
	default:
		return "", err
	}
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if len(t.known) >= keptSkills {
		clear(t.known)
	}
	t.known[name] = known
	return known.task, nil
}

func notFound(id string) *apiError {
	err := invalid("model", "there is no model %q; GET /v1/models lists those that there are.", clip(id, 128))
	err.status, err.code = 404, "model_not_found"
	return err
}

func clip(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "..."
}
