package edge

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"

	"google.golang.org/grpc/codes"

	"understudy.dev/gateway/internal/wireerr"
)

const (
	methods = "GET, POST, PUT, PATCH, DELETE"
	exposed = "X-Request-Id, Retry-After, Retry-After-Ms, X-Understudy-Route, X-Understudy-Local, X-Understudy-Cost-Usd, " +
		"X-Understudy-Quality, X-Understudy-Interaction-Id"
	maxAge = "600"
)

// What clients, OpenAI's among them, may send: names alone, so that nothing else comes back in our header.
var headerNames = regexp.MustCompile(`^[A-Za-z0-9, -]{1,1000}$`)

// cors lets pages of some origins call. Cookies are never used, so that credentials are not allowed.
type cors struct {
	any       bool
	origins   []string
	protected *http.CrossOriginProtection
}

func newCORS(origins []string) (*cors, error) {
	c := &cors{any: slices.Contains(origins, "*"), origins: origins, protected: http.NewCrossOriginProtection()}
	for _, origin := range origins {
		if origin == "*" {
			continue
		}
		if err := c.protected.AddTrustedOrigin(origin); err != nil {
			return nil, fmt.Errorf("--cors-origins: %q is no origin; expected scheme://host or scheme://host:port: %w", origin, err)
		}
	}
	return c, nil
}

// check refuses what changes something and is sent by a page of another origin: whatever CORS says, a browser sends such requests, and
// only keeps their answers from the page.
func (c *cors) check(r *http.Request) error {
	if c.any || c.protected.Check(r) == nil {
		return nil
	}
	return wireerr.New(http.StatusForbidden, codes.PermissionDenied, wireerr.ForeignOrigin,
		"a page of another origin may not send this.", "Name the page's origin in --cors-origins.")
}

// handle sets the headers of an allowed origin, and returns true where it has answered: a preflight request.
func (c *cors) handle(w http.ResponseWriter, r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if len(c.origins) == 0 || origin == "" {
		return false
	}
	h := w.Header()
	h.Add("Vary", "Origin")
	preflight := r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != ""
	if !c.any && !slices.Contains(c.origins, origin) {
		if preflight {
			wireerr.Write(w, r, wireerr.New(http.StatusForbidden, codes.PermissionDenied, "PERMISSION_DENIED",
				"pages of this origin may not call.", "Name the origin in --cors-origins."))
		}
		return preflight
	}
	if c.any {
		origin = "*"
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Expose-Headers", exposed)
	if !preflight {
		return false
	}
	h.Set("Access-Control-Allow-Methods", methods)
	if names := r.Header.Get("Access-Control-Request-Headers"); headerNames.MatchString(names) {
		h.Set("Access-Control-Allow-Headers", names)
	}
	h.Set("Access-Control-Max-Age", maxAge)
	w.WriteHeader(http.StatusNoContent)
	return true
}
