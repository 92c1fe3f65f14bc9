package rest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strconv"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "understudy.dev/gen/understudy/v1"
)

// Bytes of a number with its comma, about.
const perNumber = 14

var noItems = []byte("[]")

// vectors writes an answer of Embed as protojson does, which asks reflection for every number and takes half as long again for a vector.
// All but the numbers is protojson's own.
func vectors(options protojson.MarshalOptions, response *pb.EmbedResponse) ([]byte, error) {
	size := 512
	for _, result := range response.GetResults() {
		size += 64 + perNumber*len(result.GetEmbedding())
	}
	results := response.GetResults()
	whole := &pb.EmbedResponse{Model: response.GetModel(), Usage: response.GetUsage(), Timings: response.GetTimings()}
	before, after, err := around(options, whole)
	if err != nil {
		return nil, err
	}
	to := append(append(make([]byte, 0, size), before...), '[')
	for number, result := range results {
		if number > 0 {
			to = append(to, ',')
		}
		before, after, err := around(options, &pb.EmbedResult{Truncated: result.GetTruncated(), Error: result.GetError()})
		if err != nil {
			return nil, err
		}
		to = append(append(to, before...), '[')
		for place, value := range result.GetEmbedding() {
			if place > 0 {
				to = append(to, ',')
			}
			to = appendNumber(to, value)
		}
		to = append(append(to, ']'), after...)
	}
	return append(append(to, ']'), after...), nil
}

// around is what stands before and after the message's first field, a list without items.
func around(options protojson.MarshalOptions, message proto.Message) ([]byte, []byte, error) {
	data, err := options.Marshal(message)
	if err != nil {
		return nil, nil, err
	}
	before, after, found := bytes.Cut(data, noItems)
	if !found {
		return nil, nil, fmt.Errorf("%s has no list", message.ProtoReflect().Descriptor().FullName())
	}
	return before, after, nil
}

// appendNumber writes a float as the JSON mapping of protos says.
func appendNumber(to []byte, value float32) []byte {
	wide := float64(value)
	switch size := math.Abs(wide); {
	case size == 0 || size >= 1e-6 && size < 1e21:
		return strconv.AppendFloat(to, wide, 'f', -1, 32)
	case math.IsNaN(wide):
		return append(to, `"NaN"`...)
	case math.IsInf(wide, 1):
		return append(to, `"Infinity"`...)
	case math.IsInf(wide, -1):
		return append(to, `"-Infinity"`...)
	}
	rare, _ := json.Marshal(value) // of a finite number: never an error
	return append(to, rare...)
}
