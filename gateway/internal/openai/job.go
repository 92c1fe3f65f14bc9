package openai

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"strconv"
	"time"

	pb "understudy.dev/gen/understudy/v1"
)

// form is which of the two APIs an answer is written in, and what all its documents begin with.
type form struct {
	chat    bool
	id      string
	created int64
	model   string
}

func chatForm(model string, now time.Time) form {
	return form{chat: true, id: newID("chatcmpl-"), created: now.Unix(), model: model}
}

func textForm(model string, now time.Time) form {
	return form{id: newID("cmpl-"), created: now.Unix(), model: model}
}

func newID(prefix string) string {
	var bytes [12]byte
	_, _ = rand.Read(bytes[:]) // never fails
	return prefix + hex.EncodeToString(bytes[:])
}

// source is who answers one prompt: whole, or piece by piece.
type source struct {
	whole func(context.Context) (*pb.GenerateTextResponse, extras, error)
	open  func(context.Context) (receiver, error)
}

// receiver gives a stream's messages; io.EOF ends it.
type receiver interface {
	recv() (*pb.GenerateResponse, extras, error)
}

// job is a request that is ready to be answered.
type job struct {
	form      form
	stream    bool
	usage     bool // in a stream: a last chunk that tells of tokens
	oneCall   bool // at most one tool call
	logprobs  bool
	answers   int32 // of all sources
	perSource int32
	sources   []source
	echo      []string // what each source's answers begin with
	names     map[string]string
}

func (s *server) answer(ctx context.Context, w http.ResponseWriter, j job) error {
	if j.stream {
		return s.answerStream(ctx, w, j)
	}
	return s.answerWhole(ctx, w, j)
}

func (j *job) errorOf(err error) *apiError {
	return errorOf(err).renamed(j.names)
}

// tally is what a request's answers used, all sources together.
type tally struct {
	input, output, cached int64
	story                 *story
}

type tallied interface {
	told
	GetModel() *pb.ModelUsed
	GetAdapter() string
	GetUsage() *pb.Usage
}

func (t *tally) add(last tallied, quality *float32, more extras) {
	used := last.GetUsage()
	t.input += used.GetInputTokens()
	t.output += used.GetOutputTokens()
	t.cached += used.GetCachedInputTokens()
	if last.GetDecision() != nil {
		t.story = t.story.add(storyOf(last, quality, more))
	} else {
		t.story = t.story.add(localStory(last.GetModel(), last.GetAdapter()))
	}
}

type usageBody struct {
	PromptTokens     int64         `json:"prompt_tokens"`
	CompletionTokens int64         `json:"completion_tokens"`
	TotalTokens      int64         `json:"total_tokens"`
	Details          promptDetails `json:"prompt_tokens_details"`
}

type promptDetails struct {
	CachedTokens int64 `json:"cached_tokens"`
}

func (t *tally) usage() usageBody {
	return usageBody{t.input, t.output, t.input + t.output, promptDetails{t.cached}}
}

var finishNames = map[pb.FinishReason]string{
	pb.FinishReason_FINISH_REASON_STOP:       "stop",
	pb.FinishReason_FINISH_REASON_LENGTH:     "length",
	pb.FinishReason_FINISH_REASON_TOOL_CALLS: "tool_calls",
}

func finishName(reason pb.FinishReason) string {
	if name, ok := finishNames[reason]; ok {
		return name
	}
	return "stop"
}

func (j *job) calls(given []*pb.ToolCall) []*pb.ToolCall {
	if j.oneCall && len(given) > 1 {
		return given[:1]
	}
	return given
}

func indexed(name string, index int) string {
	return name + "[" + strconv.Itoa(index) + "]"
}

// withName is `names` with one of them changed.
func withName(names map[string]string, from, to string) map[string]string {
	found := make(map[string]string, len(names)+1)
	for key, value := range names {
		found[key] = value
	}
	found[from] = to
	return found
}
