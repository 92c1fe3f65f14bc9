package rest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"github.com/grpc-ecosystem/grpc-gateway/v2/utilities"
	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"understudy.dev/gateway/internal/wireerr"
	gen "understudy.dev/gen/understudy/v1"
)

// ContentType of streams: a JSON object a line, {"result": message}, and {"error": ...} as the last where the call fails midway.
const ContentType = "application/x-ndjson"

// grpc-gateway's own streams send their headers with the first message, and write an error in another form than Write does; so the handlers of
// server streams are these. They are registered after the generated ones, and so are found before them.
func registerStreams(mux *runtime.ServeMux, conn grpc.ClientConnInterface, options Options) error {
	var failed error
	protoregistry.GlobalFiles.RangeFilesByPackage(gen.File_understudy_v1_inference_service_proto.Package(), func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				if method := methods.Get(j); method.IsStreamingServer() && !method.IsStreamingClient() && failed == nil {
					failed = registerStream(mux, conn, options, method)
				}
			}
		}
		return failed == nil
	})
	return failed
}

// streamed is an RPC with many answers.
type streamed struct {
	conn    grpc.ClientConnInterface
	options Options
	path    string // "/package.Service/Method"
	request protoreflect.MessageType
	answer  protoreflect.MessageType
	body    string // of its HTTP rule: "*" or ""
}

func registerStream(mux *runtime.ServeMux, conn grpc.ClientConnInterface, options Options, method protoreflect.MethodDescriptor) error {
	rule, _ := proto.GetExtension(method.Options(), annotations.E_Http).(*annotations.HttpRule)
	if rule == nil {
		return nil
	}
	verb, pattern := http.MethodPost, rule.GetPost()
	if rule.GetGet() != "" {
		verb, pattern = http.MethodGet, rule.GetGet()
	}
	if pattern == "" || (rule.GetBody() != "*" && rule.GetBody() != "") {
		return fmt.Errorf("%s: its HTTP rule is neither a GET nor a POST with body \"*\"", method.FullName())
	}
	request, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
	if err != nil {
		return fmt.Errorf("%s: %w", method.FullName(), err)
	}
	answer, err := protoregistry.GlobalTypes.FindMessageByName(method.Output().FullName())
	if err != nil {
		return fmt.Errorf("%s: %w", method.FullName(), err)
	}
	s := &streamed{conn, options, fmt.Sprintf("/%s/%s", method.Parent().FullName(), method.Name()), request, answer, rule.GetBody()}
	return mux.HandlePath(verb, pattern, s.serve)
}

func (s *streamed) serve(w http.ResponseWriter, r *http.Request, params map[string]string) {
	request, err := s.read(r, params)
	if err != nil {
		wireerr.Write(w, r, plain(err))
		return
	}
	out := &lines{w: w, r: r}
	timer := time.AfterFunc(s.options.HeaderDelay, out.early)
	defer timer.Stop()
	if out.stream, err = s.open(r.Context(), request); err == nil {
		err = out.copy(s.answer.New().Interface())
	}
	out.finish(err)
}

func (s *streamed) open(ctx context.Context, request proto.Message) (grpc.ClientStream, error) {
	stream, err := s.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, s.path)
	if err == nil {
		err = stream.SendMsg(request)
	}
	if err == nil || errors.Is(err, io.EOF) { // io.EOF: RecvMsg has the status
		err = stream.CloseSend()
	}
	if err != nil {
		return nil, err
	}
	return stream, nil
}

func (s *streamed) read(r *http.Request, params map[string]string) (proto.Message, error) {
	request := s.request.New().Interface()
	if s.body == "*" {
		data, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, "the body ended too early.")
		}
		if len(strings.TrimSpace(string(data))) > 0 {
			if err := Marshaler.UnmarshalOptions.Unmarshal(data, request); err != nil {
				return nil, status.Error(codes.InvalidArgument, err.Error())
			}
		}
	} else if err := s.query(r, request); err != nil {
		return nil, err
	}
	for name, value := range params {
		if err := runtime.PopulateFieldFromPath(request, name, value); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "the path's part %q: %v", name, err)
		}
	}
	return request, nil
}

func (s *streamed) query(r *http.Request, request proto.Message) error {
	if err := r.ParseForm(); err != nil {
		return status.Error(codes.InvalidArgument, "the query cannot be read; expected name=value pairs joined by &.")
	}
	if err := runtime.PopulateQueryParameters(request, r.Form, utilities.NewDoubleArray(nil)); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	return nil
}

// lines writes a stream's messages. Its headers go with the first message, or before it, when that takes longer: then whoever waits knows that the
// call runs, and no proxy gives up. Until then a failure has its own HTTP status.
type lines struct {
	w      http.ResponseWriter
	r      *http.Request
	stream grpc.ClientStream // nil until it is open
	mu     sync.Mutex        // held while the headers are written, by whoever comes first
	begun  bool
}

// copy writes messages until the stream ends; nil: it ended well.
func (l *lines) copy(message proto.Message) error {
	flusher := http.NewResponseController(l.w)
	var line []byte
	for {
		if err := l.stream.RecvMsg(message); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var err error
		line, err = Marshaler.MarshalOptions.MarshalAppend(append(line[:0], `{"result":`...), message)
		if err != nil {
			return fmt.Errorf("writing a message as JSON: %w", err)
		}
		l.begin()
		if _, err := l.w.Write(append(line, "}\n"...)); err != nil {
			return context.Canceled // the client left
		}
		if err := flusher.Flush(); err != nil {
			return context.Canceled
		}
	}
}

// finish writes the headers of an empty stream, or the error: as an answer of its own, or as the last line.
func (l *lines) finish(err error) {
	if cause := context.Cause(l.r.Context()); err != nil && cause != nil {
		err = cause // says more than "cancelled": the gateway stops, for example
	}
	l.mu.Lock()
	begun := l.begun
	if !begun && err != nil {
		l.begun = true // nothing else may write from here on
	}
	l.mu.Unlock()
	switch {
	case err == nil:
		l.begin()
	case !begun:
		wireerr.Write(l.w, l.r, err)
	default:
		_, _ = l.w.Write(wireerr.Line(l.w, l.r, err)) // whoever left cannot be told
	}
}

func (l *lines) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.begun {
		return
	}
	l.begun = true
	if header, err := l.stream.Header(); err == nil { // only a stream that was opened begins here
		for name, values := range header {
			if name, ok := outgoing(name); ok {
				l.w.Header()[http.CanonicalHeaderKey(name)] = values
			}
		}
	}
	l.headers()
}

// early sends the headers where no message came yet.
func (l *lines) early() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.begun || l.r.Context().Err() != nil {
		return
	}
	l.begun = true
	l.headers()
	_ = http.NewResponseController(l.w).Flush() // whoever left cannot be told
}

func (l *lines) headers() {
	h := l.w.Header()
	h.Set("Content-Type", ContentType)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no")
	l.w.WriteHeader(http.StatusOK)
}
