// Package certs keeps a certificate and its key as they are in their files, so that renewed ones are used without a restart.
package certs

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

const every = time.Second // the files are looked at no more often

// Pair is a certificate with its key. It is safe for concurrent use.
type Pair struct {
	certFile, keyFile string
	log               *slog.Logger
	mu                sync.Mutex
	current           *tls.Certificate
	looked            time.Time
	stamp             [2]time.Time
}

// Load reads both files, and fails where they do not fit.
func Load(certFile, keyFile string, log *slog.Logger) (*Pair, error) {
	p := &Pair{certFile: certFile, keyFile: keyFile, log: log, looked: time.Now()}
	p.stamp = p.stamps()
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("%s, %s: %w", certFile, keyFile, err)
	}
	p.current = &pair
	return p, nil
}

// Get is the newest pair that fits. A broken one is logged, and the one before stays.
func (p *Pair) Get() *tls.Certificate {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.looked) < every {
		return p.current
	}
	p.looked = time.Now()
	stamp := p.stamps()
	if stamp == p.stamp {
		return p.current
	}
	pair, err := tls.LoadX509KeyPair(p.certFile, p.keyFile)
	if err != nil {
		p.log.Error("new certificate refused; the old one stays", "file", p.certFile, "error", err.Error())
		return p.current // the stamp stays too, so that it is tried again
	}
	p.current, p.stamp = &pair, stamp
	p.log.Info("certificate renewed", "file", p.certFile)
	return p.current
}

func (p *Pair) stamps() [2]time.Time {
	var found [2]time.Time
	for i, file := range [2]string{p.certFile, p.keyFile} {
		if info, err := os.Stat(file); err == nil {
			found[i] = info.ModTime()
		}
	}
	return found
}

// Pool reads a PEM file of certificates to trust.
func Pool(file string) (*x509.CertPool, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s holds no certificate; expected PEM", file)
	}
	return pool, nil
}
