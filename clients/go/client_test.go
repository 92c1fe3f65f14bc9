package understudy_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	understudy "understudy.dev/client"
	pb "understudy.dev/gen/understudy/v1"
)

// What the Python client was answered, see tests/clients/test_languages.py.
type expected struct {
	Texts      []string    `json:"texts"`
	Embeddings [][]float64 `json:"embeddings"`
	Labels     [][][2]any  `json:"labels"`
	Skill      string      `json:"skill"`
	Answers    []string    `json:"answers"`
	Prompt     string      `json:"prompt"`
	Text       string      `json:"text"`
	Model      string      `json:"model"`
	Sampling   struct {
		Temperature float32 `json:"temperature"`
		Seed        int64   `json:"seed"`
		MaxTokens   int32   `json:"max_tokens"`
	} `json:"sampling"`
}

func setting(t *testing.T, name string) string {
	t.Helper()
	value := os.Getenv(name)
	if value == "" {
		t.Skipf("%s is not set; pytest sets it", name)
	}
	return value
}

func connect(t *testing.T, address string, options understudy.Options) *understudy.Client {
	t.Helper()
	client, err := understudy.Connect(address, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func server(t *testing.T) (*understudy.Client, *expected) {
	t.Helper()
	client := connect(t, setting(t, "UNDERSTUDY_ADDRESS"), understudy.Options{APIKey: os.Getenv("UNDERSTUDY_API_KEY")})
	data, err := os.ReadFile(setting(t, "UNDERSTUDY_EXPECTED"))
	if err != nil {
		t.Fatal(err)
	}
	want := new(expected)
	if err := json.Unmarshal(data, want); err != nil {
		t.Fatal(err)
	}
	return client, want
}

func failure(t *testing.T, err error) *understudy.Error {
	t.Helper()
	failed, ok := errors.AsType[*understudy.Error](err)
	if !ok {
		t.Fatalf("expected an *understudy.Error, got %v", err)
	}
	return failed
}

func TestEmbeddingsAreThoseOfPython(t *testing.T) {
	client, want := server(t)
	vectors, err := client.Embed(t.Context(), want.Texts...)
	if err != nil {
		t.Fatal(err)
	}
	if len(vectors) != len(want.Embeddings) {
		t.Fatalf("%d vectors for %d texts", len(vectors), len(want.Texts))
	}
	for i, vector := range vectors {
		if len(vector) != len(want.Embeddings[i]) {
			t.Fatalf("vector %d has %d values", i, len(vector))
		}
		for j, value := range vector {
			if math.Abs(float64(value)-want.Embeddings[i][j]) > 1e-6 {
				t.Fatalf("vector %d differs at %d: %v, %v", i, j, value, want.Embeddings[i][j])
			}
		}
	}
}

func TestClassesAreThoseOfPython(t *testing.T) {
	client, want := server(t)
	request := &pb.ClassifyRequest{}
	for _, text := range want.Texts {
		request.Inputs = append(request.Inputs, &pb.ClassifyInput{Text: text})
	}
	response, err := client.Inference.Classify(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	for i, result := range response.Results {
		for j, label := range result.Labels {
			if label.Name != want.Labels[i][j][0] || math.Abs(float64(label.Score)-want.Labels[i][j][1].(float64)) > 1e-6 {
				t.Fatalf("text %d, label %d: %v, expected %v", i, j, label, want.Labels[i][j])
			}
		}
	}
}

func TestASkillAnswersAndTakesFeedback(t *testing.T) {
	client, want := server(t)
	results, err := client.Run(t.Context(), want.Skill, want.Texts...)
	if err != nil {
		t.Fatal(err)
	}
	for i, result := range results {
		if result.OutputText != want.Answers[i] || !result.Decision.Local {
			t.Fatalf("answer %d: %v", i, result)
		}
	}
	said := &pb.Feedback{InteractionId: results[0].InteractionId, Thumb: pb.Thumb_THUMB_UP, Comment: "from Go"}
	kept, err := client.Say(t.Context(), said)
	if err != nil || kept.FeedbackId == "" || kept.Comment != "from Go" {
		t.Fatalf("feedback: %v, %v", kept, err)
	}
}

func TestAStreamIsTheWholeTextOfTheSameSeed(t *testing.T) {
	client, want := server(t)
	request := &pb.GenerateRequest{
		Input: &pb.GenerateRequest_Prompt{Prompt: want.Prompt},
		Model: &pb.ModelSelector{Name: want.Model},
		Sampling: &pb.Sampling{
			Temperature: &want.Sampling.Temperature, Seed: &want.Sampling.Seed, MaxTokens: want.Sampling.MaxTokens,
		},
	}
	var text strings.Builder
	var last *pb.GenerateResponse
	for response, err := range client.Generate(t.Context(), request) {
		if err != nil {
			t.Fatal(err)
		}
		for _, delta := range response.Deltas {
			text.WriteString(delta.Text)
		}
		last = response
	}
	if text.String() != want.Text {
		t.Fatalf("%q, expected %q", text.String(), want.Text)
	}
	if last.GetUsage().GetOutputTokens() != int64(want.Sampling.MaxTokens) || last.GetModel().GetName() != want.Model {
		t.Fatalf("the last message is %v", last)
	}
}

func TestAnUnknownModelHasItsReason(t *testing.T) {
	client, _ := server(t)
	_, err := client.Inference.Embed(t.Context(), &pb.EmbedRequest{Texts: []string{"x"}, Model: &pb.ModelSelector{Name: "nobody"}})
	failed := failure(t, err)
	if failed.Code != codes.NotFound || failed.Reason != "MODEL_NOT_FOUND" || failed.Metadata["model"] != "nobody" || failed.RequestID == "" {
		t.Fatalf("%#v", failed)
	}
	if status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "MODEL_NOT_FOUND") {
		t.Fatalf("status %v, text %q", status.Code(err), err)
	}
	for _, err := range client.Generate(t.Context(), &pb.GenerateRequest{
		Input: &pb.GenerateRequest_Prompt{Prompt: "x"}, Model: &pb.ModelSelector{Name: "nobody"},
	}) {
		if failed := failure(t, err); failed.Reason != "MODEL_NOT_FOUND" {
			t.Fatalf("%#v", failed)
		}
	}
	_, err = client.Embed(t.Context(), "fine", "")
	if failed := failure(t, err); failed.Code != codes.InvalidArgument || failed.Reason != "INVALID_ARGUMENT" {
		t.Fatalf("%#v", failed)
	}
}

func endless() *pb.GenerateRequest {
	greedy := float32(0)
	return &pb.GenerateRequest{
		Input: &pb.GenerateRequest_Prompt{Prompt: "tell"}, Sampling: &pb.Sampling{Temperature: &greedy, IgnoreEos: true},
	}
}

func TestADeadlineSaysWhere(t *testing.T) {
	client, _ := server(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var failed *understudy.Error
	for _, err := range client.Generate(ctx, endless()) {
		if err != nil {
			failed = failure(t, err)
		}
	}
	if failed == nil || failed.Code != codes.DeadlineExceeded || failed.Reason != "DEADLINE_EXCEEDED" || failed.Metadata["stage"] == "" {
		t.Fatalf("%#v", failed)
	}
	if !errors.Is(failed, context.DeadlineExceeded) {
		t.Fatal("it is no context.DeadlineExceeded")
	}
}

func TestLeavingAStreamEndsIt(t *testing.T) {
	client, _ := server(t)
	// More than run at once: places that were not freed would keep the later ones from starting for 2,000 tokens of each before them.
	for range 12 {
		for response, err := range client.Generate(t.Context(), endless()) {
			if err != nil {
				t.Fatal(err)
			}
			if len(response.Deltas) > 0 {
				break
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var failed *understudy.Error
	for _, err := range client.Generate(ctx, endless()) {
		cancel()
		if err != nil {
			failed = failure(t, err)
		}
	}
	if failed == nil || failed.Reason != "CANCELLED" || !errors.Is(failed, context.Canceled) {
		t.Fatalf("%#v", failed)
	}
}

func TestKeyMetadataAndDeadlineGoWithEveryCall(t *testing.T) {
	client := connect(t, setting(t, "UNDERSTUDY_SCRIPTED"), understudy.Options{APIKey: "und_a_b", Metadata: map[string]string{"x-request-id": "go-1"}})
	response, err := client.Inference.Embed(t.Context(), &pb.EmbedRequest{Texts: []string{"ok:go"}})
	if err != nil {
		t.Fatal(err)
	}
	if response.Model.Name != "Bearer und_a_b" || response.Model.Version != "go-1" {
		t.Fatalf("the server saw %v", response.Model)
	}
	if left := response.Usage.InputTokens; left < 30_000 || left > 60_000 {
		t.Fatalf("%d ms of 60 s were left", left)
	}
}

func TestACallWithoutAKeyIsRefused(t *testing.T) {
	setting(t, "UNDERSTUDY_API_KEY")
	client := connect(t, setting(t, "UNDERSTUDY_ADDRESS"), understudy.Options{})
	_, err := client.Embed(t.Context(), "x")
	if failed := failure(t, err); failed.Code != codes.Unauthenticated || failed.Reason != "UNAUTHENTICATED" {
		t.Fatalf("%#v", failed)
	}
}

func TestEncryption(t *testing.T) {
	pem, err := os.ReadFile(setting(t, "UNDERSTUDY_CA"))
	if err != nil {
		t.Fatal(err)
	}
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM(pem)
	address := setting(t, "UNDERSTUDY_SCRIPTED_TLS")
	client := connect(t, address, understudy.Options{TLS: &tls.Config{RootCAs: authorities}})
	if _, err := client.Embed(t.Context(), "ok:go-tls"); err != nil {
		t.Fatal(err)
	}
	stranger := connect(t, address, understudy.Options{TLS: &tls.Config{}})
	_, err = stranger.Embed(t.Context(), "ok:go-tls")
	if failed := failure(t, err); failed.Code != codes.Unavailable {
		t.Fatalf("%#v", failed)
	}
}

func TestWhatIsSentAgain(t *testing.T) {
	client := connect(t, setting(t, "UNDERSTUDY_SCRIPTED"), understudy.Options{})
	calls := func(name string) float32 {
		t.Helper()
		vectors, err := client.Embed(t.Context(), "ok:"+name)
		if err != nil {
			t.Fatal(err)
		}
		return vectors[0][0] - 1
	}
	for _, test := range []struct {
		what  string
		calls float32
		code  codes.Code
	}{
		{"again", 3, codes.OK},
		{"full", 2, codes.OK},
		{"plain", 1, codes.Unavailable},
		{"paid", 1, codes.Unavailable},
		{"later", 1, codes.Unavailable},
	} {
		t.Run(test.what, func(t *testing.T) {
			name := fmt.Sprint("go-", test.what, os.Getpid())
			_, err := client.Embed(t.Context(), test.what+":"+name)
			if status.Code(err) != test.code {
				t.Fatalf("%v", err)
			}
			if got := calls(name); got != test.calls {
				t.Fatalf("sent %v times", got)
			}
			if err != nil && failure(t, err).Metadata["model"] != "scripted" {
				t.Fatalf("%#v", err)
			}
		})
	}
	kept, err := client.Say(t.Context(), &pb.Feedback{InteractionId: "one"})
	if err != nil || kept.FeedbackId == "" {
		t.Fatalf("feedback: %v, %v", kept, err)
	}
}
