package forward

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func request(headers map[string]string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/v1/status", nil)
	for name, value := range headers {
		r.Header.Set(name, value)
	}
	return r
}

func TestMetadataIsTheCallersKeyIDAndTraceAlone(t *testing.T) {
	for name, test := range map[string]struct {
		headers map[string]string
		want    map[string]string
	}{
		"bearer":         {map[string]string{"Authorization": "Bearer a"}, map[string]string{"authorization": "Bearer a"}},
		"x-api-key":      {map[string]string{"X-Api-Key": "a"}, map[string]string{"authorization": "Bearer a"}},
		"both":           {map[string]string{"Authorization": "Bearer a", "X-Api-Key": "b"}, map[string]string{"authorization": "Bearer a"}},
		"id and trace":   {map[string]string{"X-Request-Id": "i", "Traceparent": "t"}, map[string]string{"x-request-id": "i", "traceparent": "t"}},
		"not printable":  {map[string]string{"Authorization": "Bearer \xff", "X-Request-Id": "\x01"}, nil},
		"anything else":  {map[string]string{"Cookie": "c", "Grpc-Metadata-Authorization": "x", "X-Forwarded-For": "9.9.9.9"}, nil},
		"nothing at all": {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := Metadata(request(test.headers))
			got.Delete("x-forwarded-for")
			if len(got) != len(test.want) {
				t.Fatalf("got %v, want %v", got, test.want)
			}
			for key, value := range test.want {
				if values := got.Get(key); len(values) != 1 || values[0] != value {
					t.Errorf("%s: got %q, want %q", key, values, value)
				}
			}
		})
	}
	if got := Metadata(request(map[string]string{"X-Forwarded-For": "9.9.9.9"})).Get("x-forwarded-for"); len(got) != 1 || got[0] != "192.0.2.1" {
		t.Errorf("x-forwarded-for is %v; expected the peer's address alone", got)
	}
}

func TestDeadlines(t *testing.T) {
	for name, test := range map[string]struct {
		header, value string
		want          time.Duration // 0: refused
	}{
		"seconds":       {"Grpc-Timeout", "2S", 2 * time.Second},
		"milliseconds":  {"Grpc-Timeout", "1500m", 1500 * time.Millisecond},
		"hours":         {"Grpc-Timeout", "1H", time.Hour},
		"capped":        {"Grpc-Timeout", "99999999H", maxTimeout},
		"our own":       {"X-Timeout-Ms", "250", 250 * time.Millisecond},
		"our own, cap":  {"X-Timeout-Ms", "9223372036854775807", maxTimeout},
		"no unit":       {"Grpc-Timeout", "5", 0},
		"no digits":     {"Grpc-Timeout", "S", 0},
		"nine digits":   {"Grpc-Timeout", "123456789S", 0},
		"signed":        {"Grpc-Timeout", "-1S", 0},
		"zero":          {"Grpc-Timeout", "0S", 0},
		"fraction":      {"X-Timeout-Ms", "1.5", 0},
		"negative":      {"X-Timeout-Ms", "-1", 0},
		"not in 64 bit": {"X-Timeout-Ms", "9223372036854775808", 0},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel, err := Context(request(map[string]string{test.header: test.value}))
			if test.want == 0 {
				if status.Code(err) != codes.InvalidArgument {
					t.Fatalf("got %v, want INVALID_ARGUMENT", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer cancel()
			deadline, _ := ctx.Deadline()
			if left := time.Until(deadline); left > test.want || left < test.want-time.Minute {
				t.Errorf("%s left, want %s", left, test.want)
			}
		})
	}
}

func TestWithoutADeadlineThereIsNone(t *testing.T) {
	ctx, cancel, err := Context(request(map[string]string{"Authorization": "Bearer a"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, has := ctx.Deadline(); has {
		t.Error("a deadline that nobody gave")
	}
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get("authorization")) != 1 {
		t.Errorf("outgoing metadata is %v", md)
	}
	cancel()
	if ctx.Err() == nil {
		t.Error("cancel does not end it")
	}
}
