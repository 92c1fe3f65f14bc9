package public

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"understudy.dev/gateway/internal/wireerr"
	pb "understudy.dev/gen/understudy/v1"
)

func TestLoopback(t *testing.T) {
	for address, want := range map[string]bool{
		"127.0.0.1:8080": true, "127.9.9.9:1": true, "[::1]:8080": true, "localhost:80": true,
		"0.0.0.0:8080": false, ":8080": false, "[::]:80": false, "10.0.0.1:80": false, "example.org:80": false, "nonsense": false,
	} {
		if got := Loopback(address); got != want {
			t.Errorf("Loopback(%q) = %v", address, got)
		}
	}
}

// answers stands for a connection on which GetCaller answers so.
type answers struct {
	grpc.ClientConnInterface
	keys bool
	err  error
	then func()
}

func (a answers) Invoke(_ context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
	defer a.then()
	reply.(*pb.GetCallerResponse).KeysRequired = a.keys
	return a.err
}

func TestOpenServerEndsIt(t *testing.T) {
	var w Watch
	if err := w.Run(context.Background(), answers{then: func() {}}); !errors.Is(err, ErrNoKeys) {
		t.Fatalf("got %v", err)
	}
	if code := ask(&w, "/v1/status"); code != http.StatusServiceUnavailable {
		t.Errorf("answered %d", code)
	}
}

func TestNobodyPassesBeforeItIsKnown(t *testing.T) {
	for _, err := range []error{nil, status.Error(codes.Unauthenticated, "no key"), status.Error(codes.Unavailable, "not there")} {
		var w Watch
		ctx, cancel := context.WithCancel(context.Background())
		if got := w.Run(ctx, answers{keys: true, err: err, then: cancel}); got != nil {
			t.Fatal(got)
		}
		want := http.StatusOK
		if status.Code(err) == codes.Unavailable {
			want = http.StatusServiceUnavailable
		}
		if code := ask(&w, "/v1/status"); code != want {
			t.Errorf("%v: answered %d", err, code)
		}
		if code := ask(&w, "/healthz"); code != http.StatusOK {
			t.Errorf("%v: /healthz answered %d", err, code)
		}
	}
}

func ask(w *Watch, path string) int { return askAs(w, "example.com", path) }

func askAs(w *Watch, host, path string) int {
	request := httptest.NewRequest(http.MethodGet, path, nil)
	request.Host = host
	if err := w.Check(request); err != nil {
		return wireerr.From(err).Code
	}
	return http.StatusOK
}
