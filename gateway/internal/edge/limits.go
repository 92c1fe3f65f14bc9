package edge

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"

	"understudy.dev/gateway/internal/wireerr"
)

// checkTarget refuses request targets that mean different things to different readers. Names with an escaped slash are let through: the
// decoded path is what is checked, and what is routed.
func checkTarget(r *http.Request) error {
	if !strings.HasPrefix(r.RequestURI, "/") {
		return badPath("the request's target is not a path; expected one that begins with a slash: this is no proxy.")
	}
	path := r.URL.Path
	if !utf8.ValidString(path) {
		return badPath("the path is not UTF-8.")
	}
	for i := 0; i < len(path); i++ {
		if path[i] < 0x20 || path[i] == 0x7f || path[i] == '\\' {
			return badPath("the path holds a control character or a backslash.")
		}
	}
	if strings.Contains(path, "//") || hasDots(path) {
		return badPath("the path holds an empty segment, \".\" or \"..\"; expected it in its shortest form.")
	}
	if r.URL.RawQuery != "" {
		query, err := url.ParseQuery(r.URL.RawQuery)
		if err != nil {
			return badPath("the query cannot be read; expected name=value pairs joined by &.")
		}
		for name, values := range query {
			if !utf8.ValidString(name) || !utf8.ValidString(strings.Join(values, "")) {
				return badPath("the query is not UTF-8.")
			}
		}
	}
	return nil
}

func badPath(message string) error {
	return wireerr.New(http.StatusBadRequest, codes.InvalidArgument, wireerr.BadPath, message, "/docs lists every path.")
}

func hasDots(path string) bool {
	if !strings.Contains(path, "/.") {
		return false
	}
	for _, segment := range strings.Split(path, "/") {
		if segment == "." || segment == ".." {
			return true
		}
	}
	return false
}

// readBody takes the whole body into memory, which the limit bounds, so that handlers never wait for a slow sender and every refusal is ours.
func (e *Edge) readBody(w *writer, r *http.Request) (int64, error) {
	if r.Body == nil || r.Body == http.NoBody || r.ContentLength == 0 {
		return 0, nil
	}
	if len(r.TransferEncoding) > 0 {
		// net/http has dropped a content-length that stood beside it; whoever sent both may have hidden a second request behind this one.
		w.Header().Set("Connection", "close")
	}
	if r.ContentLength > e.config.MaxBodyBytes {
		return 0, e.tooLarge()
	}
	data, err := read(r, e.config.MaxBodyBytes)
	if err == nil {
		_ = w.control.SetReadDeadline(time.Time{}) // ServeHTTP has set one; where reading failed it stays, for what net/http still reads
	}
	size := int64(len(data))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return size, wireerr.New(http.StatusRequestTimeout, codes.DeadlineExceeded, wireerr.BodyTimeout,
			fmt.Sprintf("the body was not complete after %s.", e.config.BodyTimeout), "Send the body at once.")
	case err != nil:
		return size, wireerr.New(http.StatusBadRequest, codes.InvalidArgument, "INVALID_ARGUMENT",
			"the body ended too early, or its chunks cannot be read.", "Send as many bytes as content-length says.")
	case size > e.config.MaxBodyBytes:
		return size, e.tooLarge()
	}
	r.Body = io.NopCloser(bytes.NewReader(data))
	r.ContentLength = size
	return size, nil
}

func read(r *http.Request, limit int64) ([]byte, error) {
	if r.ContentLength > 0 {
		data := make([]byte, r.ContentLength)
		_, err := io.ReadFull(r.Body, data)
		if err == nil {
			_, err = io.Copy(io.Discard, r.Body) // meets the end, from where on net/http watches whether the client leaves
		}
		return data, err
	}
	return io.ReadAll(io.LimitReader(r.Body, limit+1))
}

func (e *Edge) tooLarge() error {
	return wireerr.New(http.StatusRequestEntityTooLarge, codes.InvalidArgument, wireerr.RequestTooLarge,
		fmt.Sprintf("the body is larger than %d bytes.", e.config.MaxBodyBytes), "Send fewer items in one request, or raise --max-body-bytes.")
}
