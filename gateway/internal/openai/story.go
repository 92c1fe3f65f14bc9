package openai

import (
	"net/http"
	"strconv"

	pb "understudy.dev/gen/understudy/v1"
)

// story is how an answer came about: the field "understudy" of answers and of a stream's last chunk.
type story struct {
	Route         string   `json:"route"`
	Local         bool     `json:"local"`
	CostUSD       float64  `json:"cost_usd"`
	Quality       *float32 `json:"quality"`
	InteractionID *string  `json:"interaction_id"`
	Interactions  []string `json:"interaction_ids,omitempty"` // where there are several, in the order in which they ended
	Skill         string   `json:"skill,omitempty"`
	Task          string   `json:"task,omitempty"`
	RolloutStage  string   `json:"rollout_stage,omitempty"`
	Preference    string   `json:"preference,omitempty"`
	Hops          []hop    `json:"hops,omitempty"`
	extras
}

type hop struct {
	Candidate string   `json:"candidate"`
	Outcome   string   `json:"outcome"`
	Reason    string   `json:"reason,omitempty"`
	Quality   *float32 `json:"quality,omitempty"`
	CostUSD   float64  `json:"cost_usd"`
}

// extras are what only skills that do not generate have.
type extras struct {
	Labels   []labelScore `json:"labels,omitempty"`
	Findings []string     `json:"findings,omitempty"`
}

type labelScore struct {
	Name  string  `json:"name"`
	Score float32 `json:"score"`
}

func extrasOf(result *pb.RunResult) extras {
	found := extras{Findings: result.GetFindings()}
	for _, label := range result.GetLabels() {
		found.Labels = append(found.Labels, labelScore{label.GetName(), label.GetScore()})
	}
	return found
}

// told is what both kinds of generation's last messages, and Run's results, say of an answer.
type told interface {
	GetDecision() *pb.Decision
	GetCost() *pb.Cost
	GetInteractionId() string
}

func usd(micro int64) float64 { return float64(micro) / 1e6 }

// storyOf tells of a routed answer.
func storyOf(answer told, quality *float32, more extras) *story {
	decision := answer.GetDecision()
	found := &story{
		Route:        decision.GetCandidate(),
		Local:        decision.GetLocal(),
		CostUSD:      usd(answer.GetCost().GetMicroUsd()),
		Quality:      quality,
		Skill:        decision.GetSkill(),
		Task:         decision.GetTask(),
		RolloutStage: decision.GetRolloutStage(),
		Preference:   decision.GetPreference(),
		extras:       more,
	}
	if id := answer.GetInteractionId(); id != "" {
		found.InteractionID = &id
	}
	for _, one := range decision.GetHops() {
		found.Hops = append(found.Hops, hop{
			one.GetCandidate(), one.GetOutcome(), one.GetReason(), one.Quality, usd(one.GetCost().GetMicroUsd()),
		})
	}
	return found
}

// localStory tells of an answer by one of this server's models that was named.
func localStory(model *pb.ModelUsed, adapter string) *story {
	route := local + model.GetName()
	if adapter != "" {
		route += "/" + adapter
	} else if version := model.GetVersion(); version != "" {
		route += "@" + version
	}
	return &story{Route: route, Local: true}
}

// add puts the story of another part of the same request in: costs are summed, the rest is the first part's.
func (s *story) add(other *story) *story {
	if s == nil {
		return other
	}
	s.CostUSD += other.CostUSD
	if other.InteractionID != nil {
		if s.Interactions == nil && s.InteractionID != nil {
			s.Interactions = []string{*s.InteractionID}
		}
		s.Interactions = append(s.Interactions, *other.InteractionID)
	}
	s.Local = s.Local && other.Local
	return s
}

func (s *story) headers(header http.Header) {
	header.Set("X-Understudy-Route", s.Route)
	header.Set("X-Understudy-Local", strconv.FormatBool(s.Local))
	header.Set("X-Understudy-Cost-Usd", strconv.FormatFloat(s.CostUSD, 'f', -1, 64))
	if s.Quality != nil {
		header.Set("X-Understudy-Quality", strconv.FormatFloat(float64(*s.Quality), 'f', -1, 32))
	}
	if s.InteractionID != nil {
		header.Set("X-Understudy-Interaction-Id", *s.InteractionID)
	}
}
