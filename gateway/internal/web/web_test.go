package web

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/fstest"
)

var script = strings.Repeat("console.log('x');\n", 200)

var built = fstest.MapFS{
	".gitkeep":           {},
	"index.html":         {Data: []byte("<!doctype html><title>console</title>" + strings.Repeat(" ", 2000))},
	"favicon.svg":        {Data: []byte("<svg/>")},
	"assets/app-1234.js": {Data: []byte(script)},
}

func get(t *testing.T, handler http.Handler, path string, headers ...string) *http.Response {
	t.Helper()
	request := httptest.NewRequest(http.MethodGet, path, nil)
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	recorder := httptest.NewRecorder()
	handler.ServeHTTP(recorder, request)
	return recorder.Result()
}

func TestPagesFilesAndNothingElse(t *testing.T) {
	handler := newSite(built)
	for _, one := range []struct {
		path         string
		status       int
		kind, cached string
	}{
		{"/", 200, "text/html; charset=utf-8", "no-cache"},
		{"/console/", 200, "text/html; charset=utf-8", "no-cache"},
		{"/console/skills", 200, "text/html; charset=utf-8", "no-cache"},
		{"/console/interactions/0f3a", 200, "text/html; charset=utf-8", "no-cache"},
		{"/console/favicon.svg", 200, "image/svg+xml", "no-cache"},
		{"/console/assets/app-1234.js", 200, "text/javascript; charset=utf-8", "public, max-age=31536000, immutable"},
		{"/console/assets/app-old.js", 404, "text/plain; charset=utf-8", "no-store"},
		{"/console/nothing", 404, "text/plain; charset=utf-8", "no-store"},
		{"/console/.gitkeep", 404, "text/plain; charset=utf-8", "no-store"},
		{"/console/../web.go", 404, "text/plain; charset=utf-8", "no-store"},
	} {
		answer := get(t, handler, one.path)
		if answer.StatusCode != one.status || answer.Header.Get("Content-Type") != one.kind || answer.Header.Get("Cache-Control") != one.cached {
			t.Errorf("%s: %d %q %q", one.path, answer.StatusCode, answer.Header.Get("Content-Type"), answer.Header.Get("Cache-Control"))
		}
		policy := answer.Header.Get("Content-Security-Policy")
		if !strings.Contains(policy, "default-src 'none'") || strings.Contains(policy, "unsafe") {
			t.Errorf("%s: policy %q", one.path, policy)
		}
	}
}

func TestCompressedAndKnownByItsETag(t *testing.T) {
	handler := newSite(built)
	answer := get(t, handler, "/console/assets/app-1234.js", "Accept-Encoding", "br, gzip;q=0.8")
	if answer.Header.Get("Content-Encoding") != "gzip" || answer.Header.Get("Vary") != "Accept-Encoding" {
		t.Fatalf("headers %v", answer.Header)
	}
	body, _ := io.ReadAll(answer.Body)
	reader, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if plain, _ := io.ReadAll(reader); string(plain) != script {
		t.Error("another script came out of it")
	}
	again := get(t, handler, "/console/assets/app-1234.js", "Accept-Encoding", "gzip", "If-None-Match", answer.Header.Get("ETag"))
	if again.StatusCode != http.StatusNotModified {
		t.Errorf("status %d", again.StatusCode)
	}
	plain := get(t, handler, "/console/assets/app-1234.js", "Accept-Encoding", "gzip;q=0", "If-None-Match", answer.Header.Get("ETag"))
	if plain.StatusCode != http.StatusOK || plain.Header.Get("Content-Encoding") != "" {
		t.Errorf("status %d, %q", plain.StatusCode, plain.Header.Get("Content-Encoding"))
	}
}

func TestWithoutAConsoleThePageSaysHowToGetOne(t *testing.T) {
	handler := newSite(fstest.MapFS{".gitkeep": {}})
	for _, path := range []string{"/", "/console/jobs"} {
		answer := get(t, handler, path)
		body, _ := io.ReadAll(answer.Body)
		if answer.StatusCode != http.StatusOK || !strings.Contains(string(body), "make console gateway") {
			t.Errorf("%s: %d %s", path, answer.StatusCode, body)
		}
	}
	if answer := get(t, handler, "/console/assets/app-1234.js"); answer.StatusCode != http.StatusNotFound {
		t.Errorf("status %d", answer.StatusCode)
	}
}

func TestRegisterLeavesOtherPathsAlone(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	Register(mux)
	for path, status := range map[string]int{"/": 200, "/console/skills": 200, "/models": 418, "/v1/status": 418, "/console": 307} {
		if answer := get(t, mux, path); answer.StatusCode != status {
			t.Errorf("%s: %d, expected %d", path, answer.StatusCode, status)
		}
	}
}
