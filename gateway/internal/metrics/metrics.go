// Package metrics counts requests for Prometheus. Labels are route patterns, known methods and status codes: nothing that a caller can make up.
package metrics

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics of the gateway.
type Metrics struct {
	// InFlight is how many requests run.
	InFlight prometheus.Gauge
	// Streams is how many of them are streams that have begun.
	Streams  prometheus.Gauge
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	received prometheus.Counter
	sent     prometheus.Counter
	registry *prometheus.Registry
}

// New makes them all.
func New() *Metrics {
	m := &Metrics{
		InFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "understudy_gateway_in_flight", Help: "Requests that run."}),
		Streams:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "understudy_gateway_streams", Help: "Streams that have begun and not ended."}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "understudy_gateway_requests_total", Help: "Requests answered, by route pattern, method and HTTP status.",
		}, []string{"route", "method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "understudy_gateway_request_seconds", Help: "Time from a request's headers to the end of its answer, by route pattern and method.",
			Buckets: []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"route", "method"}),
		received: prometheus.NewCounter(prometheus.CounterOpts{Name: "understudy_gateway_received_bytes_total", Help: "Bytes of request bodies."}),
		sent:     prometheus.NewCounter(prometheus.CounterOpts{Name: "understudy_gateway_sent_bytes_total", Help: "Bytes of answers' bodies."}),
		registry: prometheus.NewRegistry(),
	}
	m.registry.MustRegister(m.InFlight, m.Streams, m.requests, m.seconds, m.received, m.sent,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Observe counts a request that was answered. An empty route is one of no pattern.
func (m *Metrics) Observe(route, method string, code int, took time.Duration, received, sent int64) {
	if route == "" {
		route = "none"
	}
	method = known(method)
	m.requests.WithLabelValues(route, method, strconv.Itoa(code)).Inc()
	m.seconds.WithLabelValues(route, method).Observe(took.Seconds())
	m.received.Add(float64(received))
	m.sent.Add(float64(sent))
}

// Handler serves /metrics.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry}))
	return mux
}

func known(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return method
	default:
		return "other"
	}
}
