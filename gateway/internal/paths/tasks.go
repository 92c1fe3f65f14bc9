package paths

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"google.golang.org/grpc/status"
	pb "understudy.dev/gen/understudy/v1"
)

// What may carry the words of a task, and who is to do it.
var (
	wordNames  = []string{"task", "prompt", "input", "text"}
	agentWords = []string{"task", "prompt", "input", "text", "message"}
	agentNames = []string{"agent", "agent_id", "agent_name", "name", "skill"}
)

// Tasks that look at two texts.
var pairTasks = map[string]bool{"question-answering": true, "text-ranking": true, "sentence-similarity": true}

// task runs plain words, or a skill on a text.
func (a *api) task(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	skill, err := b.text("skill")
	if err != nil {
		return nil, err
	}
	return a.run(ctx, b, skill, wordNames)
}

// agent has the named agent, which is a skill here, do a task. Without a name the words decide who is asked.
func (a *api) agent(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	name, err := b.text(agentNames...)
	if err != nil {
		return nil, err
	}
	answer, err := a.run(ctx, b, name, agentWords)
	if err != nil {
		return nil, err
	}
	answer["agent"] = answer["skill"]
	return answer, nil
}

func (a *api) run(ctx context.Context, b body, skill string, names []string) (object, error) {
	words, err := b.text(names...)
	if err != nil {
		return nil, err
	}
	extra, _, err := b.take("context")
	if err != nil {
		return nil, err
	}
	user, err := b.text("user", "user_id")
	if err != nil {
		return nil, err
	}
	request := &pb.RunRequest{}
	if err := b.into(request, append([]string{"skill", "context"}, names...)...); err != nil {
		return nil, err
	}
	request.Skill, request.User = strings.TrimPrefix(skill, "skills/"), user
	around, err := contextOf(extra, request)
	if err != nil {
		return nil, err
	}
	if err := a.compose(ctx, request, words, around, names); err != nil {
		return nil, err
	}
	response, err := a.inference.Run(ctx, request)
	if err != nil {
		return nil, err
	}
	return ran(response)
}

// contextOf gives the context's text; an object's entries become parameters of the request.
func contextOf(raw json.RawMessage, request *pb.RunRequest) (string, error) {
	if raw == nil {
		return "", nil
	}
	if trimmed := bytes.TrimSpace(raw); trimmed[0] == '"' {
		var text string
		err := json.Unmarshal(raw, &text)
		return text, err
	}
	var entries map[string]any
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	if err := decoder.Decode(&entries); err != nil {
		return "", invalid("context", "`context` is neither a string nor an object; expected a text to work on, or parameters by their names")
	}
	for key, value := range entries {
		if _, twice := request.Parameters[key]; twice {
			return "", invalid("context", "`%s` stands in `context` and in `parameters`; expected it once", key)
		}
		switch value.(type) {
		case string, json.Number, bool:
		default:
			return "", invalid("context", "`context.%s` is no string, number or boolean; expected one of them", key)
		}
		if request.Parameters == nil {
			request.Parameters = map[string]string{}
		}
		request.Parameters[key] = fmt.Sprint(value)
	}
	return "", nil
}

// compose puts the words and their context where the request wants them.
func (a *api) compose(ctx context.Context, request *pb.RunRequest, words, around string, names []string) error {
	if words == "" {
		if around != "" {
			return invalid("context", "`context` stands alone; expected what is to be done in %s", quoted(names, " or "))
		}
		if len(request.Inputs) == 0 && request.Instruction == "" {
			return invalid(names[0], "nothing says what is to be done; expected %s, for example {\"task\": \"Where is my card?\"}", quoted(names, " or "))
		}
		return nil
	}
	if len(request.Inputs) > 0 && (request.Skill != "" || request.Instruction != "" || around != "") {
		return invalid("inputs", "the body has `inputs` and words in %s; expected one of them beside a skill, an instruction or a context", quoted(names, " or "))
	}
	if request.Skill == "" && request.Instruction == "" {
		request.Instruction = words
		if around != "" {
			request.Inputs = []*pb.RunInput{{Input: &pb.RunInput_Text{Text: around}}}
		}
		return nil
	}
	input, err := a.inputOf(ctx, request.Skill, words, around)
	request.Inputs = []*pb.RunInput{input}
	return err
}

// inputOf makes a pair of the words and their context for skills that read pairs, and one text for others.
func (a *api) inputOf(ctx context.Context, skill, words, around string) (*pb.RunInput, error) {
	if around == "" {
		return &pb.RunInput{Input: &pb.RunInput_Text{Text: words}}, nil
	}
	if skill != "" {
		response, err := a.skills.GetSkill(ctx, &pb.GetSkillRequest{Name: "skills/" + skill})
		if err != nil {
			return nil, err
		}
		if pairTasks[response.GetSkill().GetTask()] {
			return &pb.RunInput{Input: &pb.RunInput_Pair{Pair: &pb.TextPair{Text: words, TextPair: around}}}, nil
		}
	}
	return &pb.RunInput{Input: &pb.RunInput_Text{Text: words + "\n\n" + around}}, nil
}

// ran is the answer of a run. The story of a single result stands at the top too; its error is the call's.
func ran(response *pb.RunResponse) (object, error) {
	answer, err := flat(response)
	if err != nil {
		return nil, err
	}
	if len(response.Results) != 1 {
		return answer, nil
	}
	result := response.Results[0]
	if result.Error != nil {
		return nil, status.ErrorProto(result.Error)
	}
	answer["id"] = rawOf(result.InteractionId)
	answer["output"] = rawOf(result.OutputText)
	answer["skill"] = rawOf(result.GetDecision().GetSkill())
	answer["model"] = rawOf(result.GetDecision().GetCandidate())
	answer["local"] = rawOf(result.GetDecision().GetLocal())
	answer["costUsd"] = rawOf(float64(result.GetCost().GetMicroUsd()) / 1e6)
	if result.Quality != nil {
		answer["quality"] = rawOf(result.GetQuality())
	}
	return answer, nil
}

// feedback keeps what somebody says of an interaction.
func (a *api) feedback(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	interaction, err := b.text("interaction_id", "task_id", "id")
	if err != nil {
		return nil, err
	}
	if interaction == "" {
		return nil, invalid("interaction_id", "nothing says which answer is meant; expected `interaction_id` (or `task_id`, `id`) as the answer named it")
	}
	request := &pb.CreateFeedbackRequest{}
	if request.User, err = b.text("user", "user_id"); err != nil {
		return nil, err
	}
	if request.RequestId, err = b.text("request_id"); err != nil {
		return nil, err
	}
	if rating, _, err := b.take("rating", "score"); err != nil {
		return nil, err
	} else if rating != nil {
		b["rating"] = rating
	}
	if thumb, name, err := b.take("thumb", "thumbs"); err != nil {
		return nil, err
	} else if thumb != nil {
		if b["thumb"], err = thumbOf(thumb, name); err != nil {
			return nil, err
		}
	}
	request.Feedback = &pb.Feedback{}
	if err := b.into(request.Feedback, "task_id", "id", "score", "user", "request_id"); err != nil {
		return nil, err
	}
	request.Feedback.InteractionId = interaction
	response, err := a.feedbacks.CreateFeedback(ctx, request)
	if err != nil {
		return nil, err
	}
	answer, err := flat(response)
	if err != nil {
		return nil, err
	}
	answer["id"] = rawOf(response.GetFeedback().GetFeedbackId())
	return answer, nil
}

// thumbOf reads up and down in the ways that they are written: "up", true, 1, "THUMB_UP".
func thumbOf(raw json.RawMessage, name string) (json.RawMessage, error) {
	switch strings.ToLower(strings.Trim(strings.TrimSpace(string(raw)), `"`)) {
	case "up", "true", "1", "thumb_up", "+1":
		return rawOf("THUMB_UP"), nil
	case "down", "false", "-1", "thumb_down":
		return rawOf("THUMB_DOWN"), nil
	default:
		return nil, invalid(name, "`%s` is neither up nor down; expected \"up\" or \"down\"", name)
	}
}
