package openai

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"unicode/utf8"

	pb "understudy.dev/gen/understudy/v1"
)

type completionBody struct {
	ID                string    `json:"id"`
	Object            string    `json:"object"`
	Created           int64     `json:"created"`
	Model             string    `json:"model"`
	Choices           []any     `json:"choices"`
	Usage             usageBody `json:"usage"`
	SystemFingerprint *string   `json:"system_fingerprint"`
	Understudy        *story    `json:"understudy"`
}

type chatChoice struct {
	Index        int32         `json:"index"`
	Message      answerMessage `json:"message"`
	Logprobs     *chatLogprobs `json:"logprobs"`
	FinishReason string        `json:"finish_reason"`
}

type answerMessage struct {
	Role      string       `json:"role"`
	Content   *string      `json:"content"`
	Refusal   *string      `json:"refusal"`
	ToolCalls []answerCall `json:"tool_calls,omitempty"`
}

type answerCall struct {
	ID       string         `json:"id"`
	Type     string         `json:"type"`
	Function answerFunction `json:"function"`
}

type answerFunction struct {
	Name      string `json:"name"`
	Arguments string `json:"arguments"`
}

type chatLogprobs struct {
	Content []tokenLogprob `json:"content"`
	Refusal []tokenLogprob `json:"refusal"`
}

type tokenLogprob struct {
	topLogprob
	Top []topLogprob `json:"top_logprobs"`
}

type topLogprob struct {
	Token   string  `json:"token"`
	Logprob float32 `json:"logprob"`
	Bytes   []int   `json:"bytes"`
}

type textChoice struct {
	Index        int32         `json:"index"`
	Text         string        `json:"text"`
	Logprobs     *textLogprobs `json:"logprobs"`
	FinishReason string        `json:"finish_reason"`
}

type textLogprobs struct {
	Tokens        []string             `json:"tokens"`
	TokenLogprobs []float32            `json:"token_logprobs"`
	TopLogprobs   []map[string]float32 `json:"top_logprobs"`
	TextOffset    []int                `json:"text_offset"`
}

func (s *server) answerWhole(ctx context.Context, w http.ResponseWriter, j job) error {
	responses, more, err := ask(ctx, j.sources)
	if err != nil {
		return j.errorOf(err)
	}
	body := completionBody{ID: j.form.id, Object: "text_completion", Created: j.form.created, Model: j.form.model}
	if j.form.chat {
		body.Object = "chat.completion"
	}
	var sum tally
	for number, response := range responses {
		sum.add(response, response.Quality, more[number])
		for index, text := range response.GetResults() {
			place := int32(number)*j.perSource + int32(index)
			if j.form.chat {
				body.Choices = append(body.Choices, j.chatChoice(place, text))
			} else {
				body.Choices = append(body.Choices, j.textChoice(place, number, text))
			}
		}
	}
	body.Usage, body.Understudy = sum.usage(), sum.story
	sum.story.headers(w.Header())
	return writeJSON(w, body)
}

// ask asks all sources at once. The first error ends the others.
func ask(ctx context.Context, sources []source) ([]*pb.GenerateTextResponse, []extras, error) {
	responses, more := make([]*pb.GenerateTextResponse, len(sources)), make([]extras, len(sources))
	if len(sources) == 1 { // the usual case, without a goroutine
		var err error
		responses[0], more[0], err = sources[0].whole(ctx)
		return responses, more, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	for index, source := range sources {
		group.Go(func() {
			var err error
			if responses[index], more[index], err = source.whole(ctx); err != nil {
				cancel(err)
			}
		})
	}
	group.Wait()
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return nil, nil, err
	}
	return responses, more, ctx.Err()
}

func (j *job) chatChoice(index int32, text *pb.GeneratedText) chatChoice {
	choice := chatChoice{Index: index, FinishReason: finishName(text.GetFinishReason()), Message: answerMessage{Role: "assistant"}}
	for _, call := range j.calls(text.GetToolCalls()) {
		function := answerFunction{call.GetName(), call.GetArguments()}
		choice.Message.ToolCalls = append(choice.Message.ToolCalls, answerCall{call.GetId(), "function", function})
	}
	if content := text.GetText(); content != "" || len(choice.Message.ToolCalls) == 0 {
		choice.Message.Content = &content
	}
	if j.logprobs {
		choice.Logprobs = chatLogprobsOf(text.GetTokens())
	}
	return choice
}

func (j *job) textChoice(index int32, number int, text *pb.GeneratedText) textChoice {
	choice := textChoice{Index: index, Text: text.GetText(), FinishReason: finishName(text.GetFinishReason())}
	if j.logprobs {
		choice.Logprobs, _ = textLogprobsOf(text.GetTokens(), 0)
	}
	if len(j.echo) > 0 {
		choice.Text = j.echo[number] + choice.Text
	}
	return choice
}

func chatLogprobsOf(tokens []*pb.GeneratedToken) *chatLogprobs {
	found := &chatLogprobs{Content: make([]tokenLogprob, 0, len(tokens))}
	for _, token := range tokens {
		one := tokenLogprob{topLogprobOf(token.GetText(), token.GetLogprob()), make([]topLogprob, 0, len(token.GetTop()))}
		for _, other := range token.GetTop() {
			one.Top = append(one.Top, topLogprobOf(other.GetText(), other.GetLogprob()))
		}
		found.Content = append(found.Content, one)
	}
	return found
}

func topLogprobOf(text string, logprob float32) topLogprob {
	bytes := make([]int, len(text))
	for index := range len(text) {
		bytes[index] = int(text[index])
	}
	return topLogprob{text, logprob, bytes}
}

// textLogprobsOf gives offsets in characters from `offset` on, and the offset after the last token.
func textLogprobsOf(tokens []*pb.GeneratedToken, offset int) (*textLogprobs, int) {
	found := &textLogprobs{[]string{}, []float32{}, []map[string]float32{}, []int{}}
	for _, token := range tokens {
		top := make(map[string]float32, len(token.GetTop()))
		for _, other := range token.GetTop() {
			top[other.GetText()] = other.GetLogprob()
		}
		found.Tokens = append(found.Tokens, token.GetText())
		found.TokenLogprobs = append(found.TokenLogprobs, token.GetLogprob())
		found.TopLogprobs = append(found.TopLogprobs, top)
		found.TextOffset = append(found.TextOffset, offset)
		offset += utf8.RuneCountInString(token.GetText())
	}
	return found, offset
}
