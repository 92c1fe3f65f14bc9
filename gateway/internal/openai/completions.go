package openai

import (
	"context"
	"encoding/json"
	"net/http"

	pb "understudy.dev/gen/understudy/v1"
)

const (
	mostPrompts = 128
	// OpenAI's default for this API, which its callers count on: without one, a model would fill its context.
	completionTokens = 16
)

// completionRequest is the body of POST /v1/completions.
type completionRequest struct {
	Model    string          `json:"model"`
	Prompt   json.RawMessage `json:"prompt"`
	Suffix   string          `json:"suffix"`
	Echo     bool            `json:"echo"`
	BestOf   *int32          `json:"best_of"`
	Logprobs *int32          `json:"logprobs"`
	samplingFields
	extension
}

func (s *server) completions(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	var body completionRequest
	if err := decode(r, &body); err != nil {
		return err
	}
	if body.Suffix != "" {
		return invalid("suffix", "suffix is set; no model here fills in the middle. Put all of the text into prompt.")
	}
	to, err := s.targets.find(ctx, body.Model)
	if err != nil {
		return err
	}
	prompts, err := body.prompts()
	if err != nil {
		return err
	}
	job := job{
		form:     textForm(body.Model, s.now()),
		stream:   body.Stream,
		usage:    body.StreamOptions.IncludeUsage,
		logprobs: body.Logprobs != nil,
		names:    fieldNames,
	}
	for _, prompt := range prompts {
		request, err := body.request(to, prompt)
		if err != nil {
			return err
		}
		wanted := max(request.GetSampling().GetN(), 1)
		job.perSource = perSource(to, request)
		job.answers += wanted
		if to.routed() && job.answers > mostPrompts {
			return invalid("n", "n is %d for each of %d prompts; expected at most %d answers of a route in all.", wanted, len(prompts), mostPrompts)
		}
		if to.generates() {
			job.sources = append(job.sources, s.sources(to, request)...)
		} else if text := prompt.GetPrompt(); text == "" || body.Logprobs != nil || wanted > 1 {
			return invalid("model", "%q is a skill of the task %s; expected one text as prompt, without logprobs and n.", to.skill, to.task)
		} else {
			run, err := runRequest(to, []*pb.RunInput{{Input: &pb.RunInput_Text{Text: text}}}, body.extension)
			if err != nil {
				return err
			}
			job.sources = append(job.sources, s.run(run))
		}
		for len(job.echo) < len(job.sources) && body.Echo {
			job.echo = append(job.echo, prompt.GetPrompt())
		}
	}
	return s.answer(ctx, w, job)
}

// request asks for the continuation of one prompt; `prompt` carries it alone.
func (c *completionRequest) request(to target, prompt *pb.GenerateRequest) (*pb.GenerateRequest, error) {
	sampling, err := c.sampling()
	if err != nil {
		return nil, err
	}
	if c.BestOf != nil && *c.BestOf != max(sampling.GetN(), 1) {
		sampling.BestOf = *c.BestOf
		if c.Stream {
			return nil, invalid("best_of", "best_of is set in a stream; expected stream: false, which waits for all answers before it chooses.")
		}
		if sampling.BestOf < max(sampling.GetN(), 1) {
			return nil, invalid("best_of", "best_of is %d, below n; expected n or more.", sampling.BestOf)
		}
	}
	if c.MaxTokens == nil && to.skill == "" {
		sampling.MaxTokens = completionTokens
	}
	found := &pb.GenerateRequest{Input: prompt.GetInput(), Sampling: sampling}
	if c.Logprobs != nil {
		if c.Echo {
			return nil, invalid("echo", "echo and logprobs are both set; a prompt's tokens have no log-probabilities here. Leave one out.")
		}
		if *c.Logprobs < 0 || *c.Logprobs > 20 {
			return nil, invalid("logprobs", "logprobs is %d; expected 0 to 20.", *c.Logprobs)
		}
		found.Logprobs, found.TopLogprobs = true, *c.Logprobs
	}
	return found, c.bound(to, found)
}

// prompts reads a string, an array of strings, an array of token ids, or an array of such arrays.
func (c *completionRequest) prompts() ([]*pb.GenerateRequest, error) {
	if absent(c.Prompt) {
		return nil, invalid("prompt", "prompt is missing; expected a string, an array of strings, or token ids.")
	}
	text := func(one string) *pb.GenerateRequest {
		return &pb.GenerateRequest{Input: &pb.GenerateRequest_Prompt{Prompt: one}}
	}
	if texts, err := textOrList(c.Prompt, "prompt"); err == nil {
		if len(texts) == 0 || len(texts) > mostPrompts {
			return nil, invalid("prompt", "prompt holds %d texts; expected 1 to %d.", len(texts), mostPrompts)
		}
		found := make([]*pb.GenerateRequest, len(texts))
		for index, one := range texts {
			found[index] = text(one)
		}
		return found, nil
	}
	var lists [][]int32
	var list []int32
	if json.Unmarshal(c.Prompt, &list) == nil {
		lists = [][]int32{list}
	} else if json.Unmarshal(c.Prompt, &lists) != nil || len(lists) > mostPrompts {
		return nil, invalid("prompt", "prompt is none; expected a string, an array of at most %d strings, or token ids.", mostPrompts)
	}
	if c.Echo {
		return nil, invalid("echo", "echo is set and prompt holds token ids; expected text, which can be repeated.")
	}
	found := make([]*pb.GenerateRequest, len(lists))
	for index, ids := range lists {
		found[index] = &pb.GenerateRequest{Input: &pb.GenerateRequest_TokenIds{TokenIds: &pb.TokenIds{Ids: ids}}}
	}
	return found, nil
}
