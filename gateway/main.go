// Command understudy-gateway serves Understudy's gRPC API over HTTP: REST, OpenAI's paths, the older paths, API documents and the console.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"understudy.dev/gateway/internal/apidocs"
	"understudy.dev/gateway/internal/config"
	"understudy.dev/gateway/internal/forward"
	"understudy.dev/gateway/internal/openai"
	"understudy.dev/gateway/internal/paths"
	"understudy.dev/gateway/internal/rest"
	"understudy.dev/gateway/internal/web"
)

func main() {
	c, err := config.Parse(os.Args[1:], os.LookupEnv, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		err = run(c)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "understudy-gateway:", err)
		os.Exit(1)
	}
}

func run(c config.Config) error {
	conn, err := grpc.NewClient(c.Server, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	api, err := rest.New(conn, rest.Options{HeaderDelay: c.StreamHeaderDelay})
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("/v1/", api)
	openai.Register(mux, conn, openai.Deps{Context: forward.Context, REST: api, Log: slog.Default()})
	paths.Register(mux, conn)
	apidocs.Register(mux)
	web.Register(mux)
	return http.ListenAndServe(c.Listen, mux)
}
