// Reachload measures what the gateway adds, for `make bench-reach`: the same calls by gRPC straight to the server and by HTTP through the
// gateway, in turns, from one process. It prints one JSON object.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "understudy.dev/gen/understudy/v1"
)

type options struct {
	grpc, http, model, mode string
	calls, streams, tokens  int
	rounds                  int
}

func main() {
	log.SetFlags(0)
	var o options
	flag.StringVar(&o.grpc, "grpc", "127.0.0.1:50051", "the server")
	flag.StringVar(&o.http, "http", "http://127.0.0.1:8080", "the gateway")
	flag.StringVar(&o.model, "model", "", "the model that is asked")
	flag.StringVar(&o.mode, "mode", "status", "status and embed: unary calls; stream: generation")
	flag.IntVar(&o.calls, "calls", 2000, "unary calls each way")
	flag.IntVar(&o.streams, "streams", 32, "streams at once")
	flag.IntVar(&o.tokens, "tokens", 128, "tokens of each stream")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of streams, each way")
	flag.Parse()
	found, err := measure(context.Background(), o)
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		log.Fatal(err)
	}
}

func measure(ctx context.Context, o options) (any, error) {
	connection, err := grpc.NewClient(o.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}}
	if o.mode == "stream" {
		return streams(ctx, o, connection, client)
	}
	return unary(ctx, o, connection, client)
}

// Milliseconds; the difference is that of the medians.
type unaryResult struct {
	Calls       int     `json:"calls"`
	DirectP50   float64 `json:"direct_p50_ms"`
	DirectP99   float64 `json:"direct_p99_ms"`
	GatewayP50  float64 `json:"gateway_p50_ms"`
	GatewayP99  float64 `json:"gateway_p99_ms"`
	AddedP50    float64 `json:"added_p50_ms"`
	ResponseLen int     `json:"response_bytes"`
}

func unary(ctx context.Context, o options, connection *grpc.ClientConn, client *http.Client) (any, error) {
	const text = "I am still waiting on my card, what can I do about it?"
	direct := func() error {
		_, err := pb.NewStatsServiceClient(connection).GetBudget(ctx, &pb.GetBudgetRequest{})
		return err
	}
	request := func() (*http.Request, error) {
		return http.NewRequestWithContext(ctx, http.MethodGet, o.http+"/v1/budget", nil)
	}
	if o.mode == "embed" {
		selector := &pb.ModelSelector{Name: o.model}
		direct = func() error {
			_, err := pb.NewInferenceServiceClient(connection).Embed(ctx, &pb.EmbedRequest{Model: selector, Texts: []string{text}})
			return err
		}
		body, err := json.Marshal(map[string]any{"model": map[string]string{"name": o.model}, "texts": []string{text}})
		if err != nil {
			return nil, err
		}
		request = func() (*http.Request, error) {
			return http.NewRequestWithContext(ctx, http.MethodPost, o.http+"/v1/inference:embed", bytes.NewReader(body))
		}
	}
	length := 0
	through := func() error {
		asked, err := request()
		if err != nil {
			return err
		}
		asked.Header.Set("Content-Type", "application/json")
		response, err := client.Do(asked)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		length = len(body)
		if err == nil && response.StatusCode != http.StatusOK {
			err = fmt.Errorf("status %d: %s", response.StatusCode, body)
		}
		return err
	}
	var ways [2][]float64
	for call := range o.calls + 100 {
		for way, ask := range []func() error{direct, through} {
			begun := time.Now()
			if err := ask(); err != nil {
				return nil, err
			}
			if call >= 100 { // the first ones warm up
				ways[way] = append(ways[way], float64(time.Since(begun).Microseconds())/1e3)
			}
		}
	}
	found := unaryResult{Calls: o.calls, ResponseLen: length}
	found.DirectP50, found.DirectP99 = quantile(ways[0], 0.5), quantile(ways[0], 0.99)
	found.GatewayP50, found.GatewayP99 = quantile(ways[1], 0.5), quantile(ways[1], 0.99)
	found.AddedP50 = found.GatewayP50 - found.DirectP50
	return found, nil
}

func quantile(values []float64, share float64) float64 {
	slices.Sort(values)
	return values[min(len(values)-1, int(share*float64(len(values))))]
}

// Tokens a second of all streams together, by way, one figure a round.
type streamResult struct {
	Streams int                  `json:"streams"`
	Rates   map[string][]float64 `json:"tokens_per_s"`
}

func streams(ctx context.Context, o options, connection *grpc.ClientConn, client *http.Client) (any, error) {
	inference := pb.NewInferenceServiceClient(connection)
	ways := map[string]func(int) (int, error){
		"direct": func(number int) (int, error) { return direct(ctx, o, inference, number) },
		"rest":   func(number int) (int, error) { return rest(ctx, o, client, number) },
		"openai": func(number int) (int, error) { return openai(ctx, o, client, number) },
	}
	found := streamResult{o.streams, map[string][]float64{}}
	order := []string{"direct", "rest", "openai"}
	for round := range o.rounds + 1 {
		for place := range order {
			name := order[(place+round)%len(order)]
			rate, err := together(o.streams, ways[name])
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			if round > 0 {
				found.Rates[name] = append(found.Rates[name], rate)
			}
		}
	}
	return found, nil
}

func together(count int, ask func(int) (int, error)) (float64, error) {
	var tokens atomic.Int64
	var group sync.WaitGroup
	failed := make([]error, count)
	begun := time.Now()
	for number := range count {
		group.Go(func() {
			got, err := ask(number)
			tokens.Add(int64(got))
			failed[number] = err
		})
	}
	group.Wait()
	return float64(tokens.Load()) / time.Since(begun).Seconds(), errors.Join(failed...)
}

func prompt(number int) string {
	return fmt.Sprintf("Once upon a time, number %d, there was a", number)
}

func direct(ctx context.Context, o options, client pb.InferenceServiceClient, number int) (int, error) {
	tokens, zero := int32(o.tokens), float32(0)
	stream, err := client.Generate(ctx, &pb.GenerateRequest{
		Model:    &pb.ModelSelector{Name: o.model},
		Input:    &pb.GenerateRequest_Prompt{Prompt: prompt(number)},
		Sampling: &pb.Sampling{MaxTokens: tokens, Temperature: &zero, IgnoreEos: true},
	})
	if err != nil {
		return 0, err
	}
	got := 0
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		if response.Usage != nil {
			got = int(response.Usage.OutputTokens)
		}
	}
}

func rest(ctx context.Context, o options, client *http.Client, number int) (int, error) {
	body := map[string]any{
		"model": map[string]string{"name": o.model}, "prompt": prompt(number),
		"sampling": map[string]any{"maxTokens": o.tokens, "temperature": 0, "ignoreEos": true},
	}
	got := 0
	err := lines(ctx, client, o.http+"/v1/inference:generate", body, func(line []byte) error {
		if !bytes.Contains(line, []byte(`"outputTokens"`)) {
			return nil
		}
		var last struct {
			Result *struct {
				Usage struct {
					OutputTokens json.Number `json:"outputTokens"`
				} `json:"usage"`
			} `json:"result"`
			Usage struct {
				OutputTokens json.Number `json:"outputTokens"`
			} `json:"usage"`
		}
		if err := json.Unmarshal(line, &last); err != nil {
			return err
		}
		number := last.Usage.OutputTokens
		if last.Result != nil {
			number = last.Result.Usage.OutputTokens
		}
		if tokens, err := number.Int64(); err == nil {
			got = int(tokens)
		}
		return nil
	})
	return got, err
}

func openai(ctx context.Context, o options, client *http.Client, number int) (int, error) {
	body := map[string]any{
		"model": o.model, "prompt": prompt(number), "max_tokens": o.tokens, "temperature": 0, "stream": true, "ignore_eos": true,
		"stream_options": map[string]bool{"include_usage": true},
	}
	got := 0
	err := lines(ctx, client, o.http+"/v1/completions", body, func(line []byte) error {
		data, ok := strings.CutPrefix(string(line), "data: ")
		if !ok || data == "[DONE]" || !strings.Contains(data, `"completion_tokens"`) {
			return nil
		}
		var chunk struct {
			Usage *struct {
				CompletionTokens int `json:"completion_tokens"`
			} `json:"usage"`
		}
		if err := json.Unmarshal([]byte(data), &chunk); err != nil {
			return err
		}
		if chunk.Usage != nil {
			got = chunk.Usage.CompletionTokens
		}
		return nil
	})
	return got, err
}

func lines(ctx context.Context, client *http.Client, url string, body any, each func([]byte) error) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(data))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		told, _ := io.ReadAll(io.LimitReader(response.Body, 4096))
		return fmt.Errorf("status %d: %s", response.StatusCode, told)
	}
	scanner := bufio.NewScanner(response.Body)
	scanner.Buffer(make([]byte, 64<<10), 4<<20)
	for scanner.Scan() {
		if err := each(scanner.Bytes()); err != nil {
			return err
		}
	}
	return scanner.Err()
}
