package paths

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"understudy.dev/gateway/internal/wireerr"
)

// body is a request's JSON object, its names in snake_case. Whoever reads a field takes it out, so that what is left over is what nobody knows.
type body map[string]json.RawMessage

// readBody reads a JSON object; nothing at all counts as an empty one. A name that comes twice, also as snake_case and as lowerCamelCase, is
// refused: two readers of the request would not agree on what it says.
func readBody(r *http.Request) (body, error) {
	if err := checkType(r); err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			message := fmt.Sprintf("the body is larger than %d bytes, which is the most that is taken here", tooLarge.Limit)
			return nil, wireerr.New(http.StatusRequestEntityTooLarge, codes.ResourceExhausted, wireerr.RequestTooLarge, message, "Send less in one call.")
		}
		return nil, invalid("body", "the body could not be read whole; send it again")
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		return body{}, nil
	}
	return parseBody(raw)
}

// checkType refuses bodies of another type than JSON: a mistake, or a form that a foreign page posts with the visitor's reach.
func checkType(r *http.Request) error {
	value := r.Header.Get("Content-Type")
	if value == "" || r.ContentLength == 0 {
		return nil
	}
	media, _, err := mime.ParseMediaType(value)
	if err == nil && (media == "application/json" || strings.HasSuffix(media, "+json")) {
		return nil
	}
	return wireerr.New(http.StatusUnsupportedMediaType, codes.InvalidArgument, wireerr.UnsupportedMedia,
		"the body is not JSON by its header content-type", "Send the header content-type: application/json.")
}

func parseBody(raw []byte) (body, error) {
	decoder := json.NewDecoder(bytes.NewReader(raw))
	if token, err := decoder.Token(); err != nil || token != json.Delim('{') {
		return nil, invalid("body", "the body is no JSON object; expected one, for example {\"task\": \"Where is my card?\"}")
	}
	b := body{}
	for decoder.More() {
		token, err := decoder.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return nil, badJSON(err)
		}
		var value json.RawMessage
		if err := decoder.Decode(&value); err != nil {
			return nil, badJSON(err)
		}
		key := snake(name)
		if _, twice := b[key]; twice {
			return nil, invalid(key, "the body names `%s` twice; expected each field once", key)
		}
		b[key] = value
	}
	if _, err := decoder.Token(); err != nil {
		return nil, badJSON(err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, invalid("body", "something follows the JSON object in the body; expected one object and no more")
	}
	for key, value := range b {
		if string(value) == "null" { // as in protojson: the same as not given
			delete(b, key)
		}
	}
	return b, nil
}

func badJSON(err error) error {
	return invalid("body", "the body is no valid JSON (%v); expected one JSON object", err)
}

// take removes the field that goes by one of these names. Two of them at once are refused.
func (b body) take(names ...string) (json.RawMessage, string, error) {
	var found []string
	for _, name := range names {
		if _, ok := b[name]; ok {
			found = append(found, name)
		}
	}
	switch len(found) {
	case 0:
		return nil, names[0], nil
	case 1:
		raw := b[found[0]]
		delete(b, found[0])
		return raw, found[0], nil
	default:
		return nil, "", invalid(found[1], "the body has %s, which mean the same; expected one of %s, send one of them", quoted(found, " and "), quoted(names, ", "))
	}
}

// text takes a string by one of its names; empty where none is there.
func (b body) text(names ...string) (string, error) {
	raw, name, err := b.take(names...)
	if err != nil || raw == nil {
		return "", err
	}
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		return "", invalid(name, "`%s` is no string; expected one in quotes", name)
	}
	return text, nil
}

// flag takes a boolean by one of its names; false where none is there.
func (b body) flag(names ...string) (bool, error) {
	raw, name, err := b.take(names...)
	if err != nil || raw == nil {
		return false, err
	}
	var flag bool
	if err := json.Unmarshal(raw, &flag); err != nil {
		return false, invalid(name, "`%s` is neither true nor false; expected one of them", name)
	}
	return flag, nil
}

// merge adds the fields of the object that goes by this name, as if they stood beside it.
func (b body) merge(name string) error {
	raw, _, err := b.take(name)
	if err != nil || raw == nil {
		return err
	}
	inner, err := parseBody(raw)
	if err != nil {
		return invalid(name, "`%s` is no JSON object; expected one of parameters by their names", name)
	}
	for key, value := range inner {
		if _, twice := b[key]; twice {
			return invalid(key, "`%s` stands in the body and in `%s`; expected it once", key, name)
		}
		b[key] = value
	}
	return nil
}

// into reads what is left into the message; also is what the path takes besides the message's own fields.
func (b body) into(message proto.Message, also ...string) error {
	raw, err := json.Marshal(b)
	if err != nil {
		return badJSON(err)
	}
	fields := message.ProtoReflect().Descriptor().Fields()
	known := slices.Clone(also)
	for i := range fields.Len() {
		known = append(known, string(fields.Get(i).Name()))
	}
	for key := range b {
		if !slices.Contains(known, key) {
			slices.Sort(known)
			return invalid(key, "the body has no field `%s` here; expected %s", key, quoted(slices.Compact(known), ", "))
		}
	}
	if err := protojson.Unmarshal(raw, message); err != nil {
		return invalid("body", "the body does not fit (%s); expected the fields of %s", cause(err), message.ProtoReflect().Descriptor().Name())
	}
	return nil
}

// done refuses what nobody has taken; known is what the path takes.
func (b body) done(known ...string) error {
	for key := range b {
		return invalid(key, "the body has no field `%s` here; expected %s", key, quoted(known, ", "))
	}
	return nil
}

// snake writes a name in lowerCamelCase with underscores; others stay as they are.
func snake(name string) string {
	var out strings.Builder
	for i, letter := range name {
		if letter >= 'A' && letter <= 'Z' {
			if i > 0 {
				out.WriteByte('_')
			}
			letter += 'a' - 'A'
		}
		out.WriteRune(letter)
	}
	return out.String()
}

func quoted(names []string, between string) string {
	out := make([]string, len(names))
	for i, name := range names {
		out[i] = "`" + name + "`"
	}
	return strings.Join(out, between)
}

// cause is protojson's message without the prefix, whose spaces it varies on purpose.
func cause(err error) string {
	text := strings.ReplaceAll(err.Error(), "\u00a0", " ")
	text = strings.TrimPrefix(text, "proto: ")
	return strings.TrimSpace(text)
}

// list reads one value or a list of them.
func list(raw json.RawMessage, name string) ([]json.RawMessage, error) {
	trimmed := bytes.TrimSpace(raw)
	if len(trimmed) == 0 || trimmed[0] != '[' {
		return []json.RawMessage{raw}, nil
	}
	var values []json.RawMessage
	if err := json.Unmarshal(raw, &values); err != nil {
		return nil, invalid(name, "`%s` is no list: %v", name, err)
	}
	return values, nil
}

// raw writes a value that cannot fail to be written.
func rawOf(value any) json.RawMessage {
	out, err := json.Marshal(value)
	if err != nil {
		panic(fmt.Sprintf("a value of our own cannot be written as JSON: %v", err))
	}
	return out
}
