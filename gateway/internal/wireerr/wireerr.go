// Package wireerr writes errors as JSON: a gRPC status, or an error of the gateway's own, in one form.
//
//	{"error": {"code": 404, "status": "NOT_FOUND", "reason": "MODEL_NOT_FOUND", "message": "...", "help": "...", "metadata": {...}, "request_id": "..."}}
package wireerr

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Error is what an error says, whatever form it is written in.
type Error struct {
	// Code is the HTTP status.
	Code int `json:"code"`
	// Status is the canonical gRPC code, e.g. "NOT_FOUND".
	Status string `json:"status"`
	// Reason is a value of understudy.v1.ErrorReason without its prefix, e.g. "MODEL_NOT_FOUND"; for errors of the gateway see its constants.
	Reason string `json:"reason"`
	// Message says what was wrong.
	Message string `json:"message"`
	// Help says what to do about it.
	Help string `json:"help"`
	// Metadata has what varies in the message.
	Metadata map[string]string `json:"metadata"`
	// RequestID finds the request in the logs of gateway and server.
	RequestID string `json:"request_id"`
	// RetryAfter is how long to wait before trying again; 0: not said.
	RetryAfter time.Duration `json:"-"`
}

// Reasons of the gateway's own errors.
const (
	RouteNotFound       = "ROUTE_NOT_FOUND"
	MethodNotAllowed    = "METHOD_NOT_ALLOWED"
	UnsupportedMedia    = "UNSUPPORTED_MEDIA_TYPE"
	BadPath             = "BAD_PATH"
	BodyTimeout         = "BODY_TIMEOUT"
	GatewayOverloaded   = "OVERLOADED"
	RequestTooLarge     = "REQUEST_TOO_LARGE"
	ServerNotReachable  = "SERVER_NOT_REACHABLE"
	HostNotKnown        = "HOST_NOT_KNOWN"
	ForeignOrigin       = "FOREIGN_ORIGIN"
	domain              = "understudy.dev"
	statusClientGone    = 499
	defaultUnavailableS = 1
)

// Error makes it an error, so that handlers can return it.
func (e *Error) Error() string { return e.Status + ": " + e.Message }

// New is an error of the gateway's own.
func New(httpCode int, code codes.Code, reason, message, help string) *Error {
	return &Error{Code: httpCode, Status: Name(code), Reason: reason, Message: message, Help: help}
}

// From reads a gRPC status, or an *Error, out of err. Anything else is an internal error that says nothing of itself.
func From(err error) *Error {
	var own *Error
	if errors.As(err, &own) {
		copied := *own
		return &copied
	}
	if errors.Is(err, context.Canceled) {
		err = status.Error(codes.Canceled, "the caller left.")
	} else if errors.Is(err, context.DeadlineExceeded) {
		err = status.Error(codes.DeadlineExceeded, "the deadline passed.")
	}
	st, ok := status.FromError(err)
	if !ok {
		st = status.New(codes.Internal, "the gateway failed on this request; its log has the reason under the request id.")
	}
	e := &Error{Code: HTTPStatus(st.Code()), Status: Name(st.Code()), Message: st.Message()}
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			e.Reason, e.Metadata = d.GetReason(), d.GetMetadata()
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		case *errdetails.RequestInfo:
			e.RequestID = d.GetRequestId()
		case *errdetails.Help:
			if links := d.GetLinks(); len(links) > 0 {
				e.Help = links[0].GetDescription()
			}
		}
	}
	if e.Reason == "" {
		e.fromTransport(st.Code())
	}
	if e.Reason == RequestTooLarge {
		e.Code = http.StatusRequestEntityTooLarge
	}
	if e.Code == http.StatusServiceUnavailable && e.RetryAfter == 0 {
		e.RetryAfter = defaultUnavailableS * time.Second
	}
	if e.Help == "" {
		e.Help = helpFor(e.Reason, st.Code())
	}
	return e
}

// A status without ErrorInfo is not the server's word: it comes from gRPC itself, and its text may name addresses.
func (e *Error) fromTransport(code codes.Code) {
	switch code {
	case codes.Unavailable:
		e.Reason, e.Message = ServerNotReachable, "the gateway does not reach the server."
	case codes.ResourceExhausted: // larger than gRPC takes, not a rate
		e.Reason, e.Code = RequestTooLarge, http.StatusRequestEntityTooLarge
	case codes.Unknown:
		e.Reason = "INTERNAL"
	default:
		e.Reason = Name(code)
	}
}

// Write answers with err in the REST form. The response must not have begun. It also sets retry-after, and www-authenticate for 401.
func Write(w http.ResponseWriter, r *http.Request, err error) {
	e := From(err)
	if e.RequestID == "" {
		e.RequestID = requestID(w, r)
	}
	SetHeaders(w, e)
	w.Header().Set("Content-Type", "application/json")
	body := Body(e)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(e.Code)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // whoever left cannot be told
	}
}

// SetHeaders sets the headers that an error of any form has: retry-after, www-authenticate.
func SetHeaders(w http.ResponseWriter, e *Error) {
	h := w.Header()
	h.Del("Trailer")
	h.Del("Transfer-Encoding")
	h.Set("Cache-Control", "no-store")
	if e.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64(math.Ceil(e.RetryAfter.Seconds())), 10))
		h.Set("Retry-After-Ms", strconv.FormatInt(e.RetryAfter.Milliseconds(), 10))
	}
	if e.Code == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="understudy"`)
	}
}

// Body is the REST form, on one line, without a newline.
func Body(e *Error) []byte {
	if e.Metadata == nil {
		e.Metadata = map[string]string{}
	}
	body, err := json.Marshal(map[string]*Error{"error": e})
	if err != nil { // strings alone: cannot happen
		return []byte(`{"error":{"code":500,"status":"INTERNAL"}}`)
	}
	return body
}

// Line is the REST form of err for the end of a stream that has begun.
func Line(w http.ResponseWriter, r *http.Request, err error) []byte {
	e := From(err)
	if e.RequestID == "" {
		e.RequestID = requestID(w, r)
	}
	return append(Body(e), '\n')
}

func requestID(w http.ResponseWriter, r *http.Request) string {
	if id := w.Header().Get("X-Request-Id"); id != "" {
		return id
	}
	return r.Header.Get("X-Request-Id")
}

// Name is the canonical name of a code, e.g. "NOT_FOUND".
func Name(code codes.Code) string {
	if name, ok := names[code]; ok {
		return name
	}
	return "UNKNOWN"
}

var names = map[codes.Code]string{
	codes.OK: "OK", codes.Canceled: "CANCELLED", codes.Unknown: "UNKNOWN", codes.InvalidArgument: "INVALID_ARGUMENT",
	codes.DeadlineExceeded: "DEADLINE_EXCEEDED", codes.NotFound: "NOT_FOUND", codes.AlreadyExists: "ALREADY_EXISTS",
	codes.PermissionDenied: "PERMISSION_DENIED", codes.ResourceExhausted: "RESOURCE_EXHAUSTED", codes.FailedPrecondition: "FAILED_PRECONDITION",
	codes.Aborted: "ABORTED", codes.OutOfRange: "OUT_OF_RANGE", codes.Unimplemented: "UNIMPLEMENTED", codes.Internal: "INTERNAL",
	codes.Unavailable: "UNAVAILABLE", codes.DataLoss: "DATA_LOSS", codes.Unauthenticated: "UNAUTHENTICATED",
}

// HTTPStatus is the status of a code, as Google's APIs map it.
func HTTPStatus(code codes.Code) int {
	switch code {
	case codes.OK:
		return http.StatusOK
	case codes.Canceled:
		return statusClientGone
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	case codes.NotFound:
		return http.StatusNotFound
	case codes.AlreadyExists, codes.Aborted:
		return http.StatusConflict
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

var helps = map[string]string{
	"MODEL_NOT_FOUND":       "GET /v1/models lists the models of this server.",
	"VERSION_NOT_FOUND":     "GET /v1/models lists the models of this server with their versions.",
	"SKILL_NOT_FOUND":       "GET /v1/skills lists the skills of this server.",
	"ADAPTER_NOT_FOUND":     "GET /v1/models/<model>/adapters lists the adapters of a model.",
	"INTERACTION_NOT_FOUND": "An interaction's id is in the answer that it belongs to; old ones are erased.",
	"JOB_NOT_FOUND":         "GET /v1/trainingJobs lists the jobs.",
	"MODEL_NOT_LOADED":      "POST /v1/models/<model>:load loads it.",
	"OVERLOADED":            "Call again after the delay in the header retry-after.",
	"BUDGET_EXCEEDED":       "GET /v1/budget shows the budgets and when they start anew.",
	"UNAUTHENTICATED":       "Send a key in the header authorization: Bearer und_..., made by `understudy keys create`.",
	"PERMISSION_DENIED":     "GET /v1/caller shows what this key may do; an admin makes others.",
	"DRAINING":              "Call another replica, or again after the delay in the header retry-after.",
	ServerNotReachable:      "Check that the server runs and that the gateway's --server names it; /readyz tells.",
	RouteNotFound:           "/docs lists every path.",
	MethodNotAllowed:        "The header allow names the methods of this path.",
}

func helpFor(reason string, code codes.Code) string {
	if help, ok := helps[reason]; ok {
		return help
	}
	switch code {
	case codes.InvalidArgument:
		return "The message says what was expected; /docs shows every request with an example."
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return "The logs of gateway and server have the cause under the request id."
	case codes.DeadlineExceeded:
		return "Give more time in the header grpc-timeout or x-timeout-ms, or send less in one call."
	case codes.Unavailable, codes.ResourceExhausted:
		return "Call again after the delay in the header retry-after."
	default:
		return "/docs shows what this call expects and what its errors mean."
	}
}
