package openai

import (
	"encoding/json"
	"strconv"
	"unicode/utf8"

	pb "understudy.dev/gen/understudy/v1"
)

// chunker writes a stream's events into one buffer, which is sent and used again: a token costs no allocation. Text that waits for the same
// answer goes into one event.
type chunker struct {
	job     *job
	buffer  []byte
	head    string // of every event, up to the choices
	tail    string // of every event that has choices, after them
	pending []growth
	held    []byte // the last answer's last event, up to where its story goes
	ended   int32
	sum     tally
}

// growth is what an answer has got since its last event.
type growth struct {
	text   []byte // escaped
	tokens []*pb.GeneratedToken
	offset int // of the next token, in characters
}

func newChunker(j *job) *chunker {
	object := `"text_completion"`
	if j.form.chat {
		object = `"chat.completion.chunk"`
	}
	head := appendString([]byte(`data: {"id":`), j.form.id)
	head = append(head, `,"object":`+object+`,"created":`...)
	head = strconv.AppendInt(head, j.form.created, 10)
	head = appendString(append(head, `,"model":`...), j.form.model)
	head = append(head, `,"system_fingerprint":null,"choices":[`...)
	tail := `]`
	if j.usage {
		tail = `],"usage":null`
	}
	return &chunker{job: j, head: string(head), tail: tail, pending: make([]growth, j.answers)}
}

const end = "}\n\n"

// begin writes what every answer begins with: the role, and for completions the prompt where it is to be repeated.
func (c *chunker) begin() {
	for index := range c.job.answers {
		if c.job.form.chat {
			c.open(index)
			c.buffer = append(c.buffer, `"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}`...)
			c.buffer = append(append(c.buffer, c.tail...), end...)
		} else if len(c.job.echo) > 0 {
			c.pending[index].text = appendEscaped(c.pending[index].text, c.job.echo[index/c.job.perSource])
			c.flush(index)
		}
	}
}

func (c *chunker) open(index int32) {
	c.buffer = append(c.buffer, c.head...)
	c.buffer = append(c.buffer, `{"index":`...)
	c.buffer = strconv.AppendInt(c.buffer, int64(index), 10)
	c.buffer = append(c.buffer, ',')
}

// take adds a message of the source that gives the answers from `first` on. What it says is written by `flushAll` at the latest.
func (c *chunker) take(first int32, message *pb.GenerateResponse, more extras) {
	for _, delta := range message.GetDeltas() {
		index := first + delta.GetIndex()
		if index < 0 || int(index) >= len(c.pending) {
			continue
		}
		grown := &c.pending[index]
		grown.text = appendEscaped(grown.text, delta.GetText())
		if c.job.logprobs {
			grown.tokens = append(grown.tokens, delta.GetTokens()...)
		}
		if delta.GetFinishReason() != pb.FinishReason_FINISH_REASON_UNSPECIFIED {
			c.flush(index)
			c.finish(index, delta)
		}
	}
	if message.GetModel() != nil || message.GetDecision() != nil || message.GetUsage() != nil {
		c.sum.add(message, message.Quality, more)
	}
}

func (c *chunker) flushAll() {
	for index := range c.pending {
		c.flush(int32(index))
	}
}

func (c *chunker) flush(index int32) {
	grown := &c.pending[index]
	if len(grown.text) == 0 && len(grown.tokens) == 0 {
		return
	}
	c.open(index)
	if c.job.form.chat {
		c.buffer = append(c.buffer, `"delta":{"content":"`...)
		c.buffer = append(append(c.buffer, grown.text...), `"},"logprobs":`...)
	} else {
		c.buffer = append(c.buffer, `"text":"`...)
		c.buffer = append(append(c.buffer, grown.text...), `","logprobs":`...)
	}
	c.logprobs(grown)
	c.buffer = append(c.buffer, `,"finish_reason":null}`...)
	c.buffer = append(append(c.buffer, c.tail...), end...)
	grown.text, grown.tokens = grown.text[:0], grown.tokens[:0]
}

func (c *chunker) logprobs(grown *growth) {
	var found any
	switch {
	case len(grown.tokens) == 0:
		c.buffer = append(c.buffer, "null"...)
		return
	case c.job.form.chat:
		found = chatLogprobsOf(grown.tokens)
	default:
		found, grown.offset = textLogprobsOf(grown.tokens, grown.offset)
	}
	c.value(found)
}

// value writes what is rare enough to be left to the library.
func (c *chunker) value(value any) {
	data, err := json.Marshal(value)
	if err != nil {
		data = []byte("null")
	}
	c.buffer = append(c.buffer, data...)
}

// finish writes an answer's last event. It waits for the next answer's end, or for the story, which belongs into the very last one.
func (c *chunker) finish(index int32, delta *pb.GenerationDelta) {
	if calls := c.job.calls(delta.GetToolCalls()); len(calls) > 0 && c.job.form.chat {
		c.open(index)
		c.buffer = append(c.buffer, `"delta":{"tool_calls":[`...)
		for number, call := range calls {
			if number > 0 {
				c.buffer = append(c.buffer, ',')
			}
			c.buffer = append(c.buffer, `{"index":`...)
			c.buffer = strconv.AppendInt(c.buffer, int64(number), 10)
			c.buffer = appendString(append(c.buffer, `,"id":`...), call.GetId())
			c.buffer = appendString(append(c.buffer, `,"type":"function","function":{"name":`...), call.GetName())
			c.buffer = appendString(append(c.buffer, `,"arguments":`...), call.GetArguments())
			c.buffer = append(c.buffer, `}}`...)
		}
		c.buffer = append(c.buffer, `]},"logprobs":null,"finish_reason":null}`...)
		c.buffer = append(append(c.buffer, c.tail...), end...)
	}
	c.release(nil)
	c.ended++
	start := len(c.buffer)
	c.open(index)
	what := `"text":""`
	if c.job.form.chat {
		what = `"delta":{}`
	}
	c.buffer = append(c.buffer, what+`,"logprobs":null,"finish_reason":`...)
	c.buffer = append(appendString(c.buffer, finishName(delta.GetFinishReason())), '}')
	c.buffer = append(c.buffer, c.tail...)
	c.held = append(c.held[:0], c.buffer[start:]...)
	c.buffer = c.buffer[:start]
}

// release writes the event that waits, with the story where it is the last.
func (c *chunker) release(last *story) {
	if len(c.held) == 0 {
		return
	}
	c.buffer = append(c.buffer, c.held...)
	c.held = c.held[:0]
	if last != nil {
		c.buffer = append(c.buffer, `,"understudy":`...)
		c.value(last)
	}
	c.buffer = append(c.buffer, end...)
}

// close writes what a good stream ends with.
func (c *chunker) close() {
	c.flushAll()
	c.release(c.sum.story)
	if c.job.usage {
		c.buffer = append(append(c.buffer, c.head...), `],"usage":`...)
		c.value(c.sum.usage())
		c.buffer = append(c.buffer, `,"understudy":`...)
		c.value(c.sum.story)
		c.buffer = append(c.buffer, end...)
	}
	c.buffer = append(c.buffer, "data: [DONE]\n\n"...)
}

// fail writes an error in place of the rest, as OpenAI does: its clients raise it.
func (c *chunker) fail(err *apiError) {
	c.flushAll()
	c.release(nil)
	c.buffer = append(append(append(c.buffer, "data: "...), err.body()...), "\n\n"...)
}

func appendString(to []byte, text string) []byte {
	return append(appendEscaped(append(to, '"'), text), '"')
}

const hexDigits = "0123456789abcdef"

// appendEscaped writes the inside of a JSON string; bytes that are no UTF-8 become U+FFFD.
func appendEscaped(to []byte, text string) []byte {
	start := 0
	for at := 0; at < len(text); {
		one := text[at]
		if one >= utf8.RuneSelf {
			char, size := utf8.DecodeRuneInString(text[at:])
			if char == utf8.RuneError && size == 1 {
				to = append(append(to, text[start:at]...), "\ufffd"...)
				start = at + 1
			}
			at += size
			continue
		}
		if one >= ' ' && one != '"' && one != '\\' {
			at++
			continue
		}
		to = append(to, text[start:at]...)
		switch one {
		case '"', '\\':
			to = append(to, '\\', one)
		case '\n':
			to = append(to, '\\', 'n')
		case '\r':
			to = append(to, '\\', 'r')
		case '\t':
			to = append(to, '\\', 't')
		default:
			to = append(to, '\\', 'u', '0', '0', hexDigits[one>>4], hexDigits[one&15])
		}
		at++
		start = at
	}
	return append(to, text[start:]...)
}
