// Package config is the gateway's one place that reads flags and the environment.
//
// A flag wins over its variable UNDERSTUDY_GATEWAY_<FLAG>, and that over the default.
package config

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// Config is everything that can be set. It is made once, by Parse, and not changed afterwards.
type Config struct {
	// Server is the gRPC server's address, "host:port".
	Server string
	// ServerTLS calls the server over TLS; implied by any of the three files below.
	ServerTLS bool
	// ServerCA holds the certificates that the server's is checked with; empty: those of the system.
	ServerCA string
	// ServerCert and ServerKey are what the gateway shows to the server (mutual TLS).
	ServerCert string
	ServerKey  string
	// ServerName is the name expected in the server's certificate; empty: the host of Server.
	ServerName string
	// ServerConnections is how many HTTP/2 connections calls are spread over.
	ServerConnections int

	// Listen is where HTTP is served; port 0 takes a free one.
	Listen string
	// TLSCert and TLSKey serve HTTPS (and HTTP/2) instead of HTTP.
	TLSCert string
	TLSKey  string
	// TLSClientCA asks clients for a certificate signed by one of these.
	TLSClientCA string
	// MetricsListen is where /metrics is served; empty: nowhere.
	MetricsListen string

	// MaxBodyBytes is the largest request body; more is answered with 413.
	MaxBodyBytes int64
	// MaxHeaderBytes is the largest request line and headers together; more is answered with 431.
	MaxHeaderBytes int
	// MaxRequests is how many requests run at once; more are answered with 503.
	MaxRequests int
	// MaxConnections is how many clients are connected at once; more wait to be accepted.
	MaxConnections int
	// HeaderTimeout ends connections whose headers are not complete by then.
	HeaderTimeout time.Duration
	// BodyTimeout ends requests whose body is not complete by then.
	BodyTimeout time.Duration
	// WriteTimeout ends answers of which the client takes nothing for so long.
	WriteTimeout time.Duration
	// IdleTimeout closes connections that were not used for so long.
	IdleTimeout time.Duration
	// CallTimeout is the deadline of calls whose client gives none; 0: none.
	CallTimeout time.Duration
	// StreamHeaderDelay is how long a stream waits for its first message before its headers are sent.
	StreamHeaderDelay time.Duration
	// Grace is how long running requests may go on after SIGTERM.
	Grace time.Duration
	// DrainDelay is how long new requests are still taken after SIGTERM, while /readyz tells load balancers to stop sending them.
	DrainDelay time.Duration

	// CORSOrigins are the origins that browsers may call from; "*" is any. Empty: CORS is off.
	CORSOrigins []string
	// Hosts are the names besides this machine's own that a gateway on loopback is called by while the server asks for no keys.
	Hosts []string
	// AllowNoKeys serves others than this machine even where the server asks for no keys.
	AllowNoKeys bool
	// AccessLog writes one JSON line a request.
	AccessLog bool
}

const prefix = "UNDERSTUDY_GATEWAY_"

// Default is what holds where nothing is set.
func Default() Config {
	return Config{
		Server:            "127.0.0.1:50051",
		ServerConnections: 2,
		Listen:            "127.0.0.1:8080",
		MetricsListen:     "127.0.0.1:9091",
		MaxBodyBytes:      4 << 20,
		MaxHeaderBytes:    32 << 10,
		MaxRequests:       1024,
		MaxConnections:    4096,
		HeaderTimeout:     5 * time.Second,
		BodyTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       90 * time.Second,
		StreamHeaderDelay: 200 * time.Millisecond,
		Grace:             30 * time.Second,
		AccessLog:         true,
	}
}

// Parse reads the command's arguments and the environment (getenv is os.LookupEnv). flag.ErrHelp means that help was printed to usage.
func Parse(args []string, getenv func(string) (string, bool), usage io.Writer) (Config, error) {
	c := Default()
	set := flag.NewFlagSet("understudy-gateway", flag.ContinueOnError)
	set.SetOutput(usage)
	origins, hosts := "", ""
	set.StringVar(&c.Server, "server", c.Server, "address of the gRPC server")
	set.BoolVar(&c.ServerTLS, "server-tls", c.ServerTLS, "call the server over TLS")
	set.StringVar(&c.ServerCA, "server-ca", c.ServerCA, "PEM file: certificates that the server's is checked with")
	set.StringVar(&c.ServerCert, "server-cert", c.ServerCert, "PEM file: the gateway's own certificate, for mutual TLS")
	set.StringVar(&c.ServerKey, "server-key", c.ServerKey, "PEM file: key of server-cert")
	set.StringVar(&c.ServerName, "server-name", c.ServerName, "name expected in the server's certificate")
	set.IntVar(&c.ServerConnections, "server-connections", c.ServerConnections, "connections to the server")
	set.StringVar(&c.Listen, "listen", c.Listen, "address to serve HTTP on")
	set.StringVar(&c.TLSCert, "tls-cert", c.TLSCert, "PEM file: serve HTTPS with this certificate")
	set.StringVar(&c.TLSKey, "tls-key", c.TLSKey, "PEM file: key of tls-cert")
	set.StringVar(&c.TLSClientCA, "tls-client-ca", c.TLSClientCA, "PEM file: ask clients for a certificate signed by one of these")
	set.StringVar(&c.MetricsListen, "metrics-listen", c.MetricsListen, "address to serve /metrics on; empty: off")
	set.Int64Var(&c.MaxBodyBytes, "max-body-bytes", c.MaxBodyBytes, "largest request body")
	set.IntVar(&c.MaxHeaderBytes, "max-header-bytes", c.MaxHeaderBytes, "largest request line and headers")
	set.IntVar(&c.MaxRequests, "max-requests", c.MaxRequests, "most requests at once")
	set.IntVar(&c.MaxConnections, "max-connections", c.MaxConnections, "most connections at once")
	set.DurationVar(&c.HeaderTimeout, "header-timeout", c.HeaderTimeout, "time for a request's headers")
	set.DurationVar(&c.BodyTimeout, "body-timeout", c.BodyTimeout, "time for a request's body")
	set.DurationVar(&c.WriteTimeout, "write-timeout", c.WriteTimeout, "time that a client may take nothing of an answer")
	set.DurationVar(&c.IdleTimeout, "idle-timeout", c.IdleTimeout, "time that a connection may lie unused")
	set.DurationVar(&c.CallTimeout, "call-timeout", c.CallTimeout, "deadline of calls whose client gives none; 0: none")
	set.DurationVar(&c.StreamHeaderDelay, "stream-header-delay", c.StreamHeaderDelay, "wait for a stream's first message before its headers are sent")
	set.DurationVar(&c.Grace, "grace", c.Grace, "time for running requests after SIGTERM")
	set.StringVar(&origins, "cors-origins", "", "origins that browsers may call from, by commas; * is any; empty: CORS is off")
	set.StringVar(&hosts, "hosts", "", "names, by commas, that a gateway on loopback is called by besides localhost while the server asks for no keys")
	set.BoolVar(&c.AllowNoKeys, "allow-no-keys", c.AllowNoKeys, "serve others than this machine though the server asks for no keys")
	set.BoolVar(&c.AccessLog, "access-log", c.AccessLog, "write one JSON line a request")
	set.DurationVar(&c.DrainDelay, "drain-delay", c.DrainDelay, "time after SIGTERM for which new requests are still taken, while /readyz says 503")
	if err := fromEnvironment(set, getenv); err != nil {
		return Config{}, err
	}
	if err := set.Parse(args); err != nil {
		return Config{}, err
	}
	if set.NArg() > 0 {
		return Config{}, fmt.Errorf("unexpected argument %q; expected flags alone, see --help", set.Arg(0))
	}
	c.CORSOrigins, c.Hosts = listed(origins), listed(hosts)
	return c, c.check()
}

func listed(text string) []string {
	var found []string
	for _, one := range strings.Split(text, ",") {
		if one = strings.TrimSpace(one); one != "" {
			found = append(found, one)
		}
	}
	return found
}

func fromEnvironment(set *flag.FlagSet, getenv func(string) (string, bool)) error {
	var failed error
	set.VisitAll(func(f *flag.Flag) {
		name := prefix + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if value, ok := getenv(name); ok && failed == nil {
			if err := set.Set(f.Name, value); err != nil {
				failed = fmt.Errorf("%s: %w", name, err)
			}
		}
	})
	return failed
}

func (c *Config) check() error {
	c.ServerTLS = c.ServerTLS || c.ServerCA != "" || c.ServerCert != ""
	var wrong []error
	pair := func(a, b, names string) {
		if (a == "") != (b == "") {
			wrong = append(wrong, fmt.Errorf("%s go together; give both or neither", names))
		}
	}
	pair(c.ServerCert, c.ServerKey, "--server-cert and --server-key")
	pair(c.TLSCert, c.TLSKey, "--tls-cert and --tls-key")
	if c.TLSClientCA != "" && c.TLSCert == "" {
		wrong = append(wrong, errors.New("--tls-client-ca needs --tls-cert and --tls-key"))
	}
	for name, value := range map[string]int64{
		"--max-body-bytes": c.MaxBodyBytes, "--max-header-bytes": int64(c.MaxHeaderBytes), "--max-requests": int64(c.MaxRequests),
		"--max-connections": int64(c.MaxConnections), "--server-connections": int64(c.ServerConnections),
		"--header-timeout": int64(c.HeaderTimeout), "--body-timeout": int64(c.BodyTimeout), "--write-timeout": int64(c.WriteTimeout),
		"--idle-timeout": int64(c.IdleTimeout),
	} {
		if value <= 0 {
			wrong = append(wrong, fmt.Errorf("%s is %d; expected more than 0", name, value))
		}
	}
	for _, file := range []string{c.ServerCA, c.ServerCert, c.ServerKey, c.TLSCert, c.TLSKey, c.TLSClientCA} {
		if file == "" {
			continue
		}
		if _, err := os.Stat(file); err != nil {
			wrong = append(wrong, err)
		}
	}
	return errors.Join(wrong...)
}
