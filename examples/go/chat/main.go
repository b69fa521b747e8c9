// Streams a conversation by gRPC, with the contract's generated code.
//
//	go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.10
//	go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1
//	go generate ./... && go mod tidy && go run . localhost:50051 qwen "Who are you?"
package main

//go:generate buf generate ../../../protos --template buf.gen.yaml --path ../../../protos/forebay/v1 --path ../../../protos/forebay/options

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "forebay.example/chat/gen/forebay/v1"
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: chat HOST:PORT MODEL QUESTION")
	}
	connection, err := grpc.NewClient(
		os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()

	// Ctrl-C cancels the call: the server stops generating.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if key := os.Getenv("FOREBAY_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}
	stream, err := pb.NewGenerationServiceClient(connection).ChatStream(ctx, &pb.ChatStreamRequest{
		Request: &pb.ChatRequest{
			Model: os.Args[2],
			Messages: []*pb.ChatMessage{{
				Role:    pb.ChatRole_CHAT_ROLE_USER,
				Content: []*pb.ContentPart{{Text: os.Args[3]}},
			}},
			Sampling: &pb.Sampling{
				Temperature: proto.Float32(0), // the likeliest answer, the same each time
				MaxTokens:   proto.Int32(512),
			},
		},
	})
	if err != nil {
		fail(err)
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			fail(err)
		}
		switch event := response.Event.(type) {
		case *pb.ChatStreamResponse_Text:
			fmt.Print(event.Text.Text)
		case *pb.ChatStreamResponse_Finish:
			fmt.Printf("\n[%v]", event.Finish.Reason)
		case *pb.ChatStreamResponse_Usage:
			fmt.Printf(" %d tokens in, %d out\n", event.Usage.PromptTokens, event.Usage.CompletionTokens)
		}
	}
}

// The server's words, which field is wrong, and when to try again.
func fail(err error) {
	s := status.Convert(err)
	fmt.Fprintf(os.Stderr, "%v: %s\n", s.Code(), s.Message())
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.BadRequest:
			for _, violation := range d.FieldViolations {
				fmt.Fprintf(os.Stderr, "  %s %s\n", violation.Field, violation.Description)
			}
		case *errdetails.RetryInfo:
			fmt.Fprintf(os.Stderr, "  try again in %v\n", d.RetryDelay.AsDuration())
		}
	}
	os.Exit(1)
}
