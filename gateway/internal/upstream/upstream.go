// Package upstream keeps the connections to the gRPC server.
package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"understudy.dev/gateway/internal/certs"
	"understudy.dev/gateway/internal/config"
)

const (
	maxMessage = 64 << 20 // the server has limits of its own, which say what was too large
	maxBackoff = 2 * time.Second
	minConnect = 5 * time.Second
)

// Pool spreads calls over its connections in turn. It is safe for concurrent use.
type Pool struct {
	conns []*grpc.ClientConn
	next  atomic.Uint32
}

var _ grpc.ClientConnInterface = (*Pool)(nil)

// Dial makes the connections; they are opened by the first call, and opened anew whenever they were lost.
func Dial(c config.Config, log *slog.Logger) (*Pool, error) {
	creds, err := transport(c, log)
	if err != nil {
		return nil, err
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackoff},
			MinConnectTimeout: minConnect,
		}),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(0), // the next call after a pause is not to wait for a handshake
	}
	pool := &Pool{}
	for range c.ServerConnections {
		conn, err := grpc.NewClient(c.Server, options...)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("--server %q: %w", c.Server, err), pool.Close())
		}
		pool.conns = append(pool.conns, conn)
		conn.Connect()
	}
	return pool, nil
}

// Invoke is grpc.ClientConnInterface's.
func (p *Pool) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return p.pick().Invoke(ctx, method, args, reply, opts...)
}

// NewStream is grpc.ClientConnInterface's.
func (p *Pool) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return p.pick().NewStream(ctx, desc, method, opts...)
}

// Close ends all calls.
func (p *Pool) Close() error {
	var all []error
	for _, conn := range p.conns {
		all = append(all, conn.Close())
	}
	return errors.Join(all...)
}

// pick takes the next connection in turn that is there; one that waits before it tries again would fail the call at once.
func (p *Pool) pick() *grpc.ClientConn {
	if len(p.conns) == 1 {
		return p.conns[0]
	}
	turn := p.next.Add(1)
	for step := range uint32(len(p.conns)) {
		if conn := p.conns[(turn+step)%uint32(len(p.conns))]; conn.GetState() == connectivity.Ready {
			return conn
		}
	}
	return p.conns[turn%uint32(len(p.conns))]
}

func transport(c config.Config, log *slog.Logger) (credentials.TransportCredentials, error) {
	if !c.ServerTLS {
		return insecure.NewCredentials(), nil
	}
	settings := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.ServerName}
	if c.ServerCA != "" {
		pool, err := certs.Pool(c.ServerCA)
		if err != nil {
			return nil, err
		}
		settings.RootCAs = pool
	}
	if c.ServerCert != "" {
		pair, err := certs.Load(c.ServerCert, c.ServerKey, log)
		if err != nil {
			return nil, fmt.Errorf("--server-cert: %w", err)
		}
		settings.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair.Get(), nil }
	}
	return credentials.NewTLS(settings), nil
}
