package openai

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"

	pb "understudy.dev/gen/understudy/v1"
)

// chatRequest is the body of POST /v1/chat/completions.
type chatRequest struct {
	Model               string                     `json:"model"`
	Messages            []chatMessage              `json:"messages"`
	MaxCompletionTokens *int32                     `json:"max_completion_tokens"`
	Logprobs            bool                       `json:"logprobs"`
	TopLogprobs         int32                      `json:"top_logprobs"`
	Tools               []toolSpec                 `json:"tools"`
	ToolChoice          json.RawMessage            `json:"tool_choice"`
	ParallelToolCalls   *bool                      `json:"parallel_tool_calls"`
	ResponseFormat      *formatSpec                `json:"response_format"`
	StructuredOutputs   *structuredSpec            `json:"structured_outputs"`
	Metadata            map[string]json.RawMessage `json:"metadata"`
	Modalities          []string                   `json:"modalities"`
	Functions           json.RawMessage            `json:"functions"`
	FunctionCall        json.RawMessage            `json:"function_call"`
	samplingFields
	extension
}

type chatMessage struct {
	Role       string          `json:"role"`
	Content    json.RawMessage `json:"content"`
	Name       string          `json:"name"`
	ToolCallID string          `json:"tool_call_id"`
	ToolCalls  []toolCallSpec  `json:"tool_calls"`
}

type toolCallSpec struct {
	ID       string `json:"id"`
	Type     string `json:"type"`
	Function struct {
		Name      string `json:"name"`
		Arguments string `json:"arguments"`
	} `json:"function"`
}

type toolSpec struct {
	Type     string `json:"type"`
	Function struct {
		Name        string          `json:"name"`
		Description string          `json:"description"`
		Parameters  json.RawMessage `json:"parameters"`
	} `json:"function"`
}

type formatSpec struct {
	Type       string `json:"type"`
	JSONSchema *struct {
		Name   string          `json:"name"`
		Schema json.RawMessage `json:"schema"`
	} `json:"json_schema"`
}

// structuredSpec asks for the forms that OpenAI's API does not have, by vLLM's names.
type structuredSpec struct {
	JSON    json.RawMessage `json:"json"`
	Regex   string          `json:"regex"`
	Choice  []string        `json:"choice"`
	Grammar string          `json:"grammar"`
}

func (s *server) chat(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	var body chatRequest
	if err := decode(r, &body); err != nil {
		return err
	}
	to, err := s.targets.find(ctx, body.Model)
	if err != nil {
		return err
	}
	request, err := body.request(to)
	if err != nil {
		return err
	}
	job := job{
		form:      chatForm(body.Model, s.now()),
		stream:    body.Stream,
		usage:     body.StreamOptions.IncludeUsage,
		answers:   max(request.GetSampling().GetN(), 1),
		perSource: perSource(to, request),
		oneCall:   body.ParallelToolCalls != nil && !*body.ParallelToolCalls,
		names:     fieldNames,
		logprobs:  body.Logprobs,
	}
	if body.MaxCompletionTokens != nil {
		job.names = withName(fieldNames, "sampling.max_tokens", "max_completion_tokens")
	}
	if to.generates() {
		job.sources = s.sources(to, request)
	} else {
		run, err := body.run(to, request)
		if err != nil {
			return err
		}
		job.sources = []source{s.run(run)}
	}
	return s.answer(ctx, w, job)
}

// request is what Generate and GenerateText take.
func (c *chatRequest) request(to target) (*pb.GenerateRequest, error) {
	if err := c.refuse(); err != nil {
		return nil, err
	}
	if c.MaxCompletionTokens != nil {
		if *c.MaxCompletionTokens < 1 {
			return nil, invalid("max_completion_tokens", "max_completion_tokens is %d; expected 1 or more.", *c.MaxCompletionTokens)
		}
		c.MaxTokens = c.MaxCompletionTokens
	}
	sampling, err := c.sampling()
	if err != nil {
		return nil, err
	}
	messages, err := chatMessages(c.Messages)
	if err != nil {
		return nil, err
	}
	found := &pb.GenerateRequest{
		Input:       &pb.GenerateRequest_Chat{Chat: &pb.Chat{Messages: messages}},
		Sampling:    sampling,
		Logprobs:    c.Logprobs,
		TopLogprobs: c.TopLogprobs,
	}
	if c.TopLogprobs != 0 && !c.Logprobs {
		return nil, invalid("top_logprobs", "top_logprobs is set without logprobs; expected logprobs: true beside it.")
	}
	if err := c.bound(to, found); err != nil {
		return nil, err
	}
	if found.Tools, err = tools(c.Tools); err != nil {
		return nil, err
	}
	if found.ToolChoice, err = toolChoice(c.ToolChoice); err != nil {
		return nil, err
	}
	if found.ResponseFormat, err = c.format(); err != nil {
		return nil, err
	}
	return found, nil
}

// refuse names what would be ignored to the caller's surprise.
func (c *chatRequest) refuse() error {
	if !absent(c.Functions) || !absent(c.FunctionCall) {
		return invalid("functions", "functions and function_call are not taken; expected tools and tool_choice, which replaced them.")
	}
	for _, kind := range c.Modalities {
		if kind != "text" {
			return invalid("modalities", "modalities has %q; expected [\"text\"], which is all that models write here.", clip(kind, 32))
		}
	}
	return nil
}

func chatMessages(given []chatMessage) ([]*pb.ChatMessage, error) {
	if len(given) == 0 {
		return nil, invalid("messages", "messages is empty; expected at least one message.")
	}
	found := make([]*pb.ChatMessage, len(given))
	for index, one := range given {
		message, err := one.message(index)
		if err != nil {
			return nil, err
		}
		found[index] = message
	}
	return found, nil
}

func (m *chatMessage) message(index int) (*pb.ChatMessage, error) {
	field := indexed("messages", index)
	found := &pb.ChatMessage{Role: m.Role, Name: m.Name, ToolCallId: m.ToolCallID}
	switch m.Role {
	case "system", "user", "assistant":
	case "developer":
		// What OpenAI renamed "system" to; templates of open models know the older name.
		found.Role = "system"
	case "tool":
		if m.ToolCallID == "" {
			return nil, invalid(field+".tool_call_id", "%s.tool_call_id is missing; expected the id of the call that it answers.", field)
		}
	default:
		return nil, invalid(field+".role", "%s.role is %q; expected system, developer, user, assistant or tool.", field, clip(m.Role, 32))
	}
	text, err := contentText(m.Content, field+".content")
	if err != nil {
		return nil, err
	}
	if absent(m.Content) && m.Role != "assistant" {
		return nil, invalid(field+".content", "%s.content is missing; expected a string or an array of text parts.", field)
	}
	found.Content = text
	for number, call := range m.ToolCalls {
		if call.Type != "" && call.Type != "function" {
			name := indexed(field+".tool_calls", number) + ".type"
			return nil, invalid(name, "%s is %q; expected \"function\".", name, clip(call.Type, 32))
		}
		found.ToolCalls = append(found.ToolCalls, &pb.ToolCall{Id: call.ID, Name: call.Function.Name, Arguments: call.Function.Arguments})
	}
	return found, nil
}

// contentText reads a string, or parts of text, which become lines of one text.
func contentText(raw json.RawMessage, field string) (string, error) {
	if absent(raw) {
		return "", nil
	}
	var text string
	if json.Unmarshal(raw, &text) == nil {
		return text, nil
	}
	var parts []struct {
		Type    string `json:"type"`
		Text    string `json:"text"`
		Refusal string `json:"refusal"`
	}
	if err := json.Unmarshal(raw, &parts); err != nil {
		return "", invalid(field, "%s is neither a string nor an array of parts with a type.", field)
	}
	texts := make([]string, 0, len(parts))
	for index, part := range parts {
		switch part.Type {
		case "text", "input_text", "output_text":
			texts = append(texts, part.Text)
		case "refusal":
			texts = append(texts, part.Refusal)
		default:
			name := indexed(field, index)
			return "", invalid(name, "%s is of the type %q; expected \"text\": this server's models read text alone.", name, clip(part.Type, 32))
		}
	}
	return strings.Join(texts, "\n"), nil
}

func tools(given []toolSpec) ([]*pb.Tool, error) {
	found := make([]*pb.Tool, 0, len(given))
	for index, one := range given {
		field := indexed("tools", index)
		if one.Type != "function" {
			return nil, invalid(field+".type", "%s.type is %q; expected \"function\".", field, clip(one.Type, 32))
		}
		if one.Function.Name == "" {
			return nil, invalid(field+".function.name", "%s.function.name is missing.", field)
		}
		tool := &pb.Tool{Name: one.Function.Name, Description: one.Function.Description}
		if !absent(one.Function.Parameters) {
			tool.Parameters = string(one.Function.Parameters)
		}
		found = append(found, tool)
	}
	return found, nil
}

// toolChoice reads "none", "auto", "required", {"type": "function", "function": {"name"}} or a choice of one from "allowed_tools".
func toolChoice(raw json.RawMessage) (string, error) {
	if absent(raw) {
		return "", nil
	}
	var mode string
	if json.Unmarshal(raw, &mode) == nil {
		switch mode {
		case "auto":
			return "", nil
		case "none", "required":
			return mode, nil
		}
		return "", invalid("tool_choice", "tool_choice is %q; expected none, auto, required or a function.", clip(mode, 32))
	}
	var named struct {
		Type     string `json:"type"`
		Function struct {
			Name string `json:"name"`
		} `json:"function"`
	}
	if json.Unmarshal(raw, &named) != nil || named.Type != "function" || named.Function.Name == "" {
		return "", invalid("tool_choice", "tool_choice is none that is known; expected {\"type\": \"function\", \"function\": {\"name\": ...}}.")
	}
	return named.Function.Name, nil
}

func (c *chatRequest) format() (*pb.ResponseFormat, error) {
	if c.StructuredOutputs != nil {
		if c.ResponseFormat != nil && c.ResponseFormat.Type != "text" {
			return nil, invalid("structured_outputs", "structured_outputs and response_format are both set; expected one of them.")
		}
		return c.StructuredOutputs.format()
	}
	if c.ResponseFormat == nil {
		return nil, nil
	}
	switch c.ResponseFormat.Type {
	case "text":
		return nil, nil
	case "json_object":
		return &pb.ResponseFormat{Format: &pb.ResponseFormat_JsonObject{JsonObject: true}}, nil
	case "json_schema":
		given := c.ResponseFormat.JSONSchema
		if given == nil || absent(given.Schema) {
			return nil, invalid("response_format.json_schema", "response_format.json_schema.schema is missing; expected a JSON Schema.")
		}
		return &pb.ResponseFormat{Format: &pb.ResponseFormat_JsonSchema{JsonSchema: string(given.Schema)}}, nil
	}
	kind := clip(c.ResponseFormat.Type, 32)
	return nil, invalid("response_format.type", "response_format.type is %q; expected text, json_object or json_schema.", kind)
}

func (s *structuredSpec) format() (*pb.ResponseFormat, error) {
	found := &pb.ResponseFormat{}
	switch {
	case !absent(s.JSON):
		schema := string(s.JSON)
		var text string
		if json.Unmarshal(s.JSON, &text) == nil {
			schema = text
		}
		found.Format = &pb.ResponseFormat_JsonSchema{JsonSchema: schema}
	case s.Regex != "":
		found.Format = &pb.ResponseFormat_Regex{Regex: s.Regex}
	case len(s.Choice) > 0:
		found.Format = &pb.ResponseFormat_Choice{Choice: &pb.Choice{Values: s.Choice}}
	case s.Grammar != "":
		found.Format = &pb.ResponseFormat_Grammar{Grammar: s.Grammar}
	default:
		return nil, invalid("structured_outputs", "structured_outputs is empty; expected json, regex, choice or grammar.")
	}
	return found, nil
}
