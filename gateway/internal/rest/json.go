package rest

import (
	"fmt"
	"io"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "understudy.dev/gen/understudy/v1"
)

// marshaler is grpc-gateway's JSON without its copies: a message is written into the answer's bytes, and a body is scanned once. What follows a
// body's first value is refused, where grpc-gateway would not look at it.
type marshaler struct{ runtime.JSONPb }

// Marshaler is how messages are written and read: lowerCamelCase out, unset fields too; either case in, unknown fields refused.
var Marshaler = &marshaler{runtime.JSONPb{
	MarshalOptions:   protojson.MarshalOptions{EmitUnpopulated: true},
	UnmarshalOptions: protojson.UnmarshalOptions{DiscardUnknown: false},
}}

// Marshal is runtime.Marshaler's.
func (m *marshaler) Marshal(v any) ([]byte, error) {
	message, ok := v.(proto.Message)
	if !ok {
		return m.JSONPb.Marshal(v)
	}
	if response, ok := v.(*pb.EmbedResponse); ok && m.MarshalOptions.EmitUnpopulated {
		return vectors(m.MarshalOptions, response)
	}
	// Guessed from the wire's size, where names are numbers and digits are bits.
	return m.MarshalOptions.MarshalAppend(make([]byte, 0, 512+4*proto.Size(message)), message)
}

// NewDecoder is runtime.Marshaler's. It returns io.EOF for an empty body, which stands for an empty message.
func (m *marshaler) NewDecoder(r io.Reader) runtime.Decoder {
	return runtime.DecoderFunc(func(v any) error {
		data, err := io.ReadAll(r)
		if err != nil {
			return fmt.Errorf("reading the body: %w", err)
		}
		if len(data) == 0 {
			return io.EOF
		}
		if message, ok := v.(proto.Message); ok {
			return m.UnmarshalOptions.Unmarshal(data, message)
		}
		return m.JSONPb.Unmarshal(data, v)
	})
}
