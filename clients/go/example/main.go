// Command example shows every kind of call: `go run ./example`, with UNDERSTUDY_ADDRESS and UNDERSTUDY_API_KEY where they are not the defaults.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc/codes"

	understudy "understudy.dev/client"
	pb "understudy.dev/gen/understudy/v1"
)

func main() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	address := os.Getenv("UNDERSTUDY_ADDRESS")
	if address == "" {
		address = "127.0.0.1:50051"
	}
	client, err := understudy.Connect(address, understudy.Options{APIKey: os.Getenv("UNDERSTUDY_API_KEY")})
	if err != nil {
		return err
	}
	defer client.Close()

	vectors, err := client.Embed(ctx, "where is my card ?", "how do i reset my password ?", "money transfer late")
	if err != nil {
		return err
	}
	fmt.Printf("%d vectors of %d\n", len(vectors), len(vectors[0]))

	greedy := float32(0)
	request := &pb.GenerateRequest{
		Input:    &pb.GenerateRequest_Prompt{Prompt: "tell"},
		Sampling: &pb.Sampling{Temperature: &greedy, MaxTokens: 12},
	}
	for response, err := range client.Generate(ctx, request) {
		if err != nil {
			return err
		}
		for _, delta := range response.Deltas {
			fmt.Print(delta.Text)
		}
	}
	fmt.Println()

	results, err := client.Run(ctx, "text-classification", "where is my card ?")
	if err != nil {
		return err
	}
	answer := results[0]
	if answer.Error != nil {
		return understudy.FromStatus(answer.Error)
	}
	fmt.Printf("%s, by %s\n", answer.OutputText, answer.Decision.Candidate)
	kept, err := client.Say(ctx, &pb.Feedback{InteractionId: answer.InteractionId, Thumb: pb.Thumb_THUMB_UP})
	if err != nil {
		return err
	}
	fmt.Println("feedback", kept.FeedbackId)

	_, err = client.Inference.Embed(ctx, &pb.EmbedRequest{Model: &pb.ModelSelector{Name: "nobody"}, Texts: []string{"x"}})
	if failed, ok := errors.AsType[*understudy.Error](err); ok && failed.Code == codes.NotFound {
		fmt.Println(failed.Reason, failed.Metadata["model"]) // MODEL_NOT_FOUND nobody
	}

	late, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	long := &pb.GenerateTextRequest{Input: &pb.GenerateTextRequest_Prompt{Prompt: "tell"}, Sampling: &pb.Sampling{IgnoreEos: true}}
	_, err = client.Inference.GenerateText(late, long)
	if failed, ok := errors.AsType[*understudy.Error](err); ok && errors.Is(err, context.DeadlineExceeded) {
		fmt.Println(failed.Reason, "in the stage", failed.Metadata["stage"])
	}
	return nil
}
