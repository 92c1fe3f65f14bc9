package apidocs

import (
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestFileIsServedPlainPackedAndNotAgain(t *testing.T) {
	served := packed("text/plain", []byte("words"))
	ask := func(method string, headers ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, "/x", nil)
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		w := httptest.NewRecorder()
		served.ServeHTTP(w, r)
		return w
	}
	plain := ask(http.MethodGet)
	if plain.Body.String() != "words" || plain.Header().Get("Content-Security-Policy") != policy {
		t.Errorf("plain: %q, %v", plain.Body, plain.Header())
	}
	small := ask(http.MethodGet, "Accept-Encoding", "gzip")
	reader, err := gzip.NewReader(small.Body)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := io.ReadAll(reader); err != nil || string(data) != "words" {
		t.Errorf("packed: %q, %v", data, err)
	}
	if small.Header().Get("ETag") == plain.Header().Get("ETag") {
		t.Error("two encodings have one tag")
	}
	if again := ask(http.MethodGet, "If-None-Match", plain.Header().Get("ETag")); again.Code != http.StatusNotModified || again.Body.Len() > 0 {
		t.Errorf("again: %d", again.Code)
	}
	if refused := ask(http.MethodPost); refused.Code != http.StatusMethodNotAllowed || refused.Header().Get("Allow") == "" {
		t.Errorf("POST: %d", refused.Code)
	}
}
