package openai

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strings"
)

// decode reads a JSON object. Unknown fields are left alone, as OpenAI's clients send new ones every month; wrong types are refused by name.
func decode(r *http.Request, into any) error {
	if kind := r.Header.Get("Content-Type"); kind != "" {
		// Also keeps web pages of others from sending plain forms to a gateway on the reader's machine.
		if media, _, err := mime.ParseMediaType(kind); err != nil || (media != "application/json" && !strings.HasSuffix(media, "+json")) {
			return &apiError{
				status: http.StatusUnsupportedMediaType, kind: invalidRequest,
				message: "the content type is not application/json; expected a JSON body.",
			}
		}
	}
	data, err := io.ReadAll(r.Body)
	if err != nil {
		var large *http.MaxBytesError
		if errors.As(err, &large) {
			return &apiError{
				status: http.StatusRequestEntityTooLarge, kind: invalidRequest, code: "request_too_large",
				message: "the body is larger than this gateway takes. Send less at once.",
			}
		}
		return invalid("", "the body could not be read to its end; expected as many bytes as were announced.")
	}
	if err := json.Unmarshal(data, into); err != nil {
		return refused(err)
	}
	return nil
}

func refused(err error) *apiError {
	var kind *json.UnmarshalTypeError
	if errors.As(err, &kind) {
		field := strings.ReplaceAll(kind.Field, "samplingFields.", "")
		field = strings.ReplaceAll(field, "extension.", "")
		if field == "" {
			return invalid("", "the body is a JSON %s; expected an object.", kind.Value)
		}
		return invalid(field, "%s is a %s; expected %s.", field, kind.Value, kindName(kind.Type.String()))
	}
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return invalid("", "the body is no JSON: %s at byte %d.", syntax.Error(), syntax.Offset)
	}
	return invalid("", "the body is no JSON of a request: %s.", err.Error())
}

// kindName is what a Go type is called in JSON.
func kindName(name string) string {
	name = strings.TrimLeft(name, "*")
	switch {
	case strings.HasPrefix(name, "[]"):
		return "an array"
	case strings.HasPrefix(name, "map[") || strings.HasPrefix(name, "openai.") || strings.HasPrefix(name, "struct"):
		return "an object"
	case strings.HasPrefix(name, "int"):
		return "an integer"
	case strings.HasPrefix(name, "float"):
		return "a number"
	case name == "bool":
		return "true or false"
	}
	return "a " + name
}

// absent: the field is missing or null.
func absent(raw json.RawMessage) bool {
	return len(raw) == 0 || bytes.Equal(raw, []byte("null"))
}

// textOrList reads a string or an array of strings; nil where it is absent.
func textOrList(raw json.RawMessage, param string) ([]string, error) {
	if absent(raw) {
		return nil, nil
	}
	var one string
	if json.Unmarshal(raw, &one) == nil {
		return []string{one}, nil
	}
	var many []string
	if err := json.Unmarshal(raw, &many); err != nil {
		return nil, invalid(param, "%s is neither a string nor an array of strings.", param)
	}
	return many, nil
}

// writeJSON answers with one document.
func writeJSON(w http.ResponseWriter, value any) error {
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(buffer.Bytes())
	return nil
}
