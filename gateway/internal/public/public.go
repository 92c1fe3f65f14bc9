// Package public keeps a gateway that others can reach from standing in front of a server that asks nobody for a key: a server on loopback
// asks for none by itself, since it cannot know who stands in front of it.
package public

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"understudy.dev/gateway/internal/wireerr"
	pb "understudy.dev/gen/understudy/v1"
)

// ErrNoKeys ends a gateway whose server asks for no keys.
var ErrNoKeys = errors.New("the server asks nobody for a key, and this gateway listens where others can reach it; " +
	"set auth.keys = \"required\" for the server and make a key (understudy keys create --role admin), listen on 127.0.0.1, " +
	"or say --allow-no-keys if something else in front checks callers")

const (
	askTimeout = 2 * time.Second
	soon       = 250 * time.Millisecond
	later      = 30 * time.Second
)

// Loopback says whether only this machine can reach what listens at address (host:port).
func Loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// Watch asks the server whether it asks for keys, and lets nobody through before that is known.
type Watch struct{ closed atomic.Bool }

// Run asks until ctx ends, soon while the answer is not known and now and then afterwards. It returns ErrNoKeys where no keys are asked for.
func (w *Watch) Run(ctx context.Context, conn grpc.ClientConnInterface) error {
	client := pb.NewAdminServiceClient(conn)
	for {
		asking, cancel := context.WithTimeout(ctx, askTimeout)
		found, err := client.GetCaller(asking, &pb.GetCallerRequest{})
		cancel()
		switch {
		case err == nil && !found.GetKeysRequired():
			w.closed.Store(false)
			return ErrNoKeys
		case err == nil || status.Code(err) == codes.Unauthenticated:
			w.closed.Store(true)
		}
		wait := later
		if !w.closed.Load() {
			wait = soon
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// Wrap answers 503 until it is known that the server asks for keys; the process's own health is told at any time.
func (w *Watch) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(response http.ResponseWriter, request *http.Request) {
		if w.closed.Load() || request.URL.Path == "/healthz" {
			next.ServeHTTP(response, request)
			return
		}
		unknown := wireerr.New(http.StatusServiceUnavailable, codes.Unavailable, wireerr.ServerNotReachable,
			"the gateway does not know yet whether the server asks for keys.", "Try again when the server runs.")
		unknown.RetryAfter = time.Second
		wireerr.Write(response, request, unknown)
	})
}
