package main

import (
	"encoding/base64"
	"strings"
	"time"
)

// call is one call on its way.
type call struct {
	phase    int
	workload *Workload
	request  *Request
	intended time.Time
	sent     time.Time
	expires  time.Time // zero: no deadline
	taken    bool      // the client takes it back

	connection *connection
	id         uint32
	body       []byte
	received   int
	status     string
	message    string
	details    string
	ended      bool
}

// tally is what happened to the calls of one phase, one workload, or both.
type tally struct {
	offered, wrong   uint64
	codes            map[string]uint64
	latency, refusal Histogram
	withRetryInfo    uint64
	refused          uint64
	last             time.Time // when the last of them ended
}

func newTally() *tally { return &tally{codes: map[string]uint64{}} }

func (t *tally) add(code string, took time.Duration, retryInfo bool) {
	t.codes[code]++
	switch code {
	case "OK":
		t.latency.Add(took)
	case "RESOURCE_EXHAUSTED", "UNAVAILABLE":
		t.refused++
		t.refusal.Add(took)
		if retryInfo {
			t.withRetryInfo++
		}
	}
}

// bin is a stretch of the timeline. Calls belong to the bin of their intended time.
type bin struct {
	offered, ok, refused, other uint64
	latency                     Histogram
}

type recorder struct {
	start     time.Time
	interval  time.Duration
	phases    []*tally
	workloads []map[string]*tally
	lag       Histogram
	timeline  []*bin
	samples   []string
	retryInfo map[string]bool // by the details' text, which repeats
}

const mostSamples = 10

func newRecorder(spec *Spec, start time.Time) *recorder {
	r := &recorder{
		start: start, interval: time.Duration(spec.IntervalMS) * time.Millisecond,
		retryInfo: map[string]bool{},
	}
	for range spec.Phases {
		r.phases = append(r.phases, newTally())
		by := map[string]*tally{}
		for _, w := range spec.Workloads {
			by[w.Name] = newTally()
		}
		r.workloads = append(r.workloads, by)
	}
	return r
}

func (r *recorder) bin(at time.Time) *bin {
	n := int(at.Sub(r.start) / r.interval)
	for len(r.timeline) <= n {
		r.timeline = append(r.timeline, &bin{})
	}
	return r.timeline[max(n, 0)]
}

func (r *recorder) offered(c *call) {
	r.phases[c.phase].offered++
	r.workloads[c.phase][c.workload.Name].offered++
	r.bin(c.intended).offered++
}

// ended records a call's end. `wrong` is "" for an answer that is right, or that nobody checks.
func (r *recorder) ended(c *call, code, wrong string, now time.Time) {
	took := now.Sub(c.intended)
	retry := c.details != "" && r.hasRetryInfo(c.details)
	for _, t := range []*tally{r.phases[c.phase], r.workloads[c.phase][c.workload.Name]} {
		t.add(code, took, retry)
		t.last = now
		if wrong != "" {
			t.wrong++
		}
	}
	if !c.sent.IsZero() {
		r.lag.Add(c.sent.Sub(c.intended))
	}
	b := r.bin(c.intended)
	switch code {
	case "OK":
		b.ok++
		b.latency.Add(took)
	case "RESOURCE_EXHAUSTED", "UNAVAILABLE":
		b.refused++
	default:
		b.other++
	}
	if wrong != "" && len(r.samples) < mostSamples {
		r.samples = append(r.samples, c.workload.Name+": "+wrong)
	} else if code != "OK" && len(r.samples) < mostSamples && c.message != "" &&
		code != "RESOURCE_EXHAUSTED" && !c.taken {
		r.samples = append(r.samples, c.workload.Name+": "+code+": "+c.message)
	}
}

func (r *recorder) hasRetryInfo(details string) bool {
	known, seen := r.retryInfo[details]
	if seen {
		return known
	}
	raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(details, "="))
	known = err == nil && strings.Contains(string(raw), "google.rpc.RetryInfo")
	if len(r.retryInfo) < 10_000 {
		r.retryInfo[details] = known
	}
	return known
}

var codeNames = []string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
	"ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
	"OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}

// Ends that no server sent.
const (
	lateHere  = "DEADLINE_EXCEEDED_AT_CLIENT"
	takenBack = "TAKEN_BACK"
	dropped   = "CONNECTION_DROPPED"
	lost      = "CONNECTION_LOST"
)
