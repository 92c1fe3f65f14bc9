// Package understudy is the client of Understudy, the inference server whose local models learn to replace API models.
//
// Every error of a call is an *Error: the gRPC code, the server's own reason, what varies in it, and when to try again.
package understudy

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"iter"
	"math"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	pb "understudy.dev/gen/understudy/v1"
)

const (
	defaultTimeout  = 60 * time.Second
	defaultAttempts = 4
)

// Options of a connection; the zero value is a connection without encryption and without a key.
type Options struct {
	// APIKey is sent with every call as a bearer token.
	APIKey string
	// TLS encrypts; nil: no encryption. &tls.Config{} checks the server against the authorities of the system.
	TLS *tls.Config
	// Timeout bounds calls whose context has no deadline, with all their attempts; 0: 60 s. Other streams than Generate's have no such bound.
	Timeout time.Duration
	// Attempts is how often a call is sent at most, the first time included; 0: 4, 1: once. Streams are sent once.
	Attempts int
	// Metadata is sent with every call.
	Metadata map[string]string
	// Dial is handed to grpc.NewClient after our own options.
	Dial []grpc.DialOption
}

// Client is one connection to a server, safe for concurrent use. The stubs take and give the messages of the protos, and go through the same
// deadlines, retries and errors as the methods.
type Client struct {
	Inference pb.InferenceServiceClient
	Feedback  pb.FeedbackServiceClient
	Skills    pb.SkillServiceClient
	Models    pb.ModelServiceClient
	Training  pb.TrainingServiceClient
	Stats     pb.StatsServiceClient
	Ensembles pb.EnsembleServiceClient
	Admin     pb.AdminServiceClient

	conn *grpc.ClientConn
}

// Connect makes a client of the server at an address such as "127.0.0.1:50051". Nothing is sent before the first call.
func Connect(address string, options Options) (*Client, error) {
	policy := newPolicy(options)
	security := insecure.NewCredentials()
	if options.TLS != nil {
		security = credentials.NewTLS(options.TLS)
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(security),
		grpc.WithUnaryInterceptor(policy.unary),
		grpc.WithStreamInterceptor(policy.stream),
		grpc.WithDisableRetry(), // ours know the reasons
		// Answers are as large as the caller asked for; the server bounds what it takes, and says so.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)),
	}
	conn, err := grpc.NewClient(address, append(dial, options.Dial...)...)
	if err != nil {
		return nil, fmt.Errorf("understudy: connecting to %q: %w", address, err)
	}
	return &Client{
		Inference: pb.NewInferenceServiceClient(conn),
		Feedback:  pb.NewFeedbackServiceClient(conn),
		Skills:    pb.NewSkillServiceClient(conn),
		Models:    pb.NewModelServiceClient(conn),
		Training:  pb.NewTrainingServiceClient(conn),
		Stats:     pb.NewStatsServiceClient(conn),
		Ensembles: pb.NewEnsembleServiceClient(conn),
		Admin:     pb.NewAdminServiceClient(conn),
		conn:      conn,
	}, nil
}

// Close ends the connection and the calls on it.
func (c *Client) Close() error { return c.conn.Close() }

// Embed gives a vector for each text, in order, by the server's default model. Where an item has none its error is returned; use
// Inference.Embed for models, sizes and the other items.
func (c *Client) Embed(ctx context.Context, texts ...string) ([][]float32, error) {
	response, err := c.Inference.Embed(ctx, &pb.EmbedRequest{Texts: texts})
	if err != nil {
		return nil, err
	}
	vectors := make([][]float32, len(response.Results))
	for i, result := range response.Results {
		if result.Error != nil {
			return nil, FromStatus(result.Error)
		}
		vectors[i] = result.Embedding
	}
	return vectors, nil
}

// Run asks a skill about texts: answers with their route, cost, quality and interaction id. Of an item that failed, Error is set.
func (c *Client) Run(ctx context.Context, skill string, texts ...string) ([]*pb.RunResult, error) {
	request := &pb.RunRequest{Skill: skill}
	for _, text := range texts {
		request.Inputs = append(request.Inputs, &pb.RunInput{Input: &pb.RunInput_Text{Text: text}})
	}
	response, err := c.Inference.Run(ctx, request)
	if err != nil {
		return nil, err
	}
	return response.Results, nil
}

// Generate gives an answer as it is written; all but Deltas is set in the last message alone. Leaving the loop ends the work. The error, if
// there is one, comes last.
func (c *Client) Generate(ctx context.Context, request *pb.GenerateRequest) iter.Seq2[*pb.GenerateResponse, error] {
	return func(yield func(*pb.GenerateResponse, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := c.Inference.Generate(ctx, request)
		if err != nil {
			yield(nil, err)
			return
		}
		for {
			response, err := stream.Recv()
			if ended(err) {
				return
			}
			if !yield(response, err) || err != nil {
				return
			}
		}
	}
}

// Say keeps feedback on an answer. It is kept once, however often it has to be sent.
func (c *Client) Say(ctx context.Context, feedback *pb.Feedback) (*pb.Feedback, error) {
	response, err := c.Feedback.CreateFeedback(ctx, &pb.CreateFeedbackRequest{Feedback: feedback, RequestId: rand.Text()})
	if err != nil {
		return nil, err
	}
	return response.Feedback, nil
}
