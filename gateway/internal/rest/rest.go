// Package rest serves every annotated RPC as JSON over HTTP: unary calls through grpc-gateway's generated handlers, server streams as lines of JSON.
package rest

import (
	"context"
	"fmt"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"understudy.dev/gateway/internal/forward"
	pb "understudy.dev/gateway/internal/pb"
	"understudy.dev/gateway/internal/wireerr"
	gen "understudy.dev/gen/understudy/v1"
)

// Options of the handler.
type Options struct {
	// HeaderDelay is how long a stream waits for its first message before its headers are sent.
	HeaderDelay time.Duration
	// Route is told the path pattern of each request, e.g. "/v1/{name=models/*}:load"; may be nil.
	Route func(ctx context.Context, pattern string)
}

// New is the handler of all services; conn may be any connection to the server.
func New(conn grpc.ClientConnInterface, options Options) (http.Handler, error) {
	if options.Route == nil {
		options.Route = func(context.Context, string) {}
	}
	mux := runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, Marshaler),
		runtime.WithIncomingHeaderMatcher(func(string) (string, bool) { return "", false }),
		runtime.WithOutgoingHeaderMatcher(outgoing),
		runtime.WithOutgoingTrailerMatcher(func(string) (string, bool) { return "", false }),
		runtime.WithMetadata(annotate),
		runtime.WithErrorHandler(onError),
		runtime.WithRoutingErrorHandler(onRoutingError),
		runtime.WithMiddlewares(tellRoute(options.Route)),
		runtime.WithDisablePathLengthFallback(),
		runtime.WithDisableHTTPMethodOverride(),
		runtime.WithUnescapingMode(runtime.UnescapingModeAllExceptReserved),
		runtime.WithWriteContentLength(),
	)
	if err := register(mux, conn); err != nil {
		return nil, err
	}
	if err := registerStreams(mux, conn, options); err != nil {
		return nil, err
	}
	return &handler{mux: mux}, nil
}

func register(mux *runtime.ServeMux, conn grpc.ClientConnInterface) error {
	ctx := context.Background()
	for _, err := range []error{
		pb.RegisterAdminServiceHandlerClient(ctx, mux, gen.NewAdminServiceClient(conn)),
		pb.RegisterEnsembleServiceHandlerClient(ctx, mux, gen.NewEnsembleServiceClient(conn)),
		pb.RegisterFeedbackServiceHandlerClient(ctx, mux, gen.NewFeedbackServiceClient(conn)),
		pb.RegisterInferenceServiceHandlerClient(ctx, mux, gen.NewInferenceServiceClient(conn)),
		pb.RegisterModelServiceHandlerClient(ctx, mux, gen.NewModelServiceClient(conn)),
		pb.RegisterSkillServiceHandlerClient(ctx, mux, gen.NewSkillServiceClient(conn)),
		pb.RegisterStatsServiceHandlerClient(ctx, mux, gen.NewStatsServiceClient(conn)),
		pb.RegisterTrainingServiceHandlerClient(ctx, mux, gen.NewTrainingServiceClient(conn)),
	} {
		if err != nil {
			return fmt.Errorf("registering REST handlers: %w", err)
		}
	}
	return nil
}

type handler struct{ mux *runtime.ServeMux }

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := checkType(r); err != nil {
		wireerr.Write(w, r, err)
		return
	}
	ctx, cancel, err := forward.Context(r)
	if err != nil {
		wireerr.Write(w, r, err)
		return
	}
	defer cancel()
	inner := r.WithContext(ctx)
	// Both are in the context by now; grpc-gateway would add them a second time.
	inner.Header = r.Header.Clone()
	inner.Header.Del("Authorization")
	inner.Header.Del("Grpc-Timeout")
	h.mux.ServeHTTP(w, inner)
}

// A body of another type than JSON is refused: it would be a mistake, or a form posted by a foreign page.
func checkType(r *http.Request) error {
	value := r.Header.Get("Content-Type")
	if value == "" || r.ContentLength == 0 {
		return nil
	}
	media, parameters, err := mime.ParseMediaType(value)
	if err == nil && (media == "application/json" || strings.HasSuffix(media, "+json")) {
		if charset := parameters["charset"]; charset == "" || strings.EqualFold(charset, "utf-8") {
			return nil
		}
	}
	return wireerr.New(http.StatusUnsupportedMediaType, codes.InvalidArgument, wireerr.UnsupportedMedia,
		"the body is not JSON by its header content-type.", "Send the header content-type: application/json.")
}

// grpc-gateway replaces the outgoing metadata by what this returns.
func annotate(ctx context.Context, _ *http.Request) metadata.MD {
	md, _ := metadata.FromOutgoingContext(ctx)
	return md
}

// Headers of the server that callers see; the others belong to gRPC.
func outgoing(name string) (string, bool) {
	if strings.HasPrefix(name, "x-understudy-") {
		return name, true
	}
	return "", false
}

func tellRoute(route func(context.Context, string)) runtime.Middleware {
	return func(next runtime.HandlerFunc) runtime.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request, params map[string]string) {
			if pattern, ok := runtime.HTTPPattern(r.Context()); ok {
				route(r.Context(), pattern.String())
			}
			next(w, r, params)
		}
	}
}

func onError(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, err error) {
	wireerr.Write(w, r, plain(err))
}

// plain takes out of a message that could not be read what belongs to the library; it varies its own spaces between builds.
func plain(err error) error {
	st, ok := status.FromError(err)
	if !ok || st.Code() != codes.InvalidArgument || len(st.Proto().GetDetails()) > 0 {
		return err
	}
	text := strings.TrimSpace(strings.TrimPrefix(strings.ReplaceAll(st.Message(), "\u00a0", " "), "proto:"))
	return status.Errorf(codes.InvalidArgument, "the request cannot be read: %s.", text)
}

func onRoutingError(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, code int) {
	switch code {
	case http.StatusMethodNotAllowed:
		methods := strings.Join(allowed(r.URL.Path), ", ")
		w.Header().Set("Allow", methods)
		wireerr.Write(w, r, wireerr.New(code, codes.Unimplemented, wireerr.MethodNotAllowed,
			"this path is not served with this method; expected "+methods+".", "The header allow names the methods of this path."))
	case http.StatusNotFound:
		wireerr.Write(w, r, wireerr.New(code, codes.NotFound, wireerr.RouteNotFound, "nothing is served on this path.", "/docs lists every path."))
	default:
		wireerr.Write(w, r, status.Error(codes.InvalidArgument, "the path cannot be read; expected segments separated by single slashes."))
	}
}
