package openai

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"slices"

	pb "understudy.dev/gen/understudy/v1"
)

const textRanking = "text-ranking"

// rerankRequest is the body of POST /v1/rerank, in the form that Cohere, Jina and vLLM share.
type rerankRequest struct {
	Model           string            `json:"model"`
	Query           string            `json:"query"`
	Documents       []json.RawMessage `json:"documents"`
	TopN            *int32            `json:"top_n"`
	ReturnDocuments bool              `json:"return_documents"`
	Truncate        bool              `json:"truncate"`
	extension
}

// rerankBody answers Cohere's clients (id, results, meta) and Jina's (model, object, results, usage).
type rerankBody struct {
	ID         string         `json:"id"`
	Object     string         `json:"object"`
	Model      string         `json:"model"`
	Results    []ranked       `json:"results"`
	Usage      embeddingUsage `json:"usage"`
	Meta       rerankMeta     `json:"meta"`
	Understudy *story         `json:"understudy"`
}

type ranked struct {
	Index          int32     `json:"index"`
	RelevanceScore float32   `json:"relevance_score"`
	Document       *document `json:"document,omitempty"`
}

type document struct {
	Text string `json:"text"`
}

type rerankMeta struct {
	BilledUnits struct {
		SearchUnits int `json:"search_units"`
	} `json:"billed_units"`
}

func (s *server) rerank(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	var body rerankRequest
	if err := decode(r, &body); err != nil {
		return err
	}
	texts, err := body.texts()
	if err != nil {
		return err
	}
	to, err := s.targets.find(ctx, body.Model)
	if err != nil {
		return err
	}
	answer := rerankBody{ID: newID("rerank-"), Object: "list", Model: body.Model}
	answer.Meta.BilledUnits.SearchUnits = 1
	if to.skill != "" || to.provider {
		err = s.rankByRoute(ctx, to, &body, texts, &answer)
	} else {
		err = s.rankLocally(ctx, to, &body, texts, &answer)
	}
	if err != nil {
		return errorOf(err).renamed(fieldNames)
	}
	if body.ReturnDocuments {
		for index := range answer.Results {
			answer.Results[index].Document = &document{texts[answer.Results[index].Index]}
		}
	}
	answer.Understudy.headers(w.Header())
	return writeJSON(w, answer)
}

// texts are the documents, each a string or an object with a text.
func (b *rerankRequest) texts() ([]string, error) {
	if b.Query == "" {
		return nil, invalid("query", "query is missing; expected a text.")
	}
	if len(b.Documents) == 0 {
		return nil, invalid("documents", "documents is empty; expected one text at least.")
	}
	if b.TopN != nil && *b.TopN < 1 {
		return nil, invalid("top_n", "top_n is %d; expected 1 or more.", *b.TopN)
	}
	found := make([]string, len(b.Documents))
	for index, raw := range b.Documents {
		if json.Unmarshal(raw, &found[index]) == nil && !absent(raw) {
			continue
		}
		var one struct {
			Text *string `json:"text"`
		}
		if json.Unmarshal(raw, &one) != nil || one.Text == nil {
			field := indexed("documents", index)
			return nil, invalid(field, "%s is neither a string nor an object with a text.", field)
		}
		found[index] = *one.Text
	}
	return found, nil
}

func (b *rerankRequest) most() int32 {
	if b.TopN == nil {
		return 0
	}
	return *b.TopN
}

func (s *server) rankLocally(ctx context.Context, to target, body *rerankRequest, texts []string, into *rerankBody) error {
	response, err := s.inference.Rerank(ctx, &pb.RerankRequest{
		Model: to.selector(), Adapter: to.adapter, Query: body.Query, Documents: texts, TopN: body.most(), Truncate: body.Truncate,
	})
	if err != nil {
		return err
	}
	for _, one := range response.GetResults() {
		if one.GetError() != nil {
			return errorOfStatus(one.GetError())
		}
		into.Results = append(into.Results, ranked{Index: one.GetIndex(), RelevanceScore: one.GetScore()})
	}
	used := response.GetUsage().GetInputTokens()
	into.Usage, into.Understudy = embeddingUsage{used, used}, localStory(response.GetModel(), to.adapter)
	return nil
}

// rankByRoute asks a skill, or a provider's model, how well each document fits.
func (s *server) rankByRoute(ctx context.Context, to target, body *rerankRequest, texts []string, into *rerankBody) error {
	if to.provider {
		to.skill, to.task = textRanking, textRanking
	}
	if to.task != textRanking {
		return invalid("model", "the skill %q does %s; expected one of the task %s, or a model.", to.skill, to.task, textRanking)
	}
	inputs := make([]*pb.RunInput, len(texts))
	for index, text := range texts {
		inputs[index] = &pb.RunInput{Input: &pb.RunInput_Pair{Pair: &pb.TextPair{Text: body.Query, TextPair: text}}}
	}
	results, used, err := s.runAll(ctx, to, inputs, body.extension)
	if err != nil {
		return err
	}
	for index, result := range results {
		into.Results = append(into.Results, ranked{Index: int32(index), RelevanceScore: result.GetScore()})
		into.Understudy = into.Understudy.add(storyOf(result, result.Quality, extras{}))
	}
	slices.SortStableFunc(into.Results, func(a, b ranked) int { return cmp.Compare(b.RelevanceScore, a.RelevanceScore) })
	if most := int(body.most()); most > 0 && most < len(into.Results) {
		into.Results = into.Results[:most]
	}
	into.Usage = embeddingUsage{used, used}
	return nil
}
