// Load on a language model: streams that start together, by gRPC or by SSE.
//
//	echo "8 0" | go run . '{"kind": "grpc", "target": "127.0.0.1:50051", "model": "m", "tokens": 64,
//	                        "prompts": "prompts.json"}'
//
// A line of input, `STREAMS ROUND`, starts a round: the streams of prompts[STREAMS][ROUND] in the file
// of prompts, which are lists of ids. It prints one line, RESULT and a JSON object: tokens a second,
// and the median time to the first token.
//
// It shares the machine with what it measures, so it is as light as the official clients allow:
// grpc-go and net/http, messages built once and read by their wire format.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"math"
	"net/http"
	"os"
	"runtime"
	"sort"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"
)

type wanted struct {
	Kind, Target, Model, Prompts string
	Tokens, Threads              int
}

type shot struct {
	tokens int
	first  time.Duration
}

type found struct {
	Rate  float64 `json:"rate"`
	First float64 `json:"first_ms"`
}

func main() {
	var a wanted
	if err := json.Unmarshal([]byte(os.Args[1]), &a); err != nil {
		log.Fatal(err)
	}
	if a.Threads > 0 {
		runtime.GOMAXPROCS(a.Threads)
	}
	file, err := os.ReadFile(a.Prompts)
	if err != nil {
		log.Fatal(err)
	}
	var prompts map[string][][][]int
	if err := json.Unmarshal(file, &prompts); err != nil {
		log.Fatal(err)
	}
	start := bySSE
	if a.Kind == "grpc" {
		start = byGRPC
	}
	call := start(a)
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var streams string
		var round int
		if _, err := fmt.Sscan(lines.Text(), &streams, &round); err != nil {
			log.Fatal(err)
		}
		line, _ := json.Marshal(run(call, prompts[streams][round]))
		fmt.Println("RESULT " + string(line))
	}
}

// run starts a stream for each prompt, all at once, and waits for their ends.
func run(start func([]int) func() (shot, error), prompts [][]int) found {
	calls := make([]func() (shot, error), len(prompts))
	for i, ids := range prompts {
		calls[i] = start(ids)
	}
	shots := make([]shot, len(prompts))
	var all sync.WaitGroup
	started := time.Now()
	for i, call := range calls {
		all.Add(1)
		go func() {
			defer all.Done()
			var err error
			if shots[i], err = call(); err != nil {
				log.Fatal(err)
			}
		}()
	}
	all.Wait()
	seconds := time.Since(started).Seconds()
	tokens, firsts := 0, make([]float64, len(shots))
	for i, s := range shots {
		tokens += s.tokens
		firsts[i] = s.first.Seconds() * 1e3
	}
	sort.Float64s(firsts)
	return found{float64(tokens) / seconds, firsts[len(firsts)/2]}
}

// Messages are bytes both ways.
type raw struct{}

func (raw) Name() string                       { return "proto" }
func (raw) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }

func byGRPC(a wanted) func([]int) func() (shot, error) {
	connection, err := grpc.NewClient(
		a.Target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})),
	)
	if err != nil {
		log.Fatal(err)
	}
	description := &grpc.StreamDesc{ServerStreams: true}
	return func(ids []int) func() (shot, error) {
		message := request(a, ids)
		return func() (shot, error) {
			started := time.Now()
			stream, err := connection.NewStream(
				context.Background(), description, "/forebay.v1.GenerationService/CompleteStream")
			if err != nil {
				return shot{}, err
			}
			if err = stream.SendMsg(message); err != nil {
				return shot{}, err
			}
			if err = stream.CloseSend(); err != nil {
				return shot{}, err
			}
			var s shot
			for {
				var event []byte
				if err := stream.RecvMsg(&event); err != nil {
					if s.tokens > 0 {
						return s, nil
					}
					return s, err
				}
				switch number, _, n := protowire.ConsumeTag(event); number {
				case 2: // text
					if s.first == 0 {
						s.first = time.Since(started)
					}
				case 4: // usage
					usage, _ := protowire.ConsumeBytes(event[n:])
					s.tokens = completionTokens(usage)
				}
			}
		}
	}
}

// CompleteStreamRequest{request: {model, token_ids, sampling: {max_tokens, temperature, ignore_eos}}}
func request(a wanted, ids []int) []byte {
	var packed, list, sampling, inner []byte
	for _, id := range ids {
		packed = protowire.AppendVarint(packed, uint64(id))
	}
	list = protowire.AppendTag(list, 1, protowire.BytesType)
	list = protowire.AppendBytes(list, packed)
	sampling = protowire.AppendTag(sampling, 1, protowire.VarintType)
	sampling = protowire.AppendVarint(sampling, uint64(a.Tokens))
	sampling = protowire.AppendTag(sampling, 3, protowire.Fixed32Type)
	sampling = protowire.AppendFixed32(sampling, math.Float32bits(0))
	sampling = protowire.AppendTag(sampling, 13, protowire.VarintType)
	sampling = protowire.AppendVarint(sampling, 1)
	inner = protowire.AppendTag(inner, 1, protowire.BytesType)
	inner = protowire.AppendString(inner, a.Model)
	inner = protowire.AppendTag(inner, 3, protowire.BytesType)
	inner = protowire.AppendBytes(inner, list)
	inner = protowire.AppendTag(inner, 5, protowire.BytesType)
	inner = protowire.AppendBytes(inner, sampling)
	outer := protowire.AppendTag(nil, 1, protowire.BytesType)
	return protowire.AppendBytes(outer, inner)
}

func completionTokens(usage []byte) int {
	for len(usage) > 0 {
		number, kind, n := protowire.ConsumeTag(usage)
		if n < 0 {
			return 0
		}
		usage = usage[n:]
		if number == 2 {
			value, _ := protowire.ConsumeVarint(usage)
			return int(value)
		}
		if n = protowire.ConsumeFieldValue(number, kind, usage); n < 0 {
			return 0
		}
		usage = usage[n:]
	}
	return 0
}

func bySSE(a wanted) func([]int) func() (shot, error) {
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256}}
	return func(ids []int) func() (shot, error) {
		body, _ := json.Marshal(map[string]any{
			"model": a.Model, "prompt": ids, "max_tokens": a.Tokens, "temperature": 0,
			"ignore_eos": true, "stream": true,
			"stream_options": map[string]bool{"include_usage": true},
		})
		return func() (shot, error) {
			started := time.Now()
			response, err := client.Post(
				a.Target+"/v1/completions", "application/json", bytes.NewReader(body))
			if err != nil {
				return shot{}, err
			}
			defer response.Body.Close()
			if response.StatusCode != http.StatusOK {
				return shot{}, fmt.Errorf("status %s", response.Status)
			}
			var s shot
			lines := bufio.NewScanner(response.Body)
			lines.Buffer(make([]byte, 64<<10), 4<<20)
			for lines.Scan() {
				line := lines.Bytes()
				if !bytes.HasPrefix(line, []byte("data: {")) {
					continue
				}
				if s.first == 0 {
					s.first = time.Since(started)
				}
				if bytes.Contains(line, []byte(`"completion_tokens"`)) {
					var last struct {
						Usage struct {
							Tokens int `json:"completion_tokens"`
						}
					}
					if err := json.Unmarshal(line[6:], &last); err != nil {
						return s, err
					}
					s.tokens = last.Usage.Tokens
				}
			}
			if s.tokens == 0 {
				return s, fmt.Errorf("the stream ended without usage: %v", lines.Err())
			}
			return s, nil
		}
	}
}
