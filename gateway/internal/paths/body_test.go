package paths

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"understudy.dev/gateway/internal/wireerr"
	pb "understudy.dev/gen/understudy/v1"
)

func TestParseBody(t *testing.T) {
	for text, want := range map[string]string{
		`{"maxCost": 1, "user": "a", "none": null}`: "",
		`{}`:                            "",
		``:                              "JSON object",
		`[]`:                            "JSON object",
		`{"a": 1`:                       "valid JSON",
		`{"a": 1} x`:                    "follows",
		`{"a": 1, "a": 2}`:              "twice",
		`{"maxCost": 1, "max_cost": 2}`: "twice",
	} {
		b, err := parseBody([]byte(text))
		if want == "" {
			if err != nil || b["none"] != nil || len(b) == 2 && b["max_cost"] == nil {
				t.Errorf("%s: %v, %v", text, b, err)
			}
			continue
		}
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestReadBodyTooLarge(t *testing.T) {
	r := httptest.NewRequest(http.MethodPost, "/task", strings.NewReader(`{"task": "`+strings.Repeat("a", 100)+`"}`))
	r.Body = http.MaxBytesReader(httptest.NewRecorder(), r.Body, 10)
	_, err := readBody(r)
	var refused *wireerr.Error
	if !errors.As(err, &refused) || refused.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("%v", err)
	}
}

func TestResource(t *testing.T) {
	for name, want := range map[string]string{
		"a": "models/a", "a@2": "models/a/versions/2", "models/a": "models/a", "models/a/versions/2": "models/a/versions/2",
	} {
		if got := resource(name); got != want {
			t.Errorf("resource(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestKindOf(t *testing.T) {
	for name, want := range map[string]pb.TrainingJobKind{
		"": pb.TrainingJobKind_TRAINING_JOB_KIND_UNSPECIFIED, "train": pb.TrainingJobKind_TRAINING_JOB_KIND_TRAIN,
		"Fine_Tune": pb.TrainingJobKind_TRAINING_JOB_KIND_FINETUNE, "fine-tune": pb.TrainingJobKind_TRAINING_JOB_KIND_FINETUNE,
		"TRAINING_JOB_KIND_ASSESS": pb.TrainingJobKind_TRAINING_JOB_KIND_ASSESS,
	} {
		if got, err := kindOf(name); err != nil || got != want {
			t.Errorf("kindOf(%q) = %v, %v, want %v", name, got, err, want)
		}
	}
	if _, err := kindOf("paint"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("kindOf(paint): %v", err)
	}
}

// Patterns that clash would stop the gateway where it starts.
func TestRegister(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/", http.NotFound)
	Register(mux, nil)
	for _, one := range routes {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest(http.MethodPatch, one.path, nil))
		if w.Code != http.StatusMethodNotAllowed || !strings.Contains(w.Header().Get("Allow"), one.method) {
			t.Errorf("PATCH %s: %d, allow %q", one.path, w.Code, w.Header().Get("Allow"))
		}
	}
}
