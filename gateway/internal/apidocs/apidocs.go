// Package apidocs serves the OpenAPI document at /openapi.json and a page to browse it at /docs. The page loads nothing from elsewhere and runs
// under a content security policy that allows its own files alone.
package apidocs

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strings"

	"google.golang.org/grpc/codes"

	"understudy.dev/gateway/internal/wireerr"
	"understudy.dev/gateway/openapi"
)

//go:embed page
var page embed.FS

const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; " +
	"form-action 'none'; frame-ancestors 'none'"

// file is what a path answers with, plain and compressed.
type file struct {
	contentType   string
	plain, packed []byte
	tag           string
}

// Register adds the routes: /openapi.json, /docs and the files of its page.
func Register(mux *http.ServeMux) {
	document := openapi.Document
	var compact bytes.Buffer
	if json.Compact(&compact, document) == nil {
		document = compact.Bytes()
	}
	mux.Handle("/openapi.json", packed("application/json", document))
	mux.Handle("/docs", embedded("page/docs.html", "text/html; charset=utf-8"))
	mux.Handle("/docs/docs.css", embedded("page/docs.css", "text/css; charset=utf-8"))
	mux.Handle("/docs/docs.js", embedded("page/docs.js", "text/javascript; charset=utf-8"))
	mux.Handle("/docs/{$}", http.RedirectHandler("/docs", http.StatusMovedPermanently))
}

func embedded(name, contentType string) *file {
	data, err := page.ReadFile(name)
	if err != nil {
		panic(err) // the compiler has put it there
	}
	return packed(contentType, data)
}

func packed(contentType string, data []byte) *file {
	var out bytes.Buffer
	writer, _ := gzip.NewWriterLevel(&out, gzip.BestCompression) // the level is known
	_, _ = writer.Write(data)                                    // a buffer takes everything
	_ = writer.Close()
	sum := sha256.Sum256(data)
	return &file{contentType, data, out.Bytes(), `"` + hex.EncodeToString(sum[:8]) + `"`}
}

func (f *file) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		wireerr.Write(w, r, wireerr.New(http.StatusMethodNotAllowed, codes.Unimplemented, wireerr.MethodNotAllowed, r.Method+" is not served here; expected GET.", "The header allow names the methods of this path."))
		return
	}
	h.Set("Content-Type", f.contentType)
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-cache") // asked again each time; the tag spares the rest
	h.Set("Vary", "Accept-Encoding")
	h.Set("ETag", f.tag)
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		h.Set("Content-Encoding", "gzip")
		h.Set("ETag", strings.TrimSuffix(f.tag, `"`)+`-gzip"`) // other bytes, another tag
	}
	if r.Header.Get("If-None-Match") == h.Get("ETag") {
		h.Del("Content-Encoding")
		w.WriteHeader(http.StatusNotModified)
		return
	}
	data := f.plain
	if h.Get("Content-Encoding") != "" {
		data = f.packed
	}
	if r.Method == http.MethodGet {
		_, _ = w.Write(data) // whoever left cannot be told
	}
}
