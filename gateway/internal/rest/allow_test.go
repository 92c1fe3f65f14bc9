package rest

import (
	"slices"
	"testing"
)

func TestAllowed(t *testing.T) {
	for path, want := range map[string][]string{
		"/v1/status":                      {"GET"},
		"/v1/trainingJobs":                {"GET", "POST"},
		"/v1/skills/a/schedule":           {"DELETE", "PUT"},
		"/v1/models/a/versions/1":         {"DELETE", "GET"},
		"/v1/models/a:load":               {"POST"},
		"/v1/skills/a:holdRollout":        {"POST"},
		"/v1/models/a/adapters/b:unload":  {"POST"},
		"/v1/inference:embed":             {"POST"},
		"/v1/models/a/b/versions/1/other": nil,
		"/v1/absent":                      nil,
	} {
		if got := allowed(path); !slices.Equal(got, want) {
			t.Errorf("allowed(%q) = %v, want %v", path, got, want)
		}
	}
}
