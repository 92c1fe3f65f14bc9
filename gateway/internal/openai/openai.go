// Package openai serves OpenAI's HTTP API, so that any client of it works by its base URL alone: chat completions, completions, embeddings
// and models, and reranking in the form that Cohere and Jina share.
//
// A request is read (chat.go, completions.go, ...), its model found (target.go), asked by gRPC, and the answer written whole (whole.go) or as
// server-sent events (stream.go, chunks.go). How an answer came about goes into headers and the field "understudy" (story.go).
package openai

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"google.golang.org/grpc"

	pb "understudy.dev/gen/understudy/v1"
)

// Deps are what the package needs of the gateway.
type Deps struct {
	// Context makes the context of the calls that a request leads to: credentials, request id, deadline. An error is a gRPC status, and
	// refuses the request. Nil: the request's own context.
	Context func(*http.Request) (context.Context, context.CancelFunc, error)
	// REST answers GET requests below /v1/models/ that are the REST API's and not OpenAI's. Nil: they are not found.
	REST http.Handler
	// Log takes what only an operator can mend. Nil: the default logger.
	Log *slog.Logger
}

type server struct {
	conn      grpc.ClientConnInterface
	inference pb.InferenceServiceClient
	models    pb.ModelServiceClient
	targets   *targets
	deps      Deps
	now       func() time.Time
}

// Register adds the routes. They are the same for every method; what is no method of a route is refused in OpenAI's form.
func Register(mux *http.ServeMux, conn grpc.ClientConnInterface, deps Deps) {
	if deps.Log == nil {
		deps.Log = slog.Default()
	}
	if deps.Context == nil {
		deps.Context = func(r *http.Request) (context.Context, context.CancelFunc, error) {
			ctx, cancel := context.WithCancel(r.Context())
			return ctx, cancel, nil
		}
	}
	skills := pb.NewSkillServiceClient(conn)
	s := &server{
		conn:      conn,
		inference: pb.NewInferenceServiceClient(conn),
		models:    pb.NewModelServiceClient(conn),
		targets:   newTargets(skills),
		deps:      deps,
		now:       time.Now,
	}
	mux.Handle("/v1/chat/completions", s.post(s.chat))
	mux.Handle("/v1/completions", s.post(s.completions))
	mux.Handle("/v1/embeddings", s.post(s.embeddings))
	mux.Handle("/v1/rerank", s.post(s.rerank))
	mux.Handle("/v2/rerank", s.post(s.rerank))
	mux.Handle("GET /v1/models", s.handle(s.listModels))
	mux.Handle("GET /v1/models/{id...}", s.handle(s.getModel))
}

// handler answers a request, or says why not.
type handler func(ctx context.Context, w http.ResponseWriter, r *http.Request) error

func (s *server) post(answer handler) http.Handler {
	inner := s.handle(answer)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.Header().Set("Allow", http.MethodPost)
			writeError(w, &apiError{
				status: http.StatusMethodNotAllowed, kind: invalidRequest, code: "method_not_supported",
				message: r.Method + " is not what " + r.URL.Path + " takes; expected POST.",
			})
			return
		}
		inner.ServeHTTP(w, r)
	})
}

func (s *server) handle(answer handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel, err := s.deps.Context(r)
		if err != nil {
			writeError(w, errorOf(err))
			return
		}
		defer cancel()
		if err := answer(ctx, w, r); err != nil {
			writeError(w, errorOf(err))
		}
	})
}
