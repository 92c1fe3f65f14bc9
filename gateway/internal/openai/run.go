package openai

import (
	"context"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "understudy.dev/gen/understudy/v1"
)

// run is a conversation as a skill of another task takes it: the words of the last user are its input. What a conversation may ask for and such
// a skill cannot do is refused by its field.
func (c *chatRequest) run(to target, asked *pb.GenerateRequest) (*pb.RunRequest, error) {
	text := ""
	for _, message := range asked.GetChat().GetMessages() {
		if message.GetRole() == "user" {
			text = message.GetContent()
		}
	}
	if text == "" {
		return nil, invalid("messages", "messages has no words of a user; the skill %q works on them.", to.skill)
	}
	refused := []struct {
		set   bool
		param string
	}{
		{len(asked.GetTools()) > 0, "tools"},
		{asked.GetResponseFormat() != nil, "response_format"},
		{asked.GetLogprobs(), "logprobs"},
		{asked.GetSampling().GetN() > 1, "n"},
	}
	for _, one := range refused {
		if one.set {
			return nil, invalid(one.param, "%s is set, and %q is a skill of the task %s, which does not write freely. Leave it out.",
				one.param, to.skill, to.task)
		}
	}
	return runRequest(to, []*pb.RunInput{{Input: &pb.RunInput_Text{Text: text}}}, c.extension)
}

// runRequest asks a skill, or a provider's model for the work of the task `to.task`.
func runRequest(to target, inputs []*pb.RunInput, said extension) (*pb.RunRequest, error) {
	preference, cost, err := said.limits()
	if err != nil {
		return nil, err
	}
	found := &pb.RunRequest{
		Skill: to.skill, Inputs: inputs, Preference: preference, MaxCost: cost, User: said.User, Parameters: said.Understudy.Parameters,
	}
	if to.provider {
		found.Model = to.model
	}
	return found, nil
}

// run answers a conversation by a skill that does not generate: its answer in one piece.
func (s *server) run(request *pb.RunRequest) source {
	return source{
		whole: func(ctx context.Context) (*pb.GenerateTextResponse, extras, error) {
			result, err := s.runOne(ctx, request)
			if err != nil {
				return nil, extras{}, err
			}
			answer := &pb.GenerateTextResponse{
				Results:       []*pb.GeneratedText{{Text: result.GetOutputText(), FinishReason: pb.FinishReason_FINISH_REASON_STOP}},
				Usage:         result.GetUsage(),
				Decision:      result.GetDecision(),
				Cost:          result.GetCost(),
				Quality:       result.Quality,
				InteractionId: result.GetInteractionId(),
			}
			return answer, extrasOf(result), nil
		},
		open: func(ctx context.Context) (receiver, error) {
			return &runReceiver{ctx: ctx, ask: func() (*pb.RunResult, error) { return s.runOne(ctx, request) }}, nil
		},
	}
}

func (s *server) runOne(ctx context.Context, request *pb.RunRequest) (*pb.RunResult, error) {
	response, err := s.inference.Run(ctx, request)
	if err != nil {
		return nil, err
	}
	if len(response.GetResults()) != 1 {
		return nil, io.ErrUnexpectedEOF
	}
	result := response.GetResults()[0]
	if result.GetError() != nil {
		return nil, errorOfStatus(result.GetError())
	}
	return result, nil
}

// runReceiver is an answer in one piece as a stream.
type runReceiver struct {
	ctx  context.Context
	ask  func() (*pb.RunResult, error)
	done bool
}

func (r *runReceiver) recv() (*pb.GenerateResponse, extras, error) {
	if r.done {
		return nil, extras{}, io.EOF
	}
	r.done = true
	result, err := r.ask()
	if err != nil {
		return nil, extras{}, err
	}
	return &pb.GenerateResponse{
		Deltas:        []*pb.GenerationDelta{{Text: result.GetOutputText(), FinishReason: pb.FinishReason_FINISH_REASON_STOP}},
		Usage:         result.GetUsage(),
		Decision:      result.GetDecision(),
		Cost:          result.GetCost(),
		Quality:       result.Quality,
		InteractionId: result.GetInteractionId(),
	}, extrasOf(result), nil
}

// The two requests have the same fields by the proto's promise (contract_test.go), so that one is sent as the other without being copied.
const generateText = "/understudy.v1.InferenceService/GenerateText"

func (s *server) generate(request *pb.GenerateRequest) source {
	return source{
		whole: func(ctx context.Context) (*pb.GenerateTextResponse, extras, error) {
			response := &pb.GenerateTextResponse{}
			err := s.conn.Invoke(ctx, generateText, request, response, grpc.StaticMethod())
			return response, extras{}, err
		},
		open: func(ctx context.Context) (receiver, error) {
			stream, err := s.inference.Generate(ctx, request)
			return streamReceiver{stream}, err
		},
	}
}

// perSource is how many of a request's answers each of its sources gives.
func perSource(to target, request *pb.GenerateRequest) int32 {
	if to.routed() {
		return 1
	}
	return max(request.GetSampling().GetN(), 1)
}

// sources answer one request, each as many of its answers as the job says. A route gives one a call: so many calls are made, each with a seed
// of its own where there is one.
func (s *server) sources(to target, request *pb.GenerateRequest) []source {
	count := request.GetSampling().GetN()
	if count < 2 || !to.routed() {
		return []source{s.generate(request)}
	}
	found := make([]source, count)
	for index := range found {
		one := proto.Clone(request).(*pb.GenerateRequest)
		one.Sampling.N = 0
		if one.Sampling.Seed != nil {
			*one.Sampling.Seed += int64(index)
		}
		found[index] = s.generate(one)
	}
	return found
}

type streamReceiver struct {
	stream grpc.ServerStreamingClient[pb.GenerateResponse]
}

func (r streamReceiver) recv() (*pb.GenerateResponse, extras, error) {
	message, err := r.stream.Recv()
	return message, extras{}, err
}
