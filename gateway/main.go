// Command understudy-gateway serves Understudy's gRPC API over HTTP: REST, OpenAI's paths, the older paths, API documents and the console.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"

	"understudy.dev/gateway/internal/config"
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
