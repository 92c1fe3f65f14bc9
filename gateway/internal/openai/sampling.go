package openai

import (
	"encoding/json"
	"math"
	"strconv"

	pb "understudy.dev/gen/understudy/v1"
)

// Of Sampling.n, by the proto.
const mostAnswers = 16

// samplingFields are what chat completions and completions have in common. Those after `logit_bias` are not OpenAI's; their names are vLLM's.
type samplingFields struct {
	Temperature       *float32           `json:"temperature"`
	TopP              *float32           `json:"top_p"`
	N                 *int32             `json:"n"`
	Seed              *int64             `json:"seed"`
	Stop              json.RawMessage    `json:"stop"`
	MaxTokens         *int32             `json:"max_tokens"`
	FrequencyPenalty  float32            `json:"frequency_penalty"`
	PresencePenalty   float32            `json:"presence_penalty"`
	LogitBias         map[string]float32 `json:"logit_bias"`
	TopK              int32              `json:"top_k"`
	MinP              float32            `json:"min_p"`
	RepetitionPenalty *float32           `json:"repetition_penalty"`
	StopTokenIDs      []int32            `json:"stop_token_ids"`
	IgnoreEOS         bool               `json:"ignore_eos"`
}

// extension is what callers may say beyond OpenAI's API, in "understudy".
type extension struct {
	User       string `json:"user"`
	Stream     bool   `json:"stream"`
	Understudy struct {
		Preference string            `json:"preference"`
		MaxCostUSD *float64          `json:"max_cost_usd"`
		Parameters map[string]string `json:"parameters"`
	} `json:"understudy"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
}

func (f samplingFields) sampling() (*pb.Sampling, error) {
	stop, err := textOrList(f.Stop, "stop")
	if err != nil {
		return nil, err
	}
	found := &pb.Sampling{
		Temperature:       f.Temperature,
		TopP:              f.TopP,
		Seed:              f.Seed,
		Stop:              stop,
		FrequencyPenalty:  f.FrequencyPenalty,
		PresencePenalty:   f.PresencePenalty,
		TopK:              max(f.TopK, 0), // vLLM's -1 is our 0
		MinP:              f.MinP,
		RepetitionPenalty: f.RepetitionPenalty,
		StopTokenIds:      f.StopTokenIDs,
		IgnoreEos:         f.IgnoreEOS,
	}
	if f.MaxTokens != nil {
		if *f.MaxTokens < 1 {
			return nil, invalid("max_tokens", "max_tokens is %d; expected 1 or more.", *f.MaxTokens)
		}
		found.MaxTokens = *f.MaxTokens
	}
	if f.N != nil {
		if *f.N < 1 || *f.N > mostAnswers { // bounded here too: there is a place for each answer
			return nil, invalid("n", "n is %d; expected 1 to %d.", *f.N, mostAnswers)
		}
		if *f.N > 1 { // unset means 1, and skills take none
			found.N = *f.N
		}
	}
	for key, value := range f.LogitBias {
		id, err := strconv.ParseInt(key, 10, 32)
		if err != nil {
			return nil, invalid("logit_bias", "logit_bias has the key %q; expected the ids of tokens.", clip(key, 32))
		}
		if found.LogitBias == nil {
			found.LogitBias = make(map[int32]float32, len(f.LogitBias))
		}
		found.LogitBias[int32(id)] = value
	}
	return found, nil
}

// bound puts a skill, with what limits its route, or a model into a request.
func (e extension) bound(to target, into *pb.GenerateRequest) error {
	preference, cost, err := e.limits()
	if err != nil {
		return err
	}
	if to.skill == "" {
		if preference != 0 {
			return invalid("understudy.preference", "understudy.preference is set for a model, which has no route; expected a skill as model.")
		}
		into.Model, into.Adapter, into.MaxCost = to.selector(), to.adapter, cost
		if to.provider {
			into.User = e.User
		} else if cost != nil {
			into.MaxCost = nil // this server's own models cost nothing
		}
		return nil
	}
	into.Skill, into.Preference, into.MaxCost, into.User = to.skill, preference, cost, e.User
	return nil
}

func (e extension) limits() (pb.RoutePreference, *pb.Cost, error) {
	var preference int32
	if name := e.Understudy.Preference; name != "" {
		known, ok := preferences[name]
		if !ok {
			return 0, nil, invalid("understudy.preference", "understudy.preference is %q; expected one of local_first, local_only, "+
				"provider_only, cheapest, best, fastest, free_first.", clip(name, 32))
		}
		preference = int32(known)
	}
	if e.Understudy.MaxCostUSD == nil {
		return pb.RoutePreference(preference), nil, nil
	}
	usd := *e.Understudy.MaxCostUSD
	if usd < 0 || usd > 1e6 {
		return 0, nil, invalid("understudy.max_cost_usd", "understudy.max_cost_usd is %g; expected 0 to 1000000.", usd)
	}
	return pb.RoutePreference(preference), &pb.Cost{MicroUsd: int64(math.Round(usd * 1e6))}, nil
}

var preferences = map[string]pb.RoutePreference{
	"local_first":   pb.RoutePreference_ROUTE_PREFERENCE_LOCAL_FIRST,
	"local_only":    pb.RoutePreference_ROUTE_PREFERENCE_LOCAL_ONLY,
	"provider_only": pb.RoutePreference_ROUTE_PREFERENCE_PROVIDER_ONLY,
	"cheapest":      pb.RoutePreference_ROUTE_PREFERENCE_CHEAPEST,
	"best":          pb.RoutePreference_ROUTE_PREFERENCE_BEST,
	"fastest":       pb.RoutePreference_ROUTE_PREFERENCE_FASTEST,
	"free_first":    pb.RoutePreference_ROUTE_PREFERENCE_FREE_FIRST,
}

// Names of the server's fields in this API.
var fieldNames = map[string]string{
	"sampling.":            "",
	"chat.messages":        "messages",
	"chat":                 "messages",
	"model.name":           "model",
	"skill":                "model",
	"token_ids.ids":        "prompt",
	"adapter":              "model",
	"max_cost":             "understudy.max_cost_usd",
	"max_cost.micro_usd":   "understudy.max_cost_usd",
	"preference":           "understudy.preference",
	"parameters":           "understudy.parameters",
	"inputs[0].text":       "messages",
	"inputs[0].chat":       "messages",
	"inputs[0].pair":       "messages",
	"inputs[0].parameters": "understudy.parameters",
}
