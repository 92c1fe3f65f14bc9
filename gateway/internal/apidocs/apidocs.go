// Package apidocs serves the API's documents.
package apidocs

import "net/http"

// Register adds the routes.
func Register(*http.ServeMux) {}
