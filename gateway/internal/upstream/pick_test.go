package upstream

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"understudy.dev/gateway/internal/config"
)

func TestOneThatIsThereIsTaken(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	go server.Serve(listener) //nolint:errcheck // ends with the test
	defer server.Stop()
	c := config.Default()
	c.Server, c.ServerConnections = listener.Addr().String(), 1
	there, err := Dial(c, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()      //nolint:errcheck // the test ends
	c.Server = "127.0.0.1:1" // nobody listens
	gone, err := Dial(c, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	defer gone.Close() //nolint:errcheck // the test ends
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for state := there.conns[0].GetState(); state != connectivity.Ready; state = there.conns[0].GetState() {
		if !there.conns[0].WaitForStateChange(ctx, state) {
			t.Fatal("no connection")
		}
	}
	pool := &Pool{conns: []*grpc.ClientConn{gone.conns[0], there.conns[0], gone.conns[0]}}
	for range 6 {
		if pool.pick() != there.conns[0] {
			t.Fatal("took one that is not there")
		}
	}
}
