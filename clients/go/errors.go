package understudy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Error is what a call, or an item of a batch, failed with. errors.Is(err, context.DeadlineExceeded) and context.Canceled hold where they apply.
type Error struct {
	// Code is gRPC's.
	Code codes.Code
	// Message says what was wrong, what was expected, and how to mend it.
	Message string
	// Reason is the server's own, finer code, for example "MODEL_NOT_FOUND": the values of ErrorReason without their prefix. Empty where the
	// server did not answer.
	Reason string
	// Metadata has what varies in the message. Of a deadline "stage" says where it passed; "client" where no answer came in time.
	Metadata map[string]string
	// RequestID is for the operator of the server.
	RequestID string
	// RetryAfter is the wait that the server asks for; 0: it asks for none.
	RetryAfter time.Duration

	status *status.Status
}

// Error gives code, reason and message.
func (e *Error) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("understudy: %s: %s", e.Code, e.Message)
	}
	return fmt.Sprintf("understudy: %s (%s): %s", e.Code, e.Reason, e.Message)
}

// GRPCStatus makes status.FromError and status.Code work.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Is makes errors.Is work with the context's errors.
func (e *Error) Is(target error) bool {
	return target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded || target == context.Canceled && e.Code == codes.Canceled
}

// Field is the part of the request that is to blame, or "".
func (e *Error) Field() string { return e.Metadata["field"] }

// Retryable says whether sending the same again is safe and may help: the server says when, so it has not begun. What providers failed at may
// have been paid.
func (e *Error) Retryable() bool {
	refused := e.Code == codes.Unavailable || e.Code == codes.ResourceExhausted
	return refused && e.RetryAfter > 0 && e.Reason != "PROVIDER_UNAVAILABLE"
}

// FromStatus is the error of an item of a batch: its field Error.
func FromStatus(s *rpcstatus.Status) *Error { return newError(status.FromProto(s), "") }

// Nil stays nil, and io.EOF stays io.EOF.
func fromError(err error, requestID string) error {
	if err == nil || ended(err) {
		return err
	}
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	return newError(s, requestID)
}

func newError(s *status.Status, requestID string) *Error {
	e := &Error{Code: s.Code(), Message: s.Message(), RequestID: requestID, status: s}
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			e.Reason, e.Metadata = d.GetReason(), d.GetMetadata()
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		case *errdetails.RequestInfo:
			e.RequestID = d.GetRequestId()
		}
	}
	switch {
	case e.Reason != "":
	case e.Code == codes.DeadlineExceeded:
		e.Reason, e.Metadata = "DEADLINE_EXCEEDED", map[string]string{"stage": "client"}
	case e.Code == codes.Canceled:
		e.Reason = "CANCELLED"
	}
	return e
}

func ended(err error) bool { return errors.Is(err, io.EOF) }
