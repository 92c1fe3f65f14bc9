package understudy

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	pb "understudy.dev/gen/understudy/v1"
)

const requestIDKey = "x-request-id"

// What stands around every call.
type policy struct {
	timeout  time.Duration
	attempts int
	metadata []string
}

func newPolicy(options Options) *policy {
	p := &policy{timeout: options.Timeout, attempts: options.Attempts}
	if p.timeout == 0 {
		p.timeout = defaultTimeout
	}
	if p.attempts == 0 {
		p.attempts = defaultAttempts
	}
	for key, value := range options.Metadata {
		p.metadata = append(p.metadata, key, value)
	}
	if options.APIKey != "" {
		p.metadata = append(p.metadata, "authorization", "Bearer "+options.APIKey)
	}
	return p
}

// The call's metadata, and the default deadline where it has none; endless calls get none.
func (p *policy) context(ctx context.Context, endless bool) (context.Context, context.CancelFunc) {
	ctx = metadata.AppendToOutgoingContext(ctx, p.metadata...)
	if _, ok := ctx.Deadline(); ok || endless {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, p.timeout)
}

func (p *policy) unary(
	ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	ctx, cancel := p.context(ctx, false)
	defer cancel()
	for attempt := 1; ; attempt++ {
		var header metadata.MD
		err := fromError(invoke(ctx, method, request, reply, conn, append(options, grpc.Header(&header))...), "")
		own, ok := errors.AsType[*Error](err)
		if !ok {
			return err
		}
		if id := header.Get(requestIDKey); own.RequestID == "" && len(id) > 0 {
			own.RequestID = id[0]
		}
		// Spread, so that those that were refused together do not come back together.
		wait := own.RetryAfter + rand.N(own.RetryAfter/4+1)
		if end, _ := ctx.Deadline(); !own.Retryable() || attempt >= p.attempts || time.Until(end) <= wait {
			return own
		}
		select {
		case <-ctx.Done():
			return fromError(ctx.Err(), own.RequestID)
		case <-time.After(wait):
		}
	}
}

func (p *policy) stream(
	ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	// Logs that are followed, and bulk runs, last as long as they last.
	ctx, cancel := p.context(ctx, method != pb.InferenceService_Generate_FullMethodName)
	inner, err := open(ctx, desc, conn, method, options...)
	if err != nil {
		cancel()
		return nil, fromError(err, "")
	}
	return &stream{ClientStream: inner, cancel: cancel}, nil
}

// A stream whose errors are ours.
type stream struct {
	grpc.ClientStream
	cancel context.CancelFunc
}

// SendMsg gives io.EOF where the stream has ended; RecvMsg then says why.
func (s *stream) SendMsg(message any) error { return fromError(s.ClientStream.SendMsg(message), "") }

func (s *stream) RecvMsg(message any) error {
	err := s.ClientStream.RecvMsg(message)
	if err != nil {
		s.cancel()
	}
	return fromError(err, "")
}
