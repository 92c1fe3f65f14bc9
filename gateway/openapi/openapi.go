// Package openapi holds the OpenAPI document of everything that the gateway serves. `make openapi` writes it from the protos.
package openapi

import _ "embed"

// Document is the JSON text of the document.
//
//go:embed openapi.json
var Document []byte
