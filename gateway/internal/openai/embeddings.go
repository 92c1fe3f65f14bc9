package openai

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"math"
	"net/http"

	pb "understudy.dev/gen/understudy/v1"
)

const featureExtraction = "feature-extraction"

// embeddingRequest is the body of POST /v1/embeddings. `truncate` and `input_type` are not OpenAI's.
type embeddingRequest struct {
	Model          string          `json:"model"`
	Input          json.RawMessage `json:"input"`
	EncodingFormat string          `json:"encoding_format"`
	Dimensions     *int32          `json:"dimensions"`
	Truncate       bool            `json:"truncate"`
	InputType      string          `json:"input_type"`
	extension
}

type embeddingBody struct {
	Object     string         `json:"object"`
	Data       []embedding    `json:"data"`
	Model      string         `json:"model"`
	Usage      embeddingUsage `json:"usage"`
	Understudy *story         `json:"understudy"`
}

type embedding struct {
	Object    string `json:"object"`
	Index     int    `json:"index"`
	Embedding any    `json:"embedding"`
}

type embeddingUsage struct {
	PromptTokens int64 `json:"prompt_tokens"`
	TotalTokens  int64 `json:"total_tokens"`
}

var inputTypes = map[string]pb.EmbedInputType{
	"":                pb.EmbedInputType_EMBED_INPUT_TYPE_UNSPECIFIED,
	"query":           pb.EmbedInputType_EMBED_INPUT_TYPE_QUERY,
	"search_query":    pb.EmbedInputType_EMBED_INPUT_TYPE_QUERY,
	"passage":         pb.EmbedInputType_EMBED_INPUT_TYPE_PASSAGE,
	"document":        pb.EmbedInputType_EMBED_INPUT_TYPE_PASSAGE,
	"search_document": pb.EmbedInputType_EMBED_INPUT_TYPE_PASSAGE,
}

var embeddingNames = withName(withName(withName(fieldNames, "texts", "input"), "inputs", "input"), "truncate", "input")

func (s *server) embeddings(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	var body embeddingRequest
	if err := decode(r, &body); err != nil {
		return err
	}
	if body.EncodingFormat != "" && body.EncodingFormat != "float" && body.EncodingFormat != "base64" {
		return invalid("encoding_format", "encoding_format is %q; expected float or base64.", clip(body.EncodingFormat, 32))
	}
	texts, err := body.texts()
	if err != nil {
		return err
	}
	to, err := s.targets.find(ctx, body.Model)
	if err != nil {
		return err
	}
	answer := embeddingBody{Object: "list", Model: body.Model, Data: make([]embedding, 0, len(texts))}
	var vectors [][]float32
	if to.skill != "" || to.provider {
		vectors, err = s.embedByRoute(ctx, to, &body, texts, &answer)
	} else {
		vectors, err = s.embedLocally(ctx, to, &body, texts, &answer)
	}
	if err != nil {
		return errorOf(err).renamed(embeddingNames)
	}
	for index, vector := range vectors {
		answer.Data = append(answer.Data, embedding{"embedding", index, encoded(vector, body.EncodingFormat)})
	}
	answer.Understudy.headers(w.Header())
	return writeJSON(w, answer)
}

func (e *embeddingRequest) texts() ([]string, error) {
	if absent(e.Input) {
		return nil, invalid("input", "input is missing; expected a string or an array of strings.")
	}
	texts, err := textOrList(e.Input, "input")
	if err != nil {
		var ids []any
		if json.Unmarshal(e.Input, &ids) == nil && len(ids) > 0 {
			return nil, invalid("input", "input holds token ids, which are another tokenizer's; expected texts. In LangChain set "+
				"check_embedding_ctx_length=False.")
		}
		return nil, err
	}
	if len(texts) == 0 {
		return nil, invalid("input", "input is an empty array; expected one text at least.")
	}
	if e.Dimensions != nil && *e.Dimensions < 1 {
		return nil, invalid("dimensions", "dimensions is %d; expected 1 or more.", *e.Dimensions)
	}
	return texts, nil
}

func (s *server) embedLocally(ctx context.Context, to target, body *embeddingRequest, texts []string, into *embeddingBody) ([][]float32, error) {
	kind, ok := inputTypes[body.InputType]
	if !ok {
		return nil, invalid("input_type", "input_type is %q; expected query or passage.", clip(body.InputType, 32))
	}
	request := &pb.EmbedRequest{Model: to.selector(), Adapter: to.adapter, Texts: texts, Truncate: body.Truncate, InputType: kind}
	if body.Dimensions != nil {
		request.Dimensions = *body.Dimensions
	}
	response, err := s.inference.Embed(ctx, request)
	if err != nil {
		return nil, err
	}
	vectors := make([][]float32, len(response.GetResults()))
	for index, result := range response.GetResults() {
		if result.GetError() != nil {
			return nil, errorOfStatus(result.GetError())
		}
		vectors[index] = result.GetEmbedding()
	}
	used := response.GetUsage().GetInputTokens()
	into.Usage, into.Understudy = embeddingUsage{used, used}, localStory(response.GetModel(), to.adapter)
	return vectors, nil
}

// embedByRoute asks a skill, or a provider's model.
func (s *server) embedByRoute(ctx context.Context, to target, body *embeddingRequest, texts []string, into *embeddingBody) ([][]float32, error) {
	if to.provider {
		to.skill, to.task = featureExtraction, featureExtraction
	}
	if to.task != featureExtraction {
		return nil, invalid("model", "the skill %q does %s; expected one of the task %s, or a model.", to.skill, to.task, featureExtraction)
	}
	if body.Dimensions != nil {
		return nil, invalid("dimensions", "dimensions is set for a route, not all of whose models can be cut. Name a local model, or leave it out.")
	}
	results, used, err := s.runAll(ctx, to, textInputs(texts), body.extension)
	if err != nil {
		return nil, err
	}
	vectors := make([][]float32, len(results))
	for index, result := range results {
		vectors[index] = result.GetEmbedding()
		into.Understudy = into.Understudy.add(storyOf(result, result.Quality, extras{}))
	}
	into.Usage = embeddingUsage{used, used}
	return vectors, nil
}

func textInputs(texts []string) []*pb.RunInput {
	inputs := make([]*pb.RunInput, len(texts))
	for index, text := range texts {
		inputs[index] = &pb.RunInput{Input: &pb.RunInput_Text{Text: text}}
	}
	return inputs
}

// runAll runs inputs of which none may fail; the tokens that they used.
func (s *server) runAll(ctx context.Context, to target, inputs []*pb.RunInput, said extension) ([]*pb.RunResult, int64, error) {
	request, err := runRequest(to, inputs, said)
	if err != nil {
		return nil, 0, err
	}
	response, err := s.inference.Run(ctx, request)
	if err != nil {
		return nil, 0, err
	}
	for _, result := range response.GetResults() {
		if result.GetError() != nil {
			return nil, 0, errorOfStatus(result.GetError())
		}
	}
	return response.GetResults(), response.GetUsage().GetInputTokens(), nil
}

// encoded is a vector as an array, or as base64 of little-endian float32, which OpenAI's Python client asks for unless told otherwise.
func encoded(vector []float32, format string) any {
	if format != "base64" {
		return vector
	}
	data := make([]byte, 0, 4*len(vector))
	for _, value := range vector {
		data = binary.LittleEndian.AppendUint32(data, math.Float32bits(value))
	}
	return base64.StdEncoding.EncodeToString(data)
}
