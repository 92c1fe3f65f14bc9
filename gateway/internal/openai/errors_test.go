package openai

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "understudy.dev/gen/understudy/v1"
)

func openScripted(messages []*pb.GenerateResponse) func(context.Context) (receiver, error) {
	return func(context.Context) (receiver, error) { return &scripted{messages}, nil }
}

func failed(t *testing.T, code codes.Code, reason, field string, wait time.Duration) error {
	t.Helper()
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: reason, Domain: "understudy.dev", Metadata: map[string]string{"field": field}}}
	if wait > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(wait)})
	}
	found, err := status.New(code, field+" is wrong.").WithDetails(details...)
	if err != nil {
		t.Fatal(err)
	}
	return found.Err()
}

func TestErrorsHaveOpenAIsFormAndStatuses(t *testing.T) {
	for _, one := range []struct {
		code   codes.Code
		reason string
		field  string
		status int
		want   errorFields
	}{
		{codes.InvalidArgument, "INVALID_ARGUMENT", "sampling.top_p", 400, errorFields{"top_p is wrong.", invalidRequest, ptr("top_p"), ptr("invalid_argument")}},
		{codes.InvalidArgument, "INPUT_TOO_LONG", "", 400, errorFields{" is wrong.", invalidRequest, nil, ptr("context_length_exceeded")}},
		{codes.InvalidArgument, "INVALID_ARGUMENT", "chat.messages[2].role", 400, errorFields{"messages[2].role is wrong.", invalidRequest, ptr("messages[2].role"), ptr("invalid_argument")}},
		{codes.NotFound, "MODEL_NOT_FOUND", "", 404, errorFields{" is wrong.", invalidRequest, ptr("model"), ptr("model_not_found")}},
		{codes.NotFound, "SKILL_NOT_FOUND", "skill", 404, errorFields{"skill is wrong.", invalidRequest, ptr("model"), ptr("model_not_found")}},
		{codes.FailedPrecondition, "MODEL_NOT_LOADED", "", 404, errorFields{" is wrong.", invalidRequest, ptr("model"), ptr("model_not_found")}},
		{codes.FailedPrecondition, "TASK_NOT_SUPPORTED", "", 400, errorFields{" is wrong.", invalidRequest, nil, ptr("task_not_supported")}},
		{codes.Unauthenticated, "UNAUTHENTICATED", "", 401, errorFields{" is wrong.", "authentication_error", nil, ptr("invalid_api_key")}},
		{codes.PermissionDenied, "PERMISSION_DENIED", "", 403, errorFields{" is wrong.", "permission_error", nil, ptr("permission_denied")}},
		{codes.ResourceExhausted, "OVERLOADED", "", 429, errorFields{" is wrong.", "rate_limit_error", nil, ptr("rate_limit_exceeded")}},
		{codes.ResourceExhausted, "BUDGET_EXCEEDED", "", 429, errorFields{" is wrong.", "insufficient_quota", nil, ptr("insufficient_quota")}},
		{codes.Unavailable, "DRAINING", "", 503, errorFields{" is wrong.", "server_error", nil, ptr("draining")}},
		{codes.DeadlineExceeded, "DEADLINE_EXCEEDED", "", 504, errorFields{" is wrong.", "timeout_error", nil, ptr("deadline_exceeded")}},
		{codes.Internal, "INTERNAL", "", 500, errorFields{" is wrong.", "server_error", nil, ptr("internal")}},
		{codes.Unknown, "", "", 500, errorFields{" is wrong.", "server_error", nil, nil}},
	} {
		t.Run(one.code.String()+one.reason+one.field, func(t *testing.T) {
			recorder := httptest.NewRecorder()
			j := job{names: fieldNames}
			writeError(recorder, j.errorOf(failed(t, one.code, one.reason, one.field, 1500*time.Millisecond)))
			var body errorBody
			if err := json.Unmarshal(recorder.Body.Bytes(), &body); err != nil {
				t.Fatal(err)
			}
			got, _ := json.Marshal(body.Error)
			want, _ := json.Marshal(one.want)
			if recorder.Code != one.status || string(got) != string(want) {
				t.Errorf("%d %s; want %d %s", recorder.Code, got, one.status, want)
			}
			if recorder.Header().Get("Retry-After") != "2" || recorder.Header().Get("Retry-After-Ms") != "1500" {
				t.Errorf("headers %v", recorder.Header())
			}
			if final := recorder.Header().Get("X-Should-Retry") == "false"; final != (one.reason == "BUDGET_EXCEEDED") {
				t.Errorf("final: %v", final)
			}
		})
	}
}

func TestOurOwnMistakesSayNothing(t *testing.T) {
	if found := errorOf(http.ErrBodyNotAllowed); found.status != 500 || found.message == http.ErrBodyNotAllowed.Error() {
		t.Errorf("%+v", found)
	}
}

// Generate's request is sent as GenerateText's: both must have the same fields, on the wire too.
func TestTheTwoGenerationRequestsAreAlike(t *testing.T) {
	one, other := (&pb.GenerateRequest{}).ProtoReflect().Descriptor().Fields(), (&pb.GenerateTextRequest{}).ProtoReflect().Descriptor().Fields()
	if one.Len() != other.Len() {
		t.Fatalf("%d fields and %d", one.Len(), other.Len())
	}
	for index := range one.Len() {
		a := one.Get(index)
		b := other.ByNumber(a.Number())
		if b == nil || a.Name() != b.Name() || a.Kind() != b.Kind() || a.Cardinality() != b.Cardinality() || typeOf(a) != typeOf(b) {
			t.Errorf("%v and %v", a, b)
		}
	}
	data, err := proto.Marshal(&pb.GenerateRequest{Skill: "s", ToolChoice: "none", Input: &pb.GenerateRequest_Prompt{Prompt: "p"}})
	back := &pb.GenerateTextRequest{}
	if err != nil || proto.Unmarshal(data, back) != nil || back.GetPrompt() != "p" || back.GetSkill() != "s" || back.GetToolChoice() != "none" {
		t.Errorf("%v", back)
	}
}

func typeOf(field protoreflect.FieldDescriptor) protoreflect.FullName {
	if message := field.Message(); message != nil {
		return message.FullName()
	}
	if enum := field.Enum(); enum != nil {
		return enum.FullName()
	}
	return ""
}
