package edge

import (
	"fmt"
	"net/http"

	"google.golang.org/grpc/codes"

	"understudy.dev/gateway/internal/wireerr"
)

// refuse is the whole answer to a request that is not HTTP as we take it.
func refuse(code int) []byte {
	message, reason := "the request is not HTTP/1.1 as it is written.", "BAD_REQUEST"
	switch code {
	case http.StatusRequestHeaderFieldsTooLarge:
		message, reason = "the request's line and headers are larger than the gateway takes.", "HEADERS_TOO_LARGE"
	case http.StatusRequestTimeout:
		message, reason = "the request's headers were not complete in time.", "HEADER_TIMEOUT"
	case http.StatusNotImplemented:
		message = "the request's transfer-encoding is not known; expected chunked, or content-length."
	}
	if code >= http.StatusInternalServerError {
		code = http.StatusBadRequest
	}
	body := wireerr.Body(wireerr.New(code, codes.InvalidArgument, reason, message, "Send the request by an HTTP library."))
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s",
		code, http.StatusText(code), len(body), body)
}
