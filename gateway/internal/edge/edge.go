// Package edge is what stands around every request: its id, limits, timeouts, CORS, access line, metrics, and the one form of its errors.
package edge

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"net/http"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"understudy.dev/gateway/internal/config"
	"understudy.dev/gateway/internal/metrics"
	"understudy.dev/gateway/internal/wireerr"
)

const requestIDHeader = "X-Request-Id"

// Edge wraps the routes. It is safe for concurrent use.
type Edge struct {
	// Gate says why a request may not pass, whatever it asks for; nil: all may. To be set before the first.
	Gate     func(*http.Request) error
	routes   *http.ServeMux
	config   config.Config
	metrics  *metrics.Metrics
	log      *slog.Logger
	cors     *cors
	prefix   string
	count    atomic.Uint64
	running  atomic.Int64 // requests but those of health checks
	refusing atomic.Bool
	idle     sync.Cond // told whenever `running` falls to 0
}

// New wraps routes. log takes the access lines, where the configuration asks for them, and what only an operator can mend.
func New(routes *http.ServeMux, c config.Config, m *metrics.Metrics, log *slog.Logger) (*Edge, error) {
	random := make([]byte, 6)
	_, _ = rand.Read(random) // never fails
	pages, err := newCORS(c.CORSOrigins)
	if err != nil {
		return nil, err
	}
	return &Edge{
		routes: routes, config: c, metrics: m, log: log, cors: pages, prefix: hex.EncodeToString(random) + "-",
		idle: sync.Cond{L: &sync.Mutex{}},
	}, nil
}

// story is what is known of a request at its end.
type story struct{ route string }

type storyKey struct{}

// SetRoute names the pattern of the request of ctx, where it is finer than the one in the routes.
func SetRoute(ctx context.Context, pattern string) {
	if s, ok := ctx.Value(storyKey{}).(*story); ok {
		s.route = pattern
	}
}

// Refuse answers new requests with 503 from now on; those that run go on.
func (e *Edge) Refuse() { e.refusing.Store(true) }

// WaitIdle returns true when no request runs, false when ctx ends before that.
func (e *Edge) WaitIdle(ctx context.Context) bool {
	stop := context.AfterFunc(ctx, func() {
		e.idle.L.Lock()
		defer e.idle.L.Unlock()
		e.idle.Broadcast()
	})
	defer stop()
	e.idle.L.Lock()
	defer e.idle.L.Unlock()
	for e.running.Load() > 0 && ctx.Err() == nil {
		e.idle.Wait()
	}
	return e.running.Load() == 0
}

// ServeHTTP is http.Handler's.
func (e *Edge) ServeHTTP(inner http.ResponseWriter, r *http.Request) {
	began := time.Now()
	w := newWriter(inner, e.config.WriteTimeout, e.metrics)
	id := e.requestID(r.Header.Get(requestIDHeader))
	r.Header.Set(requestIDHeader, id)
	w.Header().Set(requestIDHeader, id)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	s := &story{}
	path := r.URL.Path
	r = r.WithContext(context.WithValue(r.Context(), storyKey{}, s))
	e.metrics.InFlight.Inc()
	received := int64(0)
	defer func() {
		e.metrics.InFlight.Dec()
		failure := recover()
		if failure != nil {
			e.recovered(w, r, failure)
		}
		w.end()
		if s.route == "" {
			s.route = withoutMethod(r.Pattern)
		}
		took := time.Since(began)
		e.metrics.Observe(s.route, r.Method, w.status(), took, received, w.bytes)
		if e.config.AccessLog {
			e.access(r, id, path, s.route, w, took)
		}
		if failure != nil && w.code != 0 && failure != http.ErrAbortHandler && w.broken {
			panic(http.ErrAbortHandler) // the answer had begun: whoever reads it must see that it is not whole
		}
		if failure == http.ErrAbortHandler {
			panic(failure)
		}
	}()
	received = e.serve(w, r)
}

// serve answers; it returns the bytes of the body.
func (e *Edge) serve(w *writer, r *http.Request) int64 {
	if r.ContentLength != 0 {
		// Before anything else: net/http reads on in the body of a request that was refused. An error is one of the connection, which reading meets.
		_ = w.control.SetReadDeadline(time.Now().Add(e.config.BodyTimeout))
	}
	probe := r.URL.Path == "/healthz" || r.URL.Path == "/readyz"
	if err := e.admit(w, r, probe); err != nil {
		wireerr.Write(w, r, err)
		return 0
	}
	if !probe {
		defer e.leave()
	}
	if e.Gate != nil {
		if err := e.Gate(r); err != nil {
			wireerr.Write(w, r, err)
			return 0
		}
	}
	if e.cors.handle(w, r) {
		return 0
	}
	if err := e.cors.check(r); err != nil {
		wireerr.Write(w, r, err)
		return 0
	}
	received, err := e.readBody(w, r)
	if err != nil {
		w.Header().Set("Connection", "close") // what is left of the body is not read
		wireerr.Write(w, r, err)
		return received
	}
	if e.config.CallTimeout > 0 && r.Header.Get("Grpc-Timeout") == "" && r.Header.Get("X-Timeout-Ms") == "" {
		r.Header.Set("X-Timeout-Ms", strconv.FormatInt(e.config.CallTimeout.Milliseconds(), 10))
	}
	e.route(w, r)
	return received
}

func (e *Edge) admit(w http.ResponseWriter, r *http.Request, probe bool) error {
	if err := checkTarget(r); err != nil {
		return err
	}
	if probe {
		return nil
	}
	running := e.running.Add(1)
	if e.refusing.Load() {
		e.leave()
		w.Header().Set("Connection", "close")
		return Draining()
	}
	if running > int64(e.config.MaxRequests) {
		e.leave()
		refused := wireerr.New(http.StatusServiceUnavailable, codes.ResourceExhausted, wireerr.GatewayOverloaded,
			"the gateway runs as many requests as it may.", "Call again after the delay in the header retry-after.")
		refused.RetryAfter = time.Second
		return refused
	}
	return nil
}

func (e *Edge) leave() {
	if e.running.Add(-1) == 0 && e.refusing.Load() {
		e.idle.L.Lock()
		defer e.idle.L.Unlock()
		e.idle.Broadcast()
	}
}

// Draining is the error of requests that come while the gateway stops, and of those that it ends.
func Draining() *wireerr.Error {
	refused := wireerr.New(http.StatusServiceUnavailable, codes.Unavailable, "DRAINING",
		"the gateway is stopping.", "Call another replica, or again after the delay in the header retry-after.")
	refused.RetryAfter = time.Second
	return refused
}

// route calls the handler, or says in our own form that there is none.
func (e *Edge) route(w http.ResponseWriter, r *http.Request) {
	handler, pattern := e.routes.Handler(r)
	if pattern != "" {
		e.routes.ServeHTTP(w, r)
		return
	}
	probe := &recorder{header: http.Header{}}
	handler.ServeHTTP(probe, r)
	if probe.code == http.StatusMethodNotAllowed {
		allow := probe.header.Get("Allow")
		w.Header().Set("Allow", allow)
		wireerr.Write(w, r, wireerr.New(http.StatusMethodNotAllowed, codes.Unimplemented, wireerr.MethodNotAllowed,
			"this path is not served with this method; expected "+allow+".", "The header allow names the methods of this path."))
		return
	}
	wireerr.Write(w, r, wireerr.New(http.StatusNotFound, codes.NotFound, wireerr.RouteNotFound,
		"nothing is served on this path.", "/docs lists every path."))
}

// recorder learns what net/http would answer where no pattern matches.
type recorder struct {
	header http.Header
	code   int
}

func (r *recorder) Header() http.Header            { return r.header }
func (r *recorder) WriteHeader(code int)           { r.code = code }
func (r *recorder) Write(data []byte) (int, error) { return len(data), nil }

func (e *Edge) recovered(w *writer, r *http.Request, failure any) {
	if failure == http.ErrAbortHandler {
		return
	}
	e.log.Error("panic", "request_id", w.Header().Get(requestIDHeader), "error", failure, "stack", string(debug.Stack()))
	if w.code == 0 {
		wireerr.Write(w, r, wireerr.New(http.StatusInternalServerError, codes.Internal, "INTERNAL",
			"the gateway failed on this request.", "The gateway's log has the cause under the request id."))
		return
	}
	w.broken = true
}

var goodID = regexp.MustCompile(`^[A-Za-z0-9._:/+=-]{1,128}$`)

func (e *Edge) requestID(given string) string {
	if goodID.MatchString(given) {
		return given
	}
	return e.prefix + strconv.FormatUint(e.count.Add(1), 16)
}

var secret = regexp.MustCompile(`(und_[A-Za-z0-9]*|sk-)[A-Za-z0-9_-]*`)

const longestPath = 200

func (e *Edge) access(r *http.Request, id, path, route string, w *writer, took time.Duration) {
	if len(path) > longestPath {
		path = path[:longestPath] + "..."
	}
	e.log.LogAttrs(context.Background(), slog.LevelInfo, "request",
		slog.String("request_id", id),
		slog.String("method", r.Method),
		slog.String("route", route),
		slog.String("path", secret.ReplaceAllString(path, "$1***")), // never the query: callers put keys there
		slog.Int("status", w.status()),
		slog.Float64("ms", float64(took.Microseconds())/1000),
		slog.Int64("bytes", w.bytes),
		slog.Bool("stream", w.streaming),
		slog.String("remote", r.RemoteAddr),
	)
}

func withoutMethod(pattern string) string {
	if _, path, found := strings.Cut(pattern, " "); found {
		return path
	}
	return pattern
}
