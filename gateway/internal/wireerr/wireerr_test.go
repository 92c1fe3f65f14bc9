package wireerr

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

func with(t *testing.T, code codes.Code, message string, details ...protoadapt.MessageV1) error {
	t.Helper()
	st, err := status.New(code, message).WithDetails(details...)
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestForm(t *testing.T) {
	info := &errdetails.ErrorInfo{Reason: "OVERLOADED", Domain: "understudy.dev", Metadata: map[string]string{"limit": "4"}}
	retry := &errdetails.RetryInfo{RetryDelay: durationpb.New(1200 * time.Millisecond)}
	err := with(t, codes.ResourceExhausted, "4 calls are running.", info, retry, &errdetails.RequestInfo{RequestId: "theirs"})
	w := httptest.NewRecorder()
	Write(w, httptest.NewRequest(http.MethodGet, "/", nil), err)
	if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "2" || w.Header().Get("Retry-After-Ms") != "1200" {
		t.Errorf("%d, headers %v", w.Code, w.Header())
	}
	var got map[string]map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]any{
		"code": 429.0, "status": "RESOURCE_EXHAUSTED", "reason": "OVERLOADED", "message": "4 calls are running.", "request_id": "theirs",
	} {
		if got["error"][key] != value {
			t.Errorf("%s is %v, want %v", key, got["error"][key], value)
		}
	}
	if got["error"]["help"] == "" || fmt.Sprint(got["error"]["metadata"]) != "map[limit:4]" {
		t.Errorf("got %v", got["error"])
	}
}

func TestFrom(t *testing.T) {
	for name, test := range map[string]struct {
		err    error
		code   int
		reason string
	}{
		"ours":              {New(http.StatusMethodNotAllowed, codes.Unimplemented, MethodNotAllowed, "m", "h"), 405, MethodNotAllowed},
		"ours, wrapped":     {fmt.Errorf("x: %w", New(413, codes.InvalidArgument, RequestTooLarge, "m", "h")), 413, RequestTooLarge},
		"too large":         {with(t, codes.InvalidArgument, "m", &errdetails.ErrorInfo{Reason: "REQUEST_TOO_LARGE"}), 413, RequestTooLarge},
		"left":              {context.Canceled, 499, "CANCELLED"},
		"late":              {fmt.Errorf("x: %w", context.DeadlineExceeded), 504, "DEADLINE_EXCEEDED"},
		"not reached":       {status.Error(codes.Unavailable, "dial tcp 10.0.0.1:5"), 503, ServerNotReachable},
		"draining":          {with(t, codes.Unavailable, "m", &errdetails.ErrorInfo{Reason: "DRAINING"}), 503, "DRAINING"},
		"a stranger's":      {errors.New("secret"), 500, "INTERNAL"},
		"no key":            {with(t, codes.Unauthenticated, "m", &errdetails.ErrorInfo{Reason: "UNAUTHENTICATED"}), 401, "UNAUTHENTICATED"},
		"unknown to google": {status.Error(codes.Code(99), "m"), 500, "UNKNOWN"},
	} {
		t.Run(name, func(t *testing.T) {
			e := From(test.err)
			if e.Code != test.code || e.Reason != test.reason || e.Help == "" || e.Message == "" {
				t.Errorf("got %+v, want %d %s", e, test.code, test.reason)
			}
			if e.Message == "secret" || e.Message == "dial tcp 10.0.0.1:5" {
				t.Errorf("the message %q tells too much", e.Message)
			}
		})
	}
}

func TestEveryCodeHasANameAndAStatus(t *testing.T) {
	for code := codes.OK; code <= codes.Unauthenticated; code++ {
		if Name(code) == "UNKNOWN" && code != codes.Unknown {
			t.Errorf("%v has no name", code)
		}
		if HTTPStatus(code) == http.StatusInternalServerError && code != codes.Unknown && code != codes.Internal && code != codes.DataLoss {
			t.Errorf("%v has no status", code)
		}
	}
}
