// Package web serves the console: the files that `make console` puts into dist, carried inside the program.
package web

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strings"
	"time"
)

//go:embed all:dist
var dist embed.FS

const (
	prefix = "/console/"
	// Everything comes from the gateway itself; nothing is inline, nothing may frame it.
	policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; " +
		"manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	// Smaller files do not get smaller.
	leastToCompress = 1024
)

// Pages of the console, by the first part of their path under /console/. A path that begins otherwise is no page.
var pages = map[string]bool{
	"skills": true, "interactions": true, "jobs": true, "models": true, "providers": true, "keys": true, "playground": true,
}

const withoutConsole = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Understudy</title></head>
<body><h1>Understudy</h1><p>This gateway was built without the console. Build both with <code>make console gateway</code>, then start it again.</p>
<p>The API is here all the same: see <a href="/docs">/docs</a>, <a href="/v1/status">/v1/status</a>, <a href="/healthz">/healthz</a>.</p></body></html>
`

// file is a built file as it is sent.
type file struct {
	plain, zipped []byte
	kind, etag    string
	cache         string
}

// Register serves the console at / and under /console/. Other paths stay the caller's.
func Register(mux *http.ServeMux) {
	built, err := fs.Sub(dist, "dist")
	if err != nil {
		panic(err) // the folder is embedded above
	}
	console := newSite(built)
	mux.Handle("GET /{$}", console)
	mux.Handle("GET "+prefix, console)
}

// site holds the files by their path under /console/, compressed once.
type site struct{ files map[string]*file }

func newSite(built fs.FS) *site {
	found := &site{files: map[string]*file{}}
	err := fs.WalkDir(built, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || strings.HasPrefix(entry.Name(), ".") {
			return err
		}
		data, err := fs.ReadFile(built, name)
		if err != nil {
			return err
		}
		found.files[name] = newFile(name, data)
		return nil
	})
	if err != nil {
		panic(fmt.Errorf("read the embedded console: %w", err))
	}
	return found
}

func newFile(name string, data []byte) *file {
	sum := sha256.Sum256(data)
	made := &file{plain: data, kind: mime.TypeByExtension(path.Ext(name)), etag: `"` + hex.EncodeToString(sum[:12]) + `"`, cache: "no-cache"}
	if strings.HasPrefix(name, "assets/") { // their names hold a hash of their content
		made.cache = "public, max-age=31536000, immutable"
	}
	if len(data) >= leastToCompress {
		var buffer bytes.Buffer
		writer, _ := gzip.NewWriterLevel(&buffer, gzip.BestCompression)
		_, _ = writer.Write(data) // a buffer takes everything
		_ = writer.Close()
		made.zipped = buffer.Bytes()
	}
	return made
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	header.Set("Content-Security-Policy", policy)
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	name := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, prefix), "/")
	first, _, _ := strings.Cut(name, "/")
	if name == "" || pages[first] {
		name = "index.html"
	}
	found := s.files[name]
	switch {
	case found != nil:
		found.serve(w, r)
	case len(s.files) == 0 && name == "index.html":
		header.Set("Content-Type", "text/html; charset=utf-8")
		header.Set("Cache-Control", "no-store")
		_, _ = w.Write([]byte(withoutConsole))
	default:
		header.Set("Cache-Control", "no-store")
		http.Error(w, "The console has no such page. It begins at /", http.StatusNotFound)
	}
}

func (f *file) serve(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	header.Set("Content-Type", f.kind)
	header.Set("Cache-Control", f.cache)
	data, etag := f.plain, f.etag
	if f.zipped != nil {
		header.Set("Vary", "Accept-Encoding")
		if takesGzip(r.Header.Get("Accept-Encoding")) {
			header.Set("Content-Encoding", "gzip")
			data, etag = f.zipped, strings.TrimSuffix(f.etag, `"`)+`-gzip"`
		}
	}
	header.Set("ETag", etag)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

// takesGzip tells whether an Accept-Encoding header allows gzip: named, and not with q=0.
func takesGzip(accept string) bool {
	for _, part := range strings.Split(accept, ",") {
		coding, weight, _ := strings.Cut(strings.TrimSpace(part), ";")
		if strings.EqualFold(strings.TrimSpace(coding), "gzip") {
			quality := strings.TrimPrefix(strings.ReplaceAll(weight, " ", ""), "q=")
			return weight == "" || strings.Trim(quality, "0.") != ""
		}
	}
	return false
}
