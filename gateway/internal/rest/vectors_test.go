package rest

import (
	"bytes"
	"encoding/json"
	"math"
	"math/rand/v2"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "understudy.dev/gen/understudy/v1"
)

// compact is JSON without the spaces that protojson sets by chance.
func compact(t *testing.T, data []byte) string {
	t.Helper()
	var to bytes.Buffer
	if err := json.Compact(&to, data); err != nil {
		t.Fatalf("%v: %s", err, data)
	}
	return to.String()
}

func alike(t *testing.T, response *pb.EmbedResponse) {
	t.Helper()
	mine, err := Marshaler.Marshal(response)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(response)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := compact(t, mine), compact(t, theirs); got != want {
		t.Fatalf("got  %s\nwant %s", got, want)
	}
}

func TestVectorsAreWrittenAsProtojsonDoes(t *testing.T) {
	alike(t, &pb.EmbedResponse{})
	edges := []float32{
		0, float32(math.Copysign(0, -1)), 1, -1, 1e-6, 9.9e-7, -1e-7, math.SmallestNonzeroFloat32, 1e20, 1e21, -3e38, math.MaxFloat32,
		float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1)), 16777216, 0.1, 1.0 / 3,
	}
	response := &pb.EmbedResponse{
		Results: []*pb.EmbedResult{
			{Embedding: edges},
			{Truncated: true, Embedding: []float32{0.5}},
			{Error: &status.Status{Code: 3, Message: `texts[2] is "[]", with <tags>`}},
			{},
		},
		Model: &pb.ModelUsed{Name: "a[]b", Version: "1"},
		Usage: &pb.Usage{},
	}
	alike(t, response)
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		vector := make([]float32, 64)
		for place := range vector {
			vector[place] = math.Float32frombits(random.Uint32())
		}
		alike(t, &pb.EmbedResponse{Results: []*pb.EmbedResult{{Embedding: vector}}, Timings: &pb.StageTimings{}})
	}
}

// What a field that the messages get later would be: set, and lost.
func TestNoFieldIsLost(t *testing.T) {
	for _, message := range []proto.Message{&pb.EmbedResponse{}, &pb.EmbedResult{}} {
		var names []string
		fields := message.ProtoReflect().Descriptor().Fields()
		for place := range fields.Len() {
			names = append(names, string(fields.Get(place).Name()))
		}
		want := map[protoreflect.Name][]string{
			"EmbedResponse": {"results", "model", "usage", "timings"}, "EmbedResult": {"embedding", "truncated", "error"},
		}[message.ProtoReflect().Descriptor().Name()]
		if len(names) != len(want) {
			t.Fatalf("vectors.go copies %v; the message has %v", want, names)
		}
	}
}

func BenchmarkVectors(b *testing.B) {
	vector := make([]float32, 384)
	for place := range vector {
		vector[place] = rand.Float32() - 0.5
	}
	response := &pb.EmbedResponse{Results: []*pb.EmbedResult{{Embedding: vector}}, Model: &pb.ModelUsed{Name: "m"}, Usage: &pb.Usage{}}
	b.Run("vectors", func(b *testing.B) {
		for b.Loop() {
			if _, err := Marshaler.Marshal(response); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("protojson", func(b *testing.B) {
		for b.Loop() {
			if _, err := Marshaler.MarshalOptions.Marshal(response); err != nil {
				b.Fatal(err)
			}
		}
	})
}
