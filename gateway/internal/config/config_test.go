package config

import (
	"io"
	"slices"
	"strings"
	"testing"
	"time"
)

func parse(env map[string]string, args ...string) (Config, error) {
	return Parse(args, func(name string) (string, bool) { value, ok := env[name]; return value, ok }, io.Discard)
}

func TestFlagOverEnvironmentOverDefault(t *testing.T) {
	env := map[string]string{"UNDERSTUDY_GATEWAY_GRACE": "2s", "UNDERSTUDY_GATEWAY_LISTEN": ":1", "UNDERSTUDY_GATEWAY_CORS_ORIGINS": "a, b,"}
	c, err := parse(env, "--listen", ":2")
	if err != nil {
		t.Fatal(err)
	}
	if c.Grace != 2*time.Second || c.Listen != ":2" || c.MaxBodyBytes != 4<<20 || !slices.Equal(c.CORSOrigins, []string{"a", "b"}) {
		t.Errorf("got %+v", c)
	}
}

func TestWhatCannotBeIsNamed(t *testing.T) {
	for words, args := range map[string][]string{
		"--max-requests is 0":         {"--max-requests=0"},
		"--tls-cert and --tls-key":    {"--tls-key=x"},
		"--tls-client-ca needs":       {"--tls-client-ca=x"},
		"unexpected argument \"now\"": {"now"},
		"not defined: -x":             {"-x"},
	} {
		if _, err := parse(nil, args...); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%v: got %v, want %q", args, err, words)
		}
	}
	if _, err := parse(map[string]string{"UNDERSTUDY_GATEWAY_GRACE": "soon"}); err == nil || !strings.Contains(err.Error(), "UNDERSTUDY_GATEWAY_GRACE") {
		t.Errorf("got %v", err)
	}
}

func TestACertificateImpliesTLS(t *testing.T) {
	c, err := parse(nil, "--server-ca=config.go")
	if err != nil || !c.ServerTLS {
		t.Errorf("got %v, %v", c.ServerTLS, err)
	}
}
