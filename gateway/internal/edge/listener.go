package edge

import (
	"bytes"
	"fmt"
	"net"
	"strconv"
)

// Listener makes net/http's own refusals, which it writes as plain text before any handler is called, look like ours: JSON, and always a 4xx, because
// what cannot be read is the sender's mistake (net/http says 501 to an unknown transfer encoding, and 505 to another HTTP version).
func Listener(inner net.Listener) net.Listener { return listener{inner} }

type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	accepted, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{Conn: accepted}, nil
}

type conn struct{ net.Conn }

// What every such refusal has after its status line, and no other answer: ours have more headers.
var refusal = []byte("\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n")

const statusLine = "HTTP/1.1 "

func (c *conn) Write(data []byte) (int, error) {
	if !bytes.HasPrefix(data, []byte(statusLine)) {
		return c.Conn.Write(data)
	}
	line, _, _ := bytes.Cut(data, []byte("\r\n"))
	if len(line) < len(statusLine)+3 || !bytes.HasPrefix(data[len(line):], refusal) {
		return c.Conn.Write(data)
	}
	code, err := strconv.Atoi(string(line[len(statusLine) : len(statusLine)+3]))
	if err != nil {
		return c.Conn.Write(data)
	}
	if _, err := c.Conn.Write(refuse(code)); err != nil {
		return 0, fmt.Errorf("refusing a request: %w", err)
	}
	return len(data), nil
}
