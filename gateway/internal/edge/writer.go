package edge

import (
	"net/http"
	"time"

	"understudy.dev/gateway/internal/metrics"
)

// writer counts what is written, and gives up on clients that take nothing of it.
type writer struct {
	http.ResponseWriter
	control   *http.ResponseController
	timeout   time.Duration
	metrics   *metrics.Metrics
	extended  time.Time
	code      int
	bytes     int64
	streaming bool
	broken    bool
}

func newWriter(inner http.ResponseWriter, timeout time.Duration, m *metrics.Metrics) *writer {
	w := &writer{ResponseWriter: inner, control: http.NewResponseController(inner), timeout: timeout, metrics: m}
	w.extend()
	return w
}

// WriteHeader is http.ResponseWriter's.
func (w *writer) WriteHeader(code int) {
	if w.code == 0 && code >= http.StatusOK {
		w.code = code
	}
	w.extend()
	w.ResponseWriter.WriteHeader(code)
}

// Write is http.ResponseWriter's.
func (w *writer) Write(data []byte) (int, error) {
	if w.code == 0 {
		w.code = http.StatusOK
	}
	w.extend()
	n, err := w.ResponseWriter.Write(data)
	w.bytes += int64(n)
	return n, err
}

// Flush is http.Flusher's. Whoever flushes streams.
func (w *writer) Flush() { _ = w.FlushError() }

// FlushError is what http.ResponseController looks for.
func (w *writer) FlushError() error {
	if !w.streaming {
		w.streaming = true
		w.metrics.Streams.Inc()
	}
	if w.code == 0 {
		w.code = http.StatusOK
	}
	return w.control.Flush()
}

// Unwrap is what http.ResponseController looks for.
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// extend moves the deadline of writes; once a second is enough.
func (w *writer) extend() {
	if now := time.Now(); now.Sub(w.extended) > min(time.Second, w.timeout/2) {
		w.extended = now
		_ = w.control.SetWriteDeadline(now.Add(w.timeout)) // an error is one of the connection, which writing meets too
	}
}

func (w *writer) end() {
	if w.streaming {
		w.metrics.Streams.Dec()
	}
}

func (w *writer) status() int {
	if w.code == 0 {
		return http.StatusOK
	}
	return w.code
}
