// Package public keeps a gateway that others can reach from standing in front of a server that asks nobody for a key: a server on loopback
// asks for none by itself, since it cannot know who stands in front of it. Others are also the pages that a browser of this machine shows:
// a page whose name comes to mean 127.0.0.1 (DNS rebinding) is to its browser of one origin with a gateway there.
package public

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
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
type Watch struct {
	// Loopback: only this machine can connect. It may without keys, under this machine's own names.
	Loopback bool
	// Hosts are names besides that a gateway on loopback is called by, a proxy's for example.
	Hosts []string
	state atomic.Int32
}

const (
	unknown int32 = iota
	noKeys
	keys
)

// Run asks until ctx ends, soon while the answer is not known and now and then afterwards. It returns ErrNoKeys where no keys are asked for
// and others than this machine can connect.
func (w *Watch) Run(ctx context.Context, conn grpc.ClientConnInterface) error {
	client := pb.NewAdminServiceClient(conn)
	for {
		asking, cancel := context.WithTimeout(ctx, askTimeout)
		found, err := client.GetCaller(asking, &pb.GetCallerRequest{})
		cancel()
		switch {
		case err == nil && !found.GetKeysRequired():
			w.state.Store(noKeys)
			if !w.Loopback {
				return ErrNoKeys
			}
		case err == nil || status.Code(err) == codes.Unauthenticated:
			w.state.Store(keys)
		}
		wait := later
		if w.state.Load() == unknown {
			wait = soon
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// Check is nil where a request may pass: 503 until it is known that the server asks for keys, and 421 where it does not and the caller
// names a host that is not this machine. The process's own health is told at any time.
func (w *Watch) Check(r *http.Request) error {
	state := w.state.Load()
	if state == keys || r.URL.Path == "/healthz" || w.Loopback && w.own(r.Host) {
		return nil
	}
	if w.Loopback && state == noKeys {
		return wireerr.New(http.StatusMisdirectedRequest, codes.PermissionDenied, wireerr.HostNotKnown,
			"the server asks for no keys, so the gateway answers under this machine's own names alone, and the header host says another.",
			"Call 127.0.0.1 or localhost, name the host in --hosts, or set auth.keys = \"required\" for the server.")
	}
	early := wireerr.New(http.StatusServiceUnavailable, codes.Unavailable, wireerr.ServerNotReachable,
		"the gateway does not know yet whether the server asks for keys.", "Try again when the server runs.")
	early.RetryAfter = time.Second
	return early
}

// own says whether host (a name or an address, with a port or without) can only have been meant for this machine. No page's name is an
// address, so that every address is.
func (w *Watch) own(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
	return host == "" || host == "localhost" || strings.HasSuffix(host, ".localhost") || net.ParseIP(host) != nil ||
		slices.ContainsFunc(w.Hosts, func(known string) bool { return strings.EqualFold(known, host) })
}
