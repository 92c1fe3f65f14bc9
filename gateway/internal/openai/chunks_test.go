package openai

import (
	"encoding/json"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	pb "understudy.dev/gen/understudy/v1"
)

func ptr[T any](value T) *T { return &value }

// events are a stream's documents; "[DONE]" is left out, and must be last.
func events(t *testing.T, written string, done bool) []map[string]any {
	t.Helper()
	var found []map[string]any
	parts := strings.Split(strings.TrimSuffix(written, "\n\n"), "\n\n")
	for index, part := range parts {
		data, ok := strings.CutPrefix(part, "data: ")
		if !ok || strings.Contains(data, "\n") {
			t.Fatalf("no event: %q", part)
		}
		if data == "[DONE]" {
			if !done || index != len(parts)-1 {
				t.Fatalf("[DONE] at %d of %d", index, len(parts))
			}
			return found
		}
		var one map[string]any
		if err := json.Unmarshal([]byte(data), &one); err != nil {
			t.Fatalf("%v in %q", err, data)
		}
		found = append(found, one)
	}
	if done {
		t.Fatal("no [DONE]")
	}
	return found
}

func choiceOf(event map[string]any) map[string]any {
	return event["choices"].([]any)[0].(map[string]any)
}

func delta(index int32, text string, finish pb.FinishReason, calls ...*pb.ToolCall) *pb.GenerateResponse {
	one := &pb.GenerationDelta{Index: index, Text: text, FinishReason: finish, ToolCalls: calls}
	return &pb.GenerateResponse{Deltas: []*pb.GenerationDelta{one}}
}

const (
	unfinished = pb.FinishReason_FINISH_REASON_UNSPECIFIED
	stopped    = pb.FinishReason_FINISH_REASON_STOP
)

func end1(cost int64) *pb.GenerateResponse {
	return &pb.GenerateResponse{
		Usage: &pb.Usage{InputTokens: 3, OutputTokens: 2, CachedInputTokens: 1}, Cost: &pb.Cost{MicroUsd: cost},
		Decision: &pb.Decision{Skill: "s", Candidate: "v/m"}, Quality: ptr(float32(0.5)), InteractionId: "i1",
	}
}

func TestWhatWaitsGoesIntoOneEvent(t *testing.T) {
	c := newChunker(&job{form: chatForm("m", time.Now()), answers: 1, perSource: 1, sources: make([]source, 1), usage: true})
	c.begin()
	for _, word := range []string{"a \"quoted\"\n", "word\x00", " \u2028ü\U0001F600"} {
		c.take(0, delta(0, word, unfinished), extras{})
	}
	c.flushAll()
	c.take(0, delta(0, "!", stopped), extras{})
	c.take(0, end1(7), extras{})
	c.close()
	found := events(t, string(c.buffer), true)
	if len(found) != 5 {
		t.Fatalf("%d events: %s", len(found), c.buffer)
	}
	if role := choiceOf(found[0])["delta"].(map[string]any)["role"]; role != "assistant" {
		t.Errorf("role %v", role)
	}
	if text := choiceOf(found[1])["delta"].(map[string]any)["content"]; text != "a \"quoted\"\nword\x00 \u2028ü\U0001F600" {
		t.Errorf("text %q", text)
	}
	if choiceOf(found[3])["finish_reason"] != "stop" || found[3]["usage"] != nil {
		t.Errorf("finish %v", found[3])
	}
	if story := found[3]["understudy"].(map[string]any); story["route"] != "v/m" || story["cost_usd"] != 7e-6 || story["interaction_id"] != "i1" {
		t.Errorf("story %v", story)
	}
	if used := found[4]["usage"].(map[string]any); used["total_tokens"] != 5.0 || len(found[4]["choices"].([]any)) != 0 {
		t.Errorf("usage %v", found[4])
	}
}

func TestOnlyTheLastAnswersEndWaitsForTheStory(t *testing.T) {
	c := newChunker(&job{form: textForm("m", time.Now()), answers: 2, perSource: 1, sources: make([]source, 2), echo: []string{"p", "q"}})
	c.begin()
	c.take(1, delta(0, "b", stopped), extras{})
	c.take(1, end1(1), extras{})
	c.take(0, delta(0, "a", stopped), extras{})
	early := len(events(t, string(c.buffer), false))
	c.take(0, end1(2), extras{})
	c.close()
	found := events(t, string(c.buffer), true)
	if early != 5 || len(found) != 6 {
		t.Fatalf("%d, then %d events: %s", early, len(found), c.buffer)
	}
	if _, told := found[3]["understudy"]; told {
		t.Errorf("the first end tells a story: %v", found[3])
	}
	if story := found[5]["understudy"].(map[string]any); story["cost_usd"] != 3e-6 {
		t.Errorf("story %v", story)
	}
	if c.sum.input != 6 || c.sum.output != 4 {
		t.Errorf("tally %+v", c.sum)
	}
}

func TestCallsOfToolsAreWhole(t *testing.T) {
	calls := []*pb.ToolCall{{Id: "1", Name: "f", Arguments: `{"a":"\""}`}, {Id: "2", Name: "g", Arguments: "{}"}}
	for _, only := range []bool{false, true} {
		c := newChunker(&job{form: chatForm("m", time.Now()), answers: 1, perSource: 1, oneCall: only})
		c.take(0, delta(0, "", pb.FinishReason_FINISH_REASON_TOOL_CALLS, calls...), extras{})
		c.close()
		found := events(t, string(c.buffer), true)
		given := choiceOf(found[0])["delta"].(map[string]any)["tool_calls"].([]any)
		if want := map[bool]int{false: 2, true: 1}[only]; len(given) != want {
			t.Fatalf("%d calls", len(given))
		}
		if function := given[0].(map[string]any)["function"].(map[string]any); function["arguments"] != `{"a":"\""}` {
			t.Errorf("call %v", function)
		}
		if choiceOf(found[1])["finish_reason"] != "tool_calls" {
			t.Errorf("finish %v", found[1])
		}
	}
}

func TestAFailureComesInPlaceOfTheRest(t *testing.T) {
	c := newChunker(&job{form: chatForm("m", time.Now()), answers: 1, perSource: 1})
	c.take(0, delta(0, "so far", unfinished), extras{})
	c.fail(&apiError{message: "no \"more\"", kind: "server_error"})
	found := events(t, string(c.buffer), false)
	if len(found) != 2 || found[1]["error"].(map[string]any)["message"] != "no \"more\"" {
		t.Fatalf("%s", c.buffer)
	}
}

func TestAnAnswerOutOfRangeIsLeftOut(t *testing.T) {
	c := newChunker(&job{form: chatForm("m", time.Now()), answers: 1, perSource: 1})
	for _, index := range []int32{1, -1, 1 << 30} {
		c.take(0, delta(index, "x", stopped), extras{})
	}
	if len(c.buffer) != 0 {
		t.Fatalf("%s", c.buffer)
	}
}

func FuzzEscaping(f *testing.F) {
	for _, one := range []string{"", "plain", "\x00\x1f\"\\\n\r\t", "ü\u2028\U0001F600", "\xff\xc3(", "a\xe2\x82"} {
		f.Add(one)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var back string
		if err := json.Unmarshal(appendString(nil, text), &back); err != nil {
			t.Fatal(err)
		}
		if want := strings.ToValidUTF8(text, "\ufffd"); back != want && len([]rune(back)) != len([]rune(text)) {
			t.Fatalf("%q became %q", text, back)
		}
	})
}

// A token of a stream: no allocation but what the library's writer makes.
func BenchmarkToken(b *testing.B) {
	c := newChunker(&job{form: chatForm("model", time.Now()), answers: 1, perSource: 1})
	message := delta(0, " token", unfinished)
	b.ReportAllocs()
	for b.Loop() {
		c.take(0, message, extras{})
		c.flushAll()
		c.buffer = c.buffer[:0]
	}
}

type scripted struct{ messages []*pb.GenerateResponse }

func (s *scripted) recv() (*pb.GenerateResponse, extras, error) {
	if len(s.messages) == 0 {
		return nil, extras{}, io.EOF
	}
	next := s.messages[0]
	s.messages = s.messages[1:]
	return next, extras{}, nil
}

func TestAStreamIsFlushedToItsEnd(t *testing.T) {
	messages := []*pb.GenerateResponse{delta(0, "a", unfinished), delta(0, "b", unfinished), delta(0, "", stopped), end1(1)}
	j := job{form: chatForm("m", time.Now()), stream: true, answers: 1, perSource: 1, sources: []source{{open: openScripted(messages)}}}
	recorder := httptest.NewRecorder()
	if err := (&server{}).answerStream(t.Context(), recorder, j); err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, event := range events(t, recorder.Body.String(), true) {
		content, _ := choiceOf(event)["delta"].(map[string]any)["content"].(string)
		text += content
	}
	if text != "ab" || !recorder.Flushed || recorder.Header().Get("Content-Type") != "text/event-stream; charset=utf-8" {
		t.Fatalf("%q, %v, %v", text, recorder.Flushed, recorder.Header())
	}
}
