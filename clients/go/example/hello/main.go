package main

import (
	"context"
	"fmt"
	"log"

	understudy "understudy.dev/client"
)

func main() {
	client, err := understudy.Connect("127.0.0.1:50051", understudy.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	vectors, err := client.Embed(context.Background(), "Where is my card?", "I lost my wallet")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(vectors), "vectors of", len(vectors[0]))
}
