package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// Spec is the input file.
type Spec struct {
	Target string `json:"target"` // host:port
	// Kinds of connections by name; calls of a workload go by the kind that it names.
	Connections map[string]*ConnectionKind `json:"connections"`
	Workloads   []*Workload                `json:"workloads"`
	Phases      []*Phase                   `json:"phases"`
	Metadata    map[string]string          `json:"metadata"`
	IntervalMS  int                        `json:"interval_ms"` // of the timeline, default 1000
	Seed        uint64                     `json:"seed"`
	Histograms  bool                       `json:"histograms"` // whole histograms in the output
}

// ConnectionKind is a set of connections that behave alike.
type ConnectionKind struct {
	Count int `json:"count"`
	// Each is closed without a word about every so many seconds, and opened again.
	DropEveryS float64 `json:"drop_every_s"`
	// Reads no faster than this; with the windows below it is a client that makes the server wait.
	ReadBytesPerS int    `json:"read_bytes_per_s"`
	StreamWindow  uint32 `json:"stream_window"` // default 16 MB
	Window        uint32 `json:"window"`        // default 256 MB
}

// Workload is one kind of call.
type Workload struct {
	Name       string    `json:"name"`
	Method     string    `json:"method"` // /package.Service/Method
	Requests   []Request `json:"requests"`
	Weight     float64   `json:"weight"` // share of the arrivals, default 1
	DeadlineMS int       `json:"deadline_ms"`
	Connection string    `json:"connection"` // default "main"
	// Share of the calls that the client takes back, after up to so many milliseconds.
	CancelShare   float64 `json:"cancel_share"`
	CancelAfterMS float64 `json:"cancel_after_ms"`
}

// Request is a message, with what its answer must hold.
type Request struct {
	Message []byte  `json:"message"` // base64
	Expect  []Check `json:"expect"`
}

// Phase is a stretch of time with one rate: arrivals at a rate, or callers in a closed loop.
type Phase struct {
	Name     string  `json:"name"`
	Seconds  float64 `json:"seconds"`
	Rate     float64 `json:"rate"`     // calls a second, on average
	Callers  int     `json:"callers"`  // closed loop
	Arrivals string  `json:"arrivals"` // poisson (default), constant, onoff, batch
	// onoff: exponential times with calls and without, by their means; the average rate holds.
	OnS  float64 `json:"on_s"`
	OffS float64 `json:"off_s"`
	// batch: so many calls at a time, at Poisson times.
	Batch int `json:"batch"`
}

func readSpec(path string) (*Spec, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	spec := &Spec{IntervalMS: 1000, Seed: 1}
	if err := json.Unmarshal(data, spec); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return spec, spec.check()
}

func (s *Spec) check() error {
	if s.Target == "" || len(s.Workloads) == 0 || len(s.Phases) == 0 || s.IntervalMS <= 0 {
		return errors.New("target, workloads, phases and a positive interval_ms are needed")
	}
	if s.Connections == nil {
		s.Connections = map[string]*ConnectionKind{"main": {Count: 4}}
	}
	for name, kind := range s.Connections {
		if kind.Count < 1 {
			return fmt.Errorf("connections.%s.count must be at least 1", name)
		}
		if kind.StreamWindow == 0 {
			kind.StreamWindow = 16 << 20
		}
		if kind.Window == 0 {
			kind.Window = 256 << 20
		}
	}
	for _, w := range s.Workloads {
		if w.Connection == "" {
			w.Connection = "main"
		}
		if w.Weight == 0 {
			w.Weight = 1
		}
		if s.Connections[w.Connection] == nil {
			return fmt.Errorf("workload %s: no connections are named %q", w.Name, w.Connection)
		}
		if len(w.Requests) == 0 || w.Method == "" {
			return fmt.Errorf("workload %s: a method and requests are needed", w.Name)
		}
	}
	for _, p := range s.Phases {
		if p.Seconds <= 0 || (p.Rate > 0) == (p.Callers > 0) {
			return fmt.Errorf("phase %s: seconds, and either rate or callers are needed", p.Name)
		}
		switch p.Arrivals {
		case "":
			p.Arrivals = "poisson"
		case "poisson", "constant":
		case "onoff":
			if p.OnS <= 0 || p.OffS <= 0 {
				return fmt.Errorf("phase %s: on_s and off_s are needed", p.Name)
			}
		case "batch":
			if p.Batch < 1 {
				return fmt.Errorf("phase %s: batch is needed", p.Name)
			}
		default:
			return fmt.Errorf("phase %s: unknown arrivals %q", p.Name, p.Arrivals)
		}
	}
	return nil
}
