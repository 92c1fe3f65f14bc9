package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/net/netutil"

	"understudy.dev/gateway/internal/apidocs"
	"understudy.dev/gateway/internal/certs"
	"understudy.dev/gateway/internal/config"
	"understudy.dev/gateway/internal/edge"
	"understudy.dev/gateway/internal/forward"
	"understudy.dev/gateway/internal/health"
	"understudy.dev/gateway/internal/metrics"
	"understudy.dev/gateway/internal/openai"
	"understudy.dev/gateway/internal/paths"
	"understudy.dev/gateway/internal/public"
	"understudy.dev/gateway/internal/rest"
	"understudy.dev/gateway/internal/upstream"
	"understudy.dev/gateway/internal/web"
)

// A heap of a few megabytes would be collected many times a second; GOGC and GOMEMLIMIT are the operator's word.
const gcPercent = 400

// How long the last answers may take to be written after the grace time.
const lastWords = time.Second

// gateway is one process's parts.
type gateway struct {
	config  config.Config
	log     *slog.Logger
	pool    *upstream.Pool
	checker *health.Checker
	edge    *edge.Edge
	metrics *metrics.Metrics
}

// run serves until a signal came and the requests that ran then have ended.
func run(c config.Config) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	g, err := build(c, slog.New(slog.NewJSONHandler(os.Stdout, nil)))
	if err != nil {
		return err
	}
	defer g.pool.Close() //nolint:errcheck // the process ends
	return g.serve(signals)
}

func build(c config.Config, logger *slog.Logger) (*gateway, error) {
	pool, err := upstream.Dial(c, logger)
	if err != nil {
		return nil, err
	}
	api, err := rest.New(pool, rest.Options{HeaderDelay: c.StreamHeaderDelay, Route: edge.SetRoute})
	if err != nil {
		return nil, err
	}
	routes := http.NewServeMux()
	routes.Handle("/v1", api) // else net/http would redirect to /v1/
	routes.Handle("/v1/", api)
	openai.Register(routes, pool, openai.Deps{Context: forward.Context, REST: api, Log: logger})
	paths.Register(routes, pool)
	apidocs.Register(routes)
	web.Register(routes)
	g := &gateway{config: c, log: logger, pool: pool, checker: health.New(pool), metrics: metrics.New()}
	g.checker.Register(routes)
	g.edge, err = edge.New(routes, c, g.metrics, logger)
	return g, err
}

func (g *gateway) serve(signals <-chan os.Signal) error {
	root, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	listener, err := g.listen()
	if err != nil {
		return err
	}
	open := make(chan error, 1)
	if !g.config.AllowNoKeys {
		watch := &public.Watch{Loopback: public.Loopback(listener.Addr().String()), Hosts: g.config.Hosts}
		g.edge.Gate = watch.Check
		go func() {
			if err := watch.Run(root, g.pool); err != nil {
				open <- err
			}
		}()
	}
	server := &http.Server{
		Handler:                      g.edge,
		ReadHeaderTimeout:            g.config.HeaderTimeout,
		IdleTimeout:                  g.config.IdleTimeout,
		MaxHeaderBytes:               g.config.MaxHeaderBytes,
		DisableGeneralOptionsHandler: true,
		BaseContext:                  func(net.Listener) context.Context { return root },
		ErrorLog:                     log.New(io.Discard, "", 0), // handshakes of strangers; panics are the edge's
	}
	if server.TLSConfig, err = g.tls(); err != nil {
		return err
	}
	observer, failed, err := g.serveMetrics()
	if err != nil {
		return err
	}
	defer observer.Close() //nolint:errcheck // the process ends
	scheme := "http"
	go func() {
		if server.TLSConfig == nil {
			failed <- server.Serve(edge.Listener(listener))
		} else {
			failed <- server.ServeTLS(listener, "", "")
		}
	}()
	if server.TLSConfig != nil {
		scheme = "https"
	}
	g.log.Info("listening", "address", listener.Addr().String(), "url", scheme+"://"+listener.Addr().String(), "metrics", observer.Addr, "server", g.config.Server)
	select {
	case err := <-failed:
		return fmt.Errorf("serving: %w", err)
	case err := <-open:
		return err
	case got := <-signals:
		g.log.Info("stopping", "signal", got.String(), "grace", g.config.Grace.String())
	}
	go func() {
		<-signals
		g.log.Warn("stopped at once by a second signal")
		os.Exit(1)
	}()
	return g.drain(server, stop)
}

// drain lets the requests that run end: first others are still taken, so that load balancers can turn away; then they are refused.
func (g *gateway) drain(server *http.Server, stop context.CancelCauseFunc) error {
	ctx, cancel := context.WithTimeout(context.Background(), g.config.Grace)
	defer cancel()
	g.checker.Drain()
	server.SetKeepAlivesEnabled(false)
	select {
	case <-time.After(g.config.DrainDelay):
	case <-ctx.Done():
	}
	g.edge.Refuse()
	clean := g.edge.WaitIdle(ctx)
	if !clean {
		stop(edge.Draining()) // streams end with a line that says so
	}
	last, done := context.WithTimeout(context.Background(), lastWords)
	defer done()
	if err := server.Shutdown(last); err != nil {
		_ = server.Close()
	}
	g.log.Info("stopped", "clean", clean)
	return nil
}

func (g *gateway) listen() (net.Listener, error) {
	listener, err := net.Listen("tcp", g.config.Listen)
	if err != nil {
		return nil, fmt.Errorf("--listen %s: %w", g.config.Listen, err)
	}
	return netutil.LimitListener(listener, g.config.MaxConnections), nil
}

// tls is nil where plain HTTP is served.
func (g *gateway) tls() (*tls.Config, error) {
	c := g.config
	if c.TLSCert == "" {
		return nil, nil
	}
	pair, err := certs.Load(c.TLSCert, c.TLSKey, g.log)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert: %w", err)
	}
	settings := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.Get(), nil },
	}
	if c.TLSClientCA != "" {
		if settings.ClientCAs, err = certs.Pool(c.TLSClientCA); err != nil {
			return nil, err
		}
		settings.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return settings, nil
}

// serveMetrics returns the server, with the address that it took, and the channel on which whoever fails says so.
func (g *gateway) serveMetrics() (*http.Server, chan error, error) {
	failed := make(chan error, 2)
	server := &http.Server{Handler: g.metrics.Handler(), ReadHeaderTimeout: g.config.HeaderTimeout, ErrorLog: log.New(io.Discard, "", 0)}
	if g.config.MetricsListen == "" {
		return server, failed, nil
	}
	listener, err := net.Listen("tcp", g.config.MetricsListen)
	if err != nil {
		return nil, nil, fmt.Errorf("--metrics-listen %s: %w", g.config.MetricsListen, err)
	}
	server.Addr = listener.Addr().String()
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			failed <- err
		}
	}()
	return server, failed, nil
}
