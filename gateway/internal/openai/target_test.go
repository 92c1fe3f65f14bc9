package openai

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "understudy.dev/gen/understudy/v1"
)

// oneSkill knows the skill "intent", and counts how often it is asked.
type oneSkill struct {
	pb.SkillServiceClient
	asked int
	fail  error
}

func (s *oneSkill) GetSkill(_ context.Context, request *pb.GetSkillRequest, _ ...grpc.CallOption) (*pb.GetSkillResponse, error) {
	s.asked++
	if s.fail != nil {
		return nil, s.fail
	}
	if request.GetName() != "skills/intent" {
		return nil, status.Error(codes.NotFound, "there is none")
	}
	return &pb.GetSkillResponse{Skill: &pb.Skill{Name: "skills/intent", Task: "text-classification"}}, nil
}

func TestWhatAnIDMeans(t *testing.T) {
	found := newTargets(&oneSkill{})
	for id, want := range map[string]target{
		"intent":                {skill: "intent", task: "text-classification"},
		"local:intent":          {model: "intent"},
		"llama":                 {model: "llama"},
		"llama@3":               {model: "llama", version: "3"},
		"llama:french":          {model: "llama", adapter: "french"},
		"llama@3:french@2":      {model: "llama", version: "3", adapter: "french@2"},
		"local:llama/french@2":  {model: "llama", adapter: "french@2"},
		"openai/gpt-4o":         {model: "openai/gpt-4o", provider: true},
		"hf/meta/llama:fastest": {model: "hf/meta/llama:fastest", provider: true},
	} {
		if got, err := found.find(t.Context(), id); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", id, got, err, want)
		}
	}
	for id, status := range map[string]int{"": 400, "/": 404, "openai/": 404, "/gpt": 404} {
		if _, err := found.find(t.Context(), id); err == nil || errorOf(err).status != status {
			t.Errorf("%q: %v; want %d", id, err, status)
		}
	}
}

func TestSkillsAreAskedForOnceInAWhile(t *testing.T) {
	skills := &oneSkill{}
	found := newTargets(skills)
	now := time.Now()
	found.now = func() time.Time { return now }
	for range 3 {
		_, _ = found.find(t.Context(), "intent")
		_, _ = found.find(t.Context(), "llama")
	}
	if skills.asked != 2 {
		t.Errorf("asked %d times", skills.asked)
	}
	now = now.Add(notSkillKept)
	_, _ = found.find(t.Context(), "intent")
	_, _ = found.find(t.Context(), "llama")
	if skills.asked != 3 {
		t.Errorf("asked %d times: only what was no skill is asked for again so soon", skills.asked)
	}
}

func TestARefusalIsNotKept(t *testing.T) {
	skills := &oneSkill{fail: status.Error(codes.Unauthenticated, "no key")}
	found := newTargets(skills)
	if _, err := found.find(t.Context(), "intent"); status.Code(err) != codes.Unauthenticated {
		t.Fatal(err)
	}
	skills.fail = nil
	if got, err := found.find(t.Context(), "intent"); err != nil || got.skill != "intent" {
		t.Errorf("%+v, %v", got, err)
	}
}
