package paths

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"

	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	pb "understudy.dev/gen/understudy/v1"
)

// Names by which a body may say what the model is to work on.
var inputNames = []string{"input", "inputs", "text", "texts"}

// infer has the path's model do its task on one input.
func (a *api) infer(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	return a.work(ctx, b, r.PathValue("model_id"), single)
}

// inferBatch does the same for a list of inputs.
func (a *api) inferBatch(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	return a.work(ctx, b, r.PathValue("model_id"), batch)
}

// inferNamed has the model that the body names do its task, on one input or on a list of them.
func (a *api) inferNamed(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	model, err := b.text(modelNames...)
	if err != nil {
		return nil, err
	}
	if model == "" {
		return nil, invalid("model", "nothing says which model is to work; expected one of %s", quoted(modelNames, ", "))
	}
	return a.work(ctx, b, model, either)
}

// shape is how many inputs a path takes.
type shape int

const (
	single shape = iota
	batch
	either
)

// work finds the model's task, fills that task's request from the body, and asks. `parameters` may hold the request's other fields, as in
// Hugging Face's inference API.
func (a *api) work(ctx context.Context, b body, model string, shape shape) (any, error) {
	named, err := b.versioned(model)
	if err != nil {
		return nil, err
	}
	name, version := split(named)
	if version == "" {
		named += "/versions/current"
	}
	found, err := a.models.GetModel(ctx, &pb.GetModelRequest{Name: named})
	if err != nil {
		return nil, err
	}
	task := found.GetModel().GetTask()
	doing, ok := tasks[task]
	if !ok {
		return nil, invalid("model", "the model %s does the task %q, which takes tensors; expected a model whose task works on texts. Send tensors by the Open Inference Protocol over gRPC", name, task)
	}
	if err := b.merge("parameters"); err != nil {
		return nil, err
	}
	b["model"] = rawOf(map[string]string{"name": name, "version": version})
	one, err := doing.fill(b, shape)
	if err != nil {
		return nil, err
	}
	response, err := doing.ask(ctx, a, b)
	if err != nil {
		return nil, err
	}
	return worked(response, task, one)
}

// worked is the answer of a task; a single result stands as `result`, and its error is the call's.
func worked(response proto.Message, task string, one bool) (object, error) {
	answer, err := flat(response)
	if err != nil {
		return nil, err
	}
	answer["task"] = rawOf(task)
	var results []json.RawMessage
	if err := json.Unmarshal(answer["results"], &results); err != nil {
		return nil, err
	}
	if !one || len(results) != 1 { // a generation may have several answers
		return answer, nil
	}
	if failed := errorOf(response); failed != nil {
		return nil, status.ErrorProto(failed)
	}
	delete(answer, "results")
	answer["result"] = results[0]
	return answer, nil
}

// errorOf finds the `error` of a response's first result.
func errorOf(response proto.Message) *rpc.Status {
	message := response.ProtoReflect()
	list := message.Get(message.Descriptor().Fields().ByName("results")).List()
	if list.Len() == 0 {
		return nil
	}
	result := list.Get(0).Message()
	field := result.Descriptor().Fields().ByName("error")
	if field == nil || !result.Has(field) {
		return nil
	}
	failed, _ := result.Get(field).Message().Interface().(*rpc.Status)
	return failed
}

// doing is how a task's request is filled and asked.
type doing struct {
	fill func(body, shape) (one bool, err error)
	ask  func(context.Context, *api, body) (proto.Message, error)
}

var tasks = map[string]doing{
	"feature-extraction":       {texts, call((*api).embed)},
	"sentence-similarity":      {texts, call((*api).embed)},
	"text-classification":      {pairs("text", "text_pair"), call((*api).classify)},
	"zero-shot-classification": {pairs("text", "text_pair"), call((*api).classify)},
	"token-classification":     {texts, call((*api).entities)},
	"question-answering":       {pairs("question", "context"), call((*api).answers)},
	"text-ranking":             {ranking, call((*api).rank)},
	"text-generation":          {prompt, call((*api).write)},
	"translation":              {texts, call((*api).translate)},
	"summarization":            {texts, call((*api).summarize)},
}

func call[Q any, P interface {
	*Q
	proto.Message
}, A proto.Message](ask func(*api, context.Context, P) (A, error)) func(context.Context, *api, body) (proto.Message, error) {
	return func(ctx context.Context, a *api, b body) (proto.Message, error) {
		request := P(new(Q))
		if err := b.into(request, fieldsBeside(request)...); err != nil {
			return nil, err
		}
		return ask(a, ctx, request)
	}
}

// fieldsBeside are the names that a body may use instead of the message's own.
func fieldsBeside(message proto.Message) []string {
	fields := message.ProtoReflect().Descriptor().Fields()
	for _, own := range []protoreflect.Name{"texts", "inputs"} {
		if fields.ByName(own) != nil {
			return inputNames
		}
	}
	return nil
}

// inputsOf takes the inputs by any of their names, as a list, and says whether it was one.
func (b body) inputsOf(shape shape, names ...string) (values []json.RawMessage, one bool, err error) {
	raw, name, err := b.take(names...)
	if err != nil {
		return nil, false, err
	}
	if raw == nil {
		return nil, false, invalid(name, "nothing says what the model is to work on; expected one of %s", quoted(names, ", "))
	}
	if values, err = list(raw, name); err != nil {
		return nil, false, err
	}
	one = strings.TrimSpace(string(raw))[0] != '['
	switch {
	case shape == batch && one:
		return nil, false, invalid(name, "`%s` is no list; expected a list of inputs, or the path without /batch for one", name)
	case shape == single && !one && len(values) != 1:
		return nil, false, invalid(name, "`%s` holds %d inputs; expected one, or the path with /batch for more", name, len(values))
	case len(values) == 0:
		return nil, false, invalid(name, "`%s` is empty; expected at least one input", name)
	}
	return values, one || shape == single, nil
}

// texts fills requests whose inputs are texts.
func texts(b body, shape shape) (bool, error) {
	values, one, err := b.inputsOf(shape, inputNames...)
	if err != nil {
		return false, err
	}
	for _, value := range values {
		if value[0] != '"' {
			return false, invalid("input", "an input is no string; this model's task works on texts")
		}
	}
	b["texts"] = rawOf(values)
	return one, nil
}

// pairs fills requests whose inputs are objects of two texts, by these names; a string is the first of them.
func pairs(first, second string) func(body, shape) (bool, error) {
	return func(b body, shape shape) (bool, error) {
		if question, ok := b[first]; ok && first != "text" || ok && b[second] != nil {
			beside := b[second]
			delete(b, first)
			delete(b, second)
			if shape == batch {
				return false, invalid(first, "`%s` stands alone; expected a list of objects with it in `inputs`", first)
			}
			b["inputs"] = rawOf([]map[string]json.RawMessage{withoutNil(first, question, second, beside)})
			return true, nil
		}
		values, one, err := b.inputsOf(shape, inputNames...)
		if err != nil {
			return false, err
		}
		for i, value := range values {
			if value[0] == '"' {
				values[i] = rawOf(map[string]json.RawMessage{first: value})
			}
		}
		b["inputs"] = rawOf(values)
		return one, nil
	}
}

func withoutNil(first string, one json.RawMessage, second string, other json.RawMessage) map[string]json.RawMessage {
	pair := map[string]json.RawMessage{first: one}
	if other != nil {
		pair[second] = other
	}
	return pair
}

// ranking fills a query and its documents. Many queries are many calls.
func ranking(b body, shape shape) (bool, error) {
	if shape == batch {
		return false, invalid("inputs", "a ranking takes one query a call; expected the path without /batch, with `query` and `documents`")
	}
	if raw, _, err := b.take("input", "inputs"); err != nil {
		return false, err
	} else if raw != nil {
		inner, err := parseBody(raw)
		if err != nil {
			return false, invalid("input", "`input` is no object; expected {\"query\": ..., \"documents\": [...]}")
		}
		for key, value := range inner {
			b[key] = value
		}
	}
	if texts, _, err := b.take("documents", "texts"); err != nil {
		return false, err
	} else if texts != nil {
		b["documents"] = texts
	}
	return false, nil
}

// prompt fills a prompt or a conversation.
func prompt(b body, shape shape) (bool, error) {
	if shape == batch {
		return false, invalid("inputs", "a generation takes one prompt a call; expected the path without /batch")
	}
	if messages, ok := b["messages"]; ok {
		delete(b, "messages")
		b["chat"] = rawOf(map[string]json.RawMessage{"messages": messages})
	}
	if err := sampling(b); err != nil {
		return false, err
	}
	names := append(slices.Clone(inputNames), "prompt")
	given := slices.ContainsFunc(names, func(name string) bool { return b[name] != nil })
	if !given && (b["chat"] != nil || b["token_ids"] != nil) {
		return true, nil
	}
	values, _, err := b.inputsOf(single, names...)
	if err != nil {
		return false, err
	}
	b["prompt"] = values[0]
	return true, nil
}

// sampling moves the settings of a generation to where the message has them, so that they may stand beside the prompt.
func sampling(b body) error {
	fields := (&pb.Sampling{}).ProtoReflect().Descriptor().Fields()
	moved := map[string]json.RawMessage{}
	if raw, ok := b["sampling"]; ok {
		inner, err := parseBody(raw)
		if err != nil {
			return invalid("sampling", "`sampling` is no object")
		}
		moved = inner
	}
	if raw, _, err := b.take("max_new_tokens"); err != nil {
		return err
	} else if raw != nil {
		b["max_tokens"] = raw
	}
	for i := range fields.Len() {
		name := string(fields.Get(i).Name())
		if raw, ok := b[name]; ok {
			if _, twice := moved[name]; twice {
				return invalid(name, "`%s` stands in the body and in `sampling`; expected it once", name)
			}
			moved[name] = raw
			delete(b, name)
		}
	}
	if len(moved) > 0 {
		b["sampling"] = rawOf(moved)
	}
	return nil
}

func (a *api) embed(ctx context.Context, q *pb.EmbedRequest) (*pb.EmbedResponse, error) {
	return a.inference.Embed(ctx, q)
}

func (a *api) classify(ctx context.Context, q *pb.ClassifyRequest) (*pb.ClassifyResponse, error) {
	return a.inference.Classify(ctx, q)
}

func (a *api) entities(ctx context.Context, q *pb.ExtractEntitiesRequest) (*pb.ExtractEntitiesResponse, error) {
	return a.inference.ExtractEntities(ctx, q)
}

func (a *api) answers(ctx context.Context, q *pb.AnswerQuestionRequest) (*pb.AnswerQuestionResponse, error) {
	return a.inference.AnswerQuestion(ctx, q)
}

func (a *api) rank(ctx context.Context, q *pb.RerankRequest) (*pb.RerankResponse, error) {
	return a.inference.Rerank(ctx, q)
}

func (a *api) write(ctx context.Context, q *pb.GenerateTextRequest) (*pb.GenerateTextResponse, error) {
	return a.inference.GenerateText(ctx, q)
}

func (a *api) translate(ctx context.Context, q *pb.TranslateRequest) (*pb.TranslateResponse, error) {
	return a.inference.Translate(ctx, q)
}

func (a *api) summarize(ctx context.Context, q *pb.SummarizeRequest) (*pb.SummarizeResponse, error) {
	return a.inference.Summarize(ctx, q)
}
