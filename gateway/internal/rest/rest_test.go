package rest

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// called is a connection that only remembers what was called.
type called struct{ methods map[string]bool }

func (c *called) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	c.methods[method] = true
	return status.Error(codes.Aborted, "called")
}

func (c *called) NewStream(_ context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	c.methods[method] = true
	return nil, status.Error(codes.Aborted, "called")
}

func rules(method protoreflect.MethodDescriptor) []*annotations.HttpRule {
	rule, _ := proto.GetExtension(method.Options(), annotations.E_Http).(*annotations.HttpRule)
	if rule == nil {
		return nil
	}
	return append([]*annotations.HttpRule{rule}, rule.GetAdditionalBindings()...)
}

func target(rule *annotations.HttpRule) (string, string) {
	for verb, path := range map[string]string{
		http.MethodGet: rule.GetGet(), http.MethodPost: rule.GetPost(), http.MethodPut: rule.GetPut(),
		http.MethodDelete: rule.GetDelete(), http.MethodPatch: rule.GetPatch(),
	} {
		if path != "" {
			for strings.Contains(path, "{") { // {name=models/*} becomes models/x
				before, rest, _ := strings.Cut(path, "{")
				inside, after, _ := strings.Cut(rest, "}")
				_, pattern, _ := strings.Cut(inside, "=")
				path = before + strings.ReplaceAll(pattern, "*", "x") + after
			}
			return verb, path
		}
	}
	return "", ""
}

func TestEveryAnnotatedMethodIsCalledByItsPath(t *testing.T) {
	conn := &called{methods: map[string]bool{}}
	handler, err := New(conn, Options{HeaderDelay: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	protoregistry.GlobalFiles.RangeFilesByPackage("understudy.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				method := service.Methods().Get(j)
				full := "/" + string(service.FullName()) + "/" + string(method.Name())
				for _, rule := range rules(method) {
					verb, path := target(rule)
					delete(conn.methods, full)
					w := httptest.NewRecorder()
					var body *strings.Reader
					if body = strings.NewReader(""); rule.GetBody() != "" {
						body = strings.NewReader("{}")
					}
					handler.ServeHTTP(w, httptest.NewRequest(verb, path, body))
					if !conn.methods[full] || w.Code != http.StatusConflict {
						t.Errorf("%s %s did not call %s: %d %s", verb, path, full, w.Code, w.Body)
					}
					checked++
				}
			}
		}
		return true
	})
	if checked < 40 {
		t.Errorf("only %d bindings were found", checked)
	}
}

func TestBodiesAreOneValue(t *testing.T) {
	for body, code := range map[string]int{
		"": http.StatusConflict, "{}": http.StatusConflict, " {} ": http.StatusConflict, `{"texts":["a"]}`: http.StatusConflict,
		"{} {}": http.StatusBadRequest, "{}x": http.StatusBadRequest, "{": http.StatusBadRequest, "[]": http.StatusBadRequest,
		"null": http.StatusBadRequest, `{"nonsense":1}`: http.StatusBadRequest,
	} {
		handler, err := New(&called{methods: map[string]bool{}}, Options{HeaderDelay: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{"/v1/inference:embed", "/v1/inference:generate"} {
			if path == "/v1/inference:generate" && strings.Contains(body, "texts") {
				continue
			}
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, strings.NewReader(body)))
			if w.Code != code {
				t.Errorf("%s %q: %d %s, want %d", path, body, w.Code, w.Body, code)
			}
		}
	}
}
