package openai

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	"google.golang.org/grpc/status"

	pb "understudy.dev/gen/understudy/v1"
)

const (
	// An error within so much time has a status of its own; after it the headers are sent, so that no proxy gives up on a slow first token.
	firstWait = 300 * time.Millisecond
	// Between events for so long, a comment is sent: proxies close connections that are silent.
	silence = 15 * time.Second
	// What a reader has to take a piece; those who do not read are let go.
	writeTime = 30 * time.Second
	// Messages that may wait while a piece is being sent.
	waiting = 64
	// Of a piece; more is sent in several.
	mostBytes = 64 << 10
)

// event is a message of one source, or its end.
type event struct {
	first   int32 // the first of the source's answers
	message *pb.GenerateResponse
	more    extras
	err     error
}

func (s *server) answerStream(ctx context.Context, w http.ResponseWriter, j job) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the work on the server, however this ends
	events := make(chan event, waiting)
	for number, source := range j.sources {
		go pump(ctx, source, int32(number)*j.perSource, events)
	}
	timer := time.NewTimer(firstWait)
	defer timer.Stop()
	var early *event
	select {
	case first := <-events:
		if first.err != nil && !errors.Is(first.err, io.EOF) {
			return j.errorOf(first.err)
		}
		early = &first
	case <-timer.C:
	}
	writer := newEventWriter(w, &j)
	writer.chunks.begin()
	if early == nil { // nothing has come: the role goes out by itself
		if !writer.send() {
			return nil
		}
	}
	return writer.copy(ctx, early, events, timer)
}

// pump reads a source to its end. The last event has an error: io.EOF after a good end.
func pump(ctx context.Context, from source, first int32, events chan<- event) {
	put := func(one event) bool {
		select {
		case events <- one:
			return true
		case <-ctx.Done():
			return false
		}
	}
	receiver, err := from.open(ctx)
	if err != nil {
		put(event{first: first, err: err})
		return
	}
	for {
		message, more, err := receiver.recv()
		if !put(event{first, message, more, err}) || err != nil {
			return
		}
	}
}

// contextError is why a context ended, as a status.
func contextError(ctx context.Context) error {
	return status.FromContextError(ctx.Err()).Err()
}

// eventWriter sends a chunker's events.
type eventWriter struct {
	w        http.ResponseWriter
	control  *http.ResponseController
	chunks   *chunker
	deadline time.Time // of writing
}

func newEventWriter(w http.ResponseWriter, j *job) *eventWriter {
	header := w.Header()
	header.Set("Content-Type", "text/event-stream; charset=utf-8")
	header.Set("Cache-Control", "no-cache")
	header.Set("X-Accel-Buffering", "no") // nginx would hold the stream back
	return &eventWriter{w: w, control: http.NewResponseController(w), chunks: newChunker(j)}
}

// copy writes events until every source has ended; those that wait go out together.
func (e *eventWriter) copy(ctx context.Context, early *event, events <-chan event, timer *time.Timer) error {
	open := len(e.chunks.job.sources)
	take := func(one event) (done bool) {
		switch {
		case one.err == nil:
			e.chunks.take(one.first, one.message, one.more)
		case errors.Is(one.err, io.EOF):
			if open--; open == 0 {
				e.chunks.close()
				return true
			}
		default:
			e.chunks.fail(e.chunks.job.errorOf(one.err))
			return true
		}
		return false
	}
	next := early
	for {
		if next == nil {
			timer.Reset(silence)
			select {
			case one := <-events:
				next = &one
			case <-timer.C:
				e.chunks.buffer = append(e.chunks.buffer, ": the answer is not ready yet\n\n"...)
				if !e.send() {
					return nil
				}
				continue
			case <-ctx.Done():
				e.chunks.fail(e.chunks.job.errorOf(contextError(ctx)))
				e.send()
				return nil
			}
		}
		done := take(*next)
		next = nil
		for !done && len(e.chunks.buffer) < mostBytes {
			select {
			case one := <-events:
				done = take(one)
				continue
			default:
			}
			break
		}
		e.chunks.flushAll()
		if !e.send() || done {
			return nil
		}
	}
}

// send writes what there is. False: nobody reads any more.
func (e *eventWriter) send() bool {
	if len(e.chunks.buffer) == 0 {
		return true
	}
	if now := time.Now(); e.deadline.Sub(now) < writeTime/2 {
		e.deadline = now.Add(writeTime)
		_ = e.control.SetWriteDeadline(e.deadline) // where there is none, the server's own holds
	}
	_, err := e.w.Write(e.chunks.buffer)
	e.chunks.buffer = e.chunks.buffer[:0]
	return err == nil && e.control.Flush() == nil
}
