// Package forward makes a gRPC call's context of an HTTP request: the caller's key, request id, trace and deadline, and nothing else.
package forward

import (
	"context"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Longer than any call should take; larger numbers would overflow a Duration.
const maxTimeout = 24 * time.Hour

// Context returns a child of the request's context, which ends when the client leaves, with the outgoing metadata and the deadline. The error is a
// gRPC status for wireerr.Write: INVALID_ARGUMENT for a deadline that cannot be read.
func Context(r *http.Request) (context.Context, context.CancelFunc, error) {
	timeout, err := timeoutOf(r.Header)
	if err != nil {
		return nil, nil, err
	}
	ctx := metadata.NewOutgoingContext(r.Context(), Metadata(r))
	if timeout > 0 {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		return ctx, cancel, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	return ctx, cancel, nil
}

// Metadata returns what the server is told of the request: `authorization` (from Authorization, else x-api-key as a bearer), x-request-id,
// traceparent, tracestate and x-forwarded-for.
func Metadata(r *http.Request) metadata.MD {
	md := make(metadata.MD, 5)
	if key := credential(r.Header); key != "" && printable(key) {
		md.Set("authorization", key)
	}
	for _, name := range [...]string{"X-Request-Id", "Traceparent", "Tracestate"} {
		if value := r.Header.Get(name); value != "" && printable(value) {
			md.Set(strings.ToLower(name), value)
		}
	}
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		md.Set("x-forwarded-for", host)
	}
	return md
}

func credential(header http.Header) string {
	if value := header.Get("Authorization"); value != "" {
		return value
	}
	if key := header.Get("X-Api-Key"); key != "" {
		return "Bearer " + key
	}
	return ""
}

// gRPC takes printable ASCII alone, and fails the whole call on anything else.
func printable(text string) bool {
	for i := 0; i < len(text); i++ {
		if text[i] < 0x20 || text[i] > 0x7e {
			return false
		}
	}
	return true
}

func timeoutOf(header http.Header) (time.Duration, error) {
	if value := header.Get("Grpc-Timeout"); value != "" {
		return grpcTimeout(value)
	}
	if value := header.Get("X-Timeout-Ms"); value != "" {
		ms, err := strconv.ParseInt(value, 10, 64)
		if err != nil || ms <= 0 {
			return 0, status.Error(codes.InvalidArgument, "the header x-timeout-ms is not a whole number above 0; expected milliseconds, for example 1500.")
		}
		return min(time.Duration(min(ms, maxTimeout.Milliseconds()))*time.Millisecond, maxTimeout), nil
	}
	return 0, nil
}

var units = map[byte]time.Duration{
	'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond,
}

// At most eight digits and a unit, by gRPC's protocol.
func grpcTimeout(value string) (time.Duration, error) {
	unit, known := units[value[len(value)-1]]
	count, err := strconv.ParseUint(value[:len(value)-1], 10, 64)
	if !known || err != nil || len(value) > 9 || count == 0 {
		return 0, status.Error(codes.InvalidArgument, "the header grpc-timeout cannot be read; expected up to eight digits and a unit of H, M, S, m, u or n, for example 1500m.")
	}
	if count > uint64(maxTimeout/unit) {
		return maxTimeout, nil
	}
	return time.Duration(count) * unit, nil
}
