// Package paths serves the paths that the older designs of this system promised their callers: POST /task, GET /capabilities, the paths under
// /api, and so on. Each is one call, or a few, of the server's gRPC services. Bodies have the field names of the messages, and the aliases that
// a caller of such a path would expect; docs/rest.md lists them.
package paths

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"understudy.dev/gateway/internal/forward"
	"understudy.dev/gateway/internal/wireerr"
	pb "understudy.dev/gen/understudy/v1"
)

// api holds the server's services.
type api struct {
	inference pb.InferenceServiceClient
	feedbacks pb.FeedbackServiceClient
	skills    pb.SkillServiceClient
	models    pb.ModelServiceClient
	training  pb.TrainingServiceClient
	stats     pb.StatsServiceClient
	health    grpc_health_v1.HealthClient
}

// route is a method and a path with who serves it.
type route struct {
	method, path string
	serve        func(*api, context.Context, *http.Request) (any, error)
}

// routes are all that this package serves.
var routes = []route{
	{http.MethodPost, "/task", (*api).task},
	{http.MethodPost, "/feedback", (*api).feedback},
	{http.MethodGet, "/capabilities", (*api).capabilities},
	{http.MethodGet, "/models", (*api).listModels},
	{http.MethodGet, "/stats", (*api).figures},
	{http.MethodGet, "/api/models/status", (*api).modelStatus},
	{http.MethodPost, "/api/models/init", (*api).loadModel},
	{http.MethodGet, "/api/budget/status", (*api).budget},
	{http.MethodPost, "/api/agents", (*api).agent},
	{http.MethodPost, "/api/training/jobs", (*api).createJob},
	{http.MethodGet, "/api/training/jobs/{id}", (*api).getJob},
	{http.MethodDelete, "/api/training/jobs/{id}", (*api).cancelJob},
	{http.MethodGet, "/api/training/jobs/{id}/logs", (*api).jobLogs},
	{http.MethodGet, "/api/models", (*api).listModels},
	{http.MethodGet, "/api/models/{id}", (*api).getModel},
	{http.MethodDelete, "/api/models/{id}", (*api).deleteModel},
	{http.MethodPost, "/api/models/{id}/deploy", (*api).deployModel},
	{http.MethodPost, "/api/inference/{model_id}", (*api).infer},
	{http.MethodPost, "/api/inference/{model_id}/batch", (*api).inferBatch},
	{http.MethodGet, "/health", (*api).healthy},
	{http.MethodPost, "/models/load", (*api).loadModel},
	{http.MethodPost, "/models/infer", (*api).inferNamed},
}

// Register puts the paths on mux. Another method of a path is answered with 405 and the methods that there are.
func Register(mux *http.ServeMux, conn grpc.ClientConnInterface) {
	a := &api{
		inference: pb.NewInferenceServiceClient(conn),
		feedbacks: pb.NewFeedbackServiceClient(conn),
		skills:    pb.NewSkillServiceClient(conn),
		models:    pb.NewModelServiceClient(conn),
		training:  pb.NewTrainingServiceClient(conn),
		stats:     pb.NewStatsServiceClient(conn),
		health:    grpc_health_v1.NewHealthClient(conn),
	}
	byPath := map[string][]route{}
	for _, one := range routes {
		byPath[one.path] = append(byPath[one.path], one)
	}
	for path, served := range byPath {
		// One pattern for all methods: what is not served on a path is not to reach what stands at "/".
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { a.choose(w, r, served) })
	}
}

func (a *api) choose(w http.ResponseWriter, r *http.Request, served []route) {
	allowed := []string{}
	for _, one := range served {
		if one.method == r.Method || one.method == http.MethodGet && r.Method == http.MethodHead {
			a.serve(w, r, one)
			return
		}
		allowed = append(allowed, one.method)
	}
	refuseMethod(w, r, allowed)
}

func (a *api) serve(w http.ResponseWriter, r *http.Request, one route) {
	ctx, cancel, err := forward.Context(r)
	if err != nil {
		wireerr.Write(w, r, err)
		return
	}
	defer cancel()
	answer, err := one.serve(a, ctx, r)
	if err != nil {
		wireerr.Write(w, r, err)
		return
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(answer); err != nil {
		wireerr.Write(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(out.Bytes()) // a caller that has left needs no answer
}

func refuseMethod(w http.ResponseWriter, r *http.Request, allowed []string) {
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	message := fmt.Sprintf("%s is not served here; expected %s", r.Method, strings.Join(allowed, " or "))
	wireerr.Write(w, r, wireerr.New(http.StatusMethodNotAllowed, codes.Unimplemented, wireerr.MethodNotAllowed, message, "The header allow names the methods of this path."))
}

// object is an answer: names to JSON values.
type object map[string]json.RawMessage

// flat gives a message's fields as protojson writes them.
func flat(message proto.Message) (object, error) {
	raw, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(message)
	if err != nil {
		return nil, err
	}
	answer := object{}
	return answer, json.Unmarshal(raw, &answer)
}

// invalid is an error of the request, in the form of the server's own.
func invalid(field, format string, values ...any) error {
	refused := status.Newf(codes.InvalidArgument, format, values...)
	detailed, err := refused.WithDetails(&errdetails.ErrorInfo{
		Reason: "INVALID_ARGUMENT", Domain: "understudy.dev", Metadata: map[string]string{"field": field},
	})
	if err != nil {
		return refused.Err()
	}
	return detailed.Err()
}

// word is an enum value without its prefix, in lower case.
func word(value, prefix string) string { return strings.ToLower(strings.TrimPrefix(value, prefix)) }

// queryInt reads a number of the query into target; without one target stays.
func queryInt(r *http.Request, name string, target *int32) error {
	text := r.URL.Query().Get(name)
	if text == "" {
		return nil
	}
	value, err := strconv.ParseInt(text, 10, 32)
	if err != nil {
		return invalid(name, "`%s` is no whole number; expected for example %s=10", name, name)
	}
	*target = int32(value)
	return nil
}
