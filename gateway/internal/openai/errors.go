package openai

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const invalidRequest = "invalid_request_error"

// apiError is an error in OpenAI's form; param and code may be empty, which clients see as null.
type apiError struct {
	status     int
	message    string
	kind       string
	param      string
	code       string
	retryAfter time.Duration
	final      bool // sending the request again cannot help: clients that would are told so
}

func (e *apiError) Error() string { return e.message }

// invalid refuses a request by its field.
func invalid(param, format string, args ...any) *apiError {
	return &apiError{status: http.StatusBadRequest, kind: invalidRequest, param: param, message: fmt.Sprintf(format, args...)}
}

// Statuses and types by gRPC's codes. 499 is what proxies log for a caller that left.
var byCode = map[codes.Code]struct {
	status int
	kind   string
}{
	codes.InvalidArgument:    {http.StatusBadRequest, invalidRequest},
	codes.OutOfRange:         {http.StatusBadRequest, invalidRequest},
	codes.FailedPrecondition: {http.StatusBadRequest, invalidRequest},
	codes.Unauthenticated:    {http.StatusUnauthorized, "authentication_error"},
	codes.PermissionDenied:   {http.StatusForbidden, "permission_error"},
	codes.NotFound:           {http.StatusNotFound, invalidRequest},
	codes.AlreadyExists:      {http.StatusConflict, invalidRequest},
	codes.Aborted:            {http.StatusConflict, invalidRequest},
	codes.ResourceExhausted:  {http.StatusTooManyRequests, "rate_limit_error"},
	codes.Unavailable:        {http.StatusServiceUnavailable, "server_error"},
	codes.DeadlineExceeded:   {http.StatusGatewayTimeout, "timeout_error"},
	codes.Canceled:           {499, "server_error"},
	codes.Unimplemented:      {http.StatusNotImplemented, "server_error"},
}

// What OpenAI's clients and their wrappers look for, by our reasons.
var byReason = map[string]string{
	"MODEL_NOT_FOUND":      "model_not_found",
	"MODEL_NOT_LOADED":     "model_not_found",
	"VERSION_NOT_FOUND":    "model_not_found",
	"SKILL_NOT_FOUND":      "model_not_found",
	"ADAPTER_NOT_FOUND":    "model_not_found",
	"INPUT_TOO_LONG":       "context_length_exceeded",
	"UNAUTHENTICATED":      "invalid_api_key",
	"BUDGET_EXCEEDED":      "insufficient_quota",
	"OVERLOADED":           "rate_limit_exceeded",
	"RATE_LIMITED":         "rate_limit_exceeded",
	"RESOURCE_EXHAUSTED":   "rate_limit_exceeded",
	"PROVIDER_UNAVAILABLE": "provider_unavailable",
}

// errorOf gives any error OpenAI's form. What is no gRPC status is our own mistake, and its text stays here.
func errorOf(err error) *apiError {
	var known *apiError
	if errors.As(err, &known) {
		return known
	}
	if found, ok := status.FromError(err); ok {
		return errorOfStatus(found.Proto())
	}
	return &apiError{status: http.StatusInternalServerError, kind: "server_error", message: "the gateway failed on this request."}
}

// errorOfStatus is for whole calls and for single items that failed.
func errorOfStatus(found *spb.Status) *apiError {
	place, ok := byCode[codes.Code(found.GetCode())]
	if !ok {
		place.status, place.kind = http.StatusInternalServerError, "server_error"
	}
	result := &apiError{status: place.status, kind: place.kind, message: found.GetMessage()}
	for _, detail := range status.FromProto(found).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			result.code = byReason[detail.GetReason()]
			if result.code == "" {
				result.code = strings.ToLower(detail.GetReason())
			}
			result.param = detail.GetMetadata()["field"]
			result.final = detail.GetReason() == "BUDGET_EXCEEDED"
		case *errdetails.RetryInfo:
			result.retryAfter = detail.GetRetryDelay().AsDuration()
		}
	}
	if result.code == "" && codes.Code(found.GetCode()) == codes.DeadlineExceeded { // the gateway's own clock ran out first
		result.code = "deadline_exceeded"
	}
	if result.code == "model_not_found" {
		result.status, result.param = http.StatusNotFound, "model"
	}
	if result.code == "insufficient_quota" {
		result.kind = "insufficient_quota"
	}
	return result
}

// renamed gives fields the names that the caller knows: what the server calls a key of `names` is its value here. The longest key counts.
func (e *apiError) renamed(names map[string]string) *apiError {
	best := ""
	for from := range names {
		rest, ok := strings.CutPrefix(e.param, from)
		whole := rest == "" || strings.HasSuffix(from, ".") || strings.ContainsAny(rest[:1], ".[")
		if ok && whole && len(from) > len(best) {
			best = from
		}
	}
	if best != "" {
		old := e.param
		e.param = names[best] + strings.TrimPrefix(old, best)
		if strings.ContainsAny(old, "._[") { // "skill" may be a word of the sentence
			e.message = strings.ReplaceAll(e.message, old, e.param)
		}
	}
	return e
}

type errorBody struct {
	Error errorFields `json:"error"`
}

type errorFields struct {
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"`
	Code    *string `json:"code"`
}

func (e *apiError) body() []byte {
	fields := errorFields{Message: e.message, Type: e.kind}
	if e.param != "" {
		fields.Param = &e.param
	}
	if e.code != "" {
		fields.Code = &e.code
	}
	found, err := json.Marshal(errorBody{fields})
	if err != nil { // strings alone: there is nothing that could fail
		return []byte(`{"error":{"message":"","type":"server_error","param":null,"code":null}}`)
	}
	return found
}

func writeError(w http.ResponseWriter, e *apiError) {
	header := w.Header()
	header.Set("Content-Type", "application/json")
	if e.retryAfter > 0 {
		// OpenAI's own clients read the second, everybody else the first.
		header.Set("Retry-After", strconv.Itoa(int(math.Ceil(e.retryAfter.Seconds()))))
		header.Set("Retry-After-Ms", strconv.FormatInt(e.retryAfter.Milliseconds(), 10))
	}
	if e.final {
		header.Set("X-Should-Retry", "false")
	}
	if e.status == http.StatusUnauthorized {
		header.Set("WWW-Authenticate", "Bearer")
	}
	w.WriteHeader(e.status)
	_, _ = w.Write(append(e.body(), '\n'))
}
