// Asks a knowledge base and prints the answer as it comes. Standard library only.
//
//	go run ask.go http://localhost:8080 handbook "What may a hotel cost?"
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"net/url"
	"os"
	"strings"
)

type event struct {
	Token    *struct{ Text string }
	Citation *struct {
		Number, Page int
		Name, Quote  string
		Verified     bool
	}
	Error *struct{ Message string }
}

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: ask URL KNOWLEDGE_BASE QUESTION")
	}
	body, _ := json.Marshal(map[string]string{"question": os.Args[3]})
	address := os.Args[1] + "/api/v1/knowledge/" + url.PathEscape(os.Args[2]) + ":askStream"
	request, err := http.NewRequest("POST", address, bytes.NewReader(body))
	if err != nil {
		log.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	if key := os.Getenv("FOREBAY_KEY"); key != "" {
		request.Header.Set("Authorization", "Bearer "+key)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		var failed event
		_ = json.NewDecoder(response.Body).Decode(&failed)
		if failed.Error != nil {
			log.Fatal(failed.Error.Message)
		}
		log.Fatal(response.Status)
	}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(make([]byte, 1<<20), 16<<20)
	var citations []string
	for lines.Scan() {
		data, found := strings.CutPrefix(lines.Text(), "data: ")
		if !found {
			continue
		}
		var e event
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			log.Fatal(err)
		}
		switch {
		case e.Error != nil:
			log.Fatal(e.Error.Message)
		case e.Token != nil:
			fmt.Print(e.Token.Text)
		case e.Citation != nil:
			c := e.Citation
			citations = append(citations, fmt.Sprintf("[%d] %s, page %d, verified %v: %q", c.Number, c.Name, c.Page, c.Verified, c.Quote))
		}
	}
	if err := lines.Err(); err != nil {
		log.Fatal(err)
	}
	fmt.Println()
	fmt.Println(strings.Join(citations, "\n"))
}
