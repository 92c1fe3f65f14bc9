// Package health answers /healthz (this process lives) and /readyz (it takes requests, and the server behind it serves).
package health

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

const (
	keep    = time.Second
	timeout = 2 * time.Second
)

// Checker asks the server at most once a second, however often it is asked itself.
type Checker struct {
	client   healthpb.HealthClient
	draining atomic.Bool
	mu       sync.Mutex // held while the server is asked, so that one question answers all who wait
	asked    time.Time
	state    string
}

// New checks the server behind conn.
func New(conn grpc.ClientConnInterface) *Checker {
	return &Checker{client: healthpb.NewHealthClient(conn)}
}

// Drain makes /readyz say 503 from now on.
func (c *Checker) Drain() { c.draining.Store(true) }

// Register adds both routes.
func (c *Checker) Register(mux *http.ServeMux) {
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		state := c.State(r.Context())
		if state == serving {
			answer(w, http.StatusOK, state)
			return
		}
		answer(w, http.StatusServiceUnavailable, state)
	})
}

const serving = "serving"

// State is "serving", "draining" (this gateway stops), "not_serving" (the server loads or drains) or "unreachable".
func (c *Checker) State(ctx context.Context) string {
	if c.draining.Load() {
		return "draining"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == "" || time.Since(c.asked) > keep {
		c.state, c.asked = c.ask(ctx), time.Now()
	}
	return c.state
}

func (c *Checker) ask(ctx context.Context) string {
	// Not the asker's own context: others wait for the same answer.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	response, err := c.client.Check(ctx, &healthpb.HealthCheckRequest{})
	switch {
	case err != nil:
		return "unreachable"
	case response.GetStatus() == healthpb.HealthCheckResponse_SERVING:
		return serving
	default:
		return "not_serving"
	}
}

func answer(w http.ResponseWriter, code int, state string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = fmt.Fprintf(w, "{\"status\":%q}\n", state)
}
