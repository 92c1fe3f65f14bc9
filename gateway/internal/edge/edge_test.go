package edge

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"understudy.dev/gateway/internal/config"
	"understudy.dev/gateway/internal/metrics"
)

func serve(t *testing.T, log io.Writer, routes *http.ServeMux) (*Edge, *httptest.Server) {
	t.Helper()
	c := config.Default()
	e, err := New(routes, c, metrics.New(), slog.New(slog.NewJSONHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(e)
	server.Listener = Listener(server.Listener)
	server.Start()
	t.Cleanup(server.Close)
	return e, server
}

func TestTargets(t *testing.T) {
	for target, good := range map[string]bool{
		"/": true, "/v1/status": true, "/v1/a%2Fb": true, "/v1/models/x:load": true, "/v1/a.b/..c": true, "/v1/ü": true, "/v1?a=b%20c": true,
		"/v1//a": false, "/v1/./a": false, "/v1/../a": false, "/v1/%2e%2e/a": false, "/v1/..%2fa": false, "/v1/%00": false, "/v1/%5ca": false,
		"/v1/%ff": false, "/v1?a=%ff": false, "/v1?a=%zz": false, "http://other/v1": false,
	} {
		r := httptest.NewRequest(http.MethodGet, target, nil)
		if err := checkTarget(r); (err == nil) != good {
			t.Errorf("%s: %v", target, err)
		}
	}
}

func TestAPanicIsAnsweredAndLoggedWithoutItsText(t *testing.T) {
	routes := http.NewServeMux()
	routes.HandleFunc("GET /early", func(http.ResponseWriter, *http.Request) { panic("inside") })
	routes.HandleFunc("GET /late", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic("inside")
	})
	var log bytes.Buffer
	_, server := serve(t, &log, routes)
	response, err := http.Get(server.URL + "/early")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(response.Body)
	_ = response.Body.Close()
	if response.StatusCode != http.StatusInternalServerError || strings.Contains(string(body), "inside") {
		t.Errorf("%d %s", response.StatusCode, body)
	}
	response, err = http.Get(server.URL + "/late")
	if err != nil {
		t.Fatal(err)
	}
	if _, err = io.ReadAll(response.Body); err == nil {
		t.Error("the answer looks whole, though it is not")
	}
	_ = response.Body.Close()
	server.Close()
	if !strings.Contains(log.String(), "inside") {
		t.Error("the log does not have the cause")
	}
}

func TestNetHTTPsOwnRefusalsAreOurs(t *testing.T) {
	_, server := serve(t, io.Discard, http.NewServeMux())
	for sent, want := range map[string]string{
		"GET / HTTP/2.0\r\nHost: a\r\n\r\n":                             "HTTP/1.1 400 ",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n": "HTTP/1.1 400 ",
		"nonsense\r\n\r\n":       "HTTP/1.1 400 ",
		"GET / HTTP/1.1\r\n\r\n": "HTTP/1.1 400 ",
		"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", 2<<20) + "\r\n\r\n": "HTTP/1.1 431 ",
	} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(conn, sent) // it may be refused before all is sent
		answer, _ := io.ReadAll(conn)
		_ = conn.Close()
		if !strings.HasPrefix(string(answer), want) || !strings.Contains(string(answer), `{"error":{"code":4`) {
			t.Errorf("%.60q: got %.200q", sent, answer)
		}
	}
}

func TestWaitIdle(t *testing.T) {
	inside, leave := make(chan struct{}), make(chan struct{})
	routes := http.NewServeMux()
	routes.HandleFunc("GET /wait", func(http.ResponseWriter, *http.Request) { close(inside); <-leave })
	e, server := serve(t, io.Discard, routes)
	done := make(chan error, 1)
	go func() {
		response, err := http.Get(server.URL + "/wait")
		if err == nil {
			err = response.Body.Close()
		}
		done <- err
	}()
	<-inside
	e.Refuse()
	short, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if e.WaitIdle(short) {
		t.Error("idle while a request runs")
	}
	response, err := http.Get(server.URL + "/wait")
	if err != nil || response.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a request while it drains: %v, %v", response, err)
	}
	_ = response.Body.Close()
	close(leave)
	if !e.WaitIdle(context.Background()) {
		t.Error("not idle though the last request has ended")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestOriginsThatAreNoneAreRefusedAtTheStart(t *testing.T) {
	for origin, good := range map[string]bool{"*": true, "https://app.example": true, "http://localhost:3000": true, "app.example": false, "https://app.example/page": false} {
		if _, err := newCORS([]string{origin}); (err == nil) != good {
			t.Errorf("%q: %v", origin, err)
		}
	}
}
