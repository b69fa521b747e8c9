// An open-loop load generator for gRPC: calls start at the times of a random process, whatever the
// server does, and latency counts from the time that a call was meant to start. So a server that
// stalls shows all the waiting it caused (no coordinated omission). README.md has the input.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
)

// Refusals are answers of RESOURCE_EXHAUSTED or UNAVAILABLE.
type Refusals struct {
	Count         uint64   `json:"count"`
	WithRetryInfo uint64   `json:"with_retry_info"`
	Took          *Summary `json:"took,omitempty"`
}

// Figures of a phase, or of a workload in it.
type Figures struct {
	Offered  uint64            `json:"offered"`
	OK       uint64            `json:"ok"`
	OKPerS   float64           `json:"ok_per_s"`
	Wrong    uint64            `json:"wrong"`
	Codes    map[string]uint64 `json:"codes"`
	Latency  *Summary          `json:"latency,omitempty"`
	Refusals *Refusals         `json:"refusals,omitempty"`
}

// PhaseFigures is a phase with its workloads.
type PhaseFigures struct {
	Name       string  `json:"name"`
	Seconds    float64 `json:"seconds"`
	CPUSeconds float64 `json:"cpu_s"` // of the generator
	Figures
	Workloads map[string]*Figures `json:"workloads"`
}

// Bin is a stretch of the timeline, by the time that calls were meant to start.
type Bin struct {
	AtS     float64 `json:"at_s"`
	Offered uint64  `json:"offered"`
	OK      uint64  `json:"ok"`
	Refused uint64  `json:"refused"`
	Other   uint64  `json:"other"`
	P50MS   float64 `json:"p50_ms"`
	P99MS   float64 `json:"p99_ms"`
}

// Client is how the generator itself did.
type Client struct {
	CPUSeconds float64  `json:"cpu_s"`
	Lag        *Summary `json:"lag"` // from the intended time to the sending
	MostQueued int      `json:"most_queued"`
	Opened     int      `json:"connections_opened"`
	Unended    int      `json:"unended"`
}

// Output is the result.
type Output struct {
	Phases   []*PhaseFigures `json:"phases"`
	Timeline []Bin           `json:"timeline"`
	Wrong    uint64          `json:"wrong"`
	Samples  []string        `json:"samples,omitempty"`
	Client   Client          `json:"client"`
}

func figures(t *tally, seconds float64, buckets bool) *Figures {
	f := &Figures{
		Offered: t.offered, OK: t.codes["OK"], OKPerS: float64(t.codes["OK"]) / seconds,
		Wrong: t.wrong, Codes: t.codes, Latency: t.latency.summary(buckets),
	}
	if t.refused > 0 {
		f.Refusals = &Refusals{t.refused, t.withRetryInfo, t.refusal.summary(buckets)}
	}
	return f
}

func (l *load) output() *Output {
	r := l.recorder
	out := &Output{Samples: r.samples}
	begin := r.start
	for i, p := range l.spec.Phases {
		whole := &PhaseFigures{
			Name: p.Name, Seconds: p.Seconds, CPUSeconds: l.cpu[i].Seconds(),
			Workloads: map[string]*Figures{},
		}
		seconds := p.Seconds
		if p.Callers > 0 { // the last answers of a closed loop come after its end
			seconds = max(seconds, r.phases[i].last.Sub(begin).Seconds())
		}
		whole.Figures = *figures(r.phases[i], seconds, l.spec.Histograms)
		for name, t := range r.workloads[i] {
			whole.Workloads[name] = figures(t, seconds, l.spec.Histograms)
		}
		begin = begin.Add(time.Duration(p.Seconds * 1e9))
		out.Wrong += whole.Wrong
		out.Phases = append(out.Phases, whole)
	}
	for i, b := range r.timeline {
		out.Timeline = append(out.Timeline, Bin{
			float64(i) * r.interval.Seconds(), b.offered, b.ok, b.refused, b.other,
			ms(b.latency.Quantile(.5)), ms(b.latency.Quantile(.99)),
		})
	}
	out.Client = Client{
		CPUSeconds: cpuTime().Seconds(),
		Lag:        r.lag.summary(false), Unended: l.flight,
	}
	for _, k := range l.kinds {
		out.Client.MostQueued = max(out.Client.MostQueued, k.most)
		out.Client.Opened += k.opened
	}
	return out
}

// cpuTime is what this process has used, in user and system mode.
func cpuTime() time.Duration {
	var used syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

func main() {
	path := flag.String("spec", "", "JSON file of what to send; see README.md")
	flag.Parse()
	spec, err := readSpec(*path)
	if err != nil {
		fail(err)
	}
	runtime.LockOSThread()
	l, err := newLoad(spec)
	if err != nil {
		fail(err)
	}
	if err := l.connect(); err != nil {
		fail(err)
	}
	l.run()
	if err := json.NewEncoder(os.Stdout).Encode(l.output()); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "openloop:", err)
	os.Exit(1)
}
