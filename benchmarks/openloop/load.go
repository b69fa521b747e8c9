package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sort"
	"time"

	"golang.org/x/net/http2/hpack"
)

// kind is the connections that behave alike.
type kind struct {
	load    *load
	spec    *ConnectionKind
	next    uint32
	slots   []*connection
	pending []*call // no connection had a free stream
	most    int     // greatest length of pending
	opened  int
}

// load is a run. All of it happens on one thread; see loop.
type load struct {
	cpu      []time.Duration // that the generator used, by phase
	spec     *Spec
	target   *net.TCPAddr
	loop     *loop
	kinds    map[string]*kind
	fields   map[*Workload][]hpack.HeaderField
	recorder *recorder
	random   *rand.Rand // of the arrivals
	again    *rand.Rand // of closed loops
	total    float64    // of the weights
	flight   int
	bodies   [][]byte
	over     bool // no new connections, no new calls
	expiring map[*Workload]*deadlines
	phase    int       // whose closed loop goes on; -1: none
	until    time.Time // its end
}

// deadlines of calls of one workload, in their order.
type deadlines struct {
	calls []*call
	armed bool // a timer is on for the first of them
}

// body is room for an answer. It comes back in `finish`, so that there is no garbage to collect.
func (l *load) body() []byte {
	last := len(l.bodies) - 1
	if last < 0 {
		return make([]byte, 0, 1024)
	}
	out := l.bodies[last]
	l.bodies = l.bodies[:last]
	return out
}

// retry is how long after a connection that could not be made the next is tried.
const retry = 50 * time.Millisecond

func newLoad(spec *Spec) (*load, error) {
	target, err := net.ResolveTCPAddr("tcp", spec.Target)
	if err != nil {
		return nil, err
	}
	loop, err := newLoop()
	if err != nil {
		return nil, err
	}
	l := &load{
		spec: spec, target: target, loop: loop, phase: -1,
		kinds: map[string]*kind{}, fields: map[*Workload][]hpack.HeaderField{},
		random:   rand.New(rand.NewPCG(spec.Seed, 1)),
		again:    rand.New(rand.NewPCG(spec.Seed, 2)),
		expiring: map[*Workload]*deadlines{},
	}
	for _, w := range spec.Workloads {
		l.total += w.Weight
		l.fields[w] = fields(spec, w)
		l.expiring[w] = &deadlines{}
	}
	for name, s := range spec.Connections {
		l.kinds[name] = &kind{load: l, spec: s, slots: make([]*connection, s.Count)}
	}
	return l, nil
}

func fields(spec *Spec, w *Workload) []hpack.HeaderField {
	out := []hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: w.Method},
		{Name: ":authority", Value: spec.Target},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
	}
	names := make([]string, 0, len(spec.Metadata))
	for name := range spec.Metadata {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		out = append(out, hpack.HeaderField{Name: name, Value: spec.Metadata[name]})
	}
	return out
}

// connect opens all connections; they are kept open until the run is over.
func (l *load) connect() error {
	for _, k := range l.kinds {
		for slot := range k.slots {
			k.open(slot)
		}
	}
	greeted := func() bool {
		for _, k := range l.kinds {
			for _, c := range k.slots {
				if c == nil {
					return false
				}
			}
		}
		return true
	}
	if l.loop.run(time.Now().Add(greeting), greeted); !greeted() {
		return fmt.Errorf("%s does not answer as an HTTP/2 server", l.spec.Target)
	}
	return nil
}

func (k *kind) open(slot int) {
	if k.load.over {
		return
	}
	c, err := dial(k, slot, k.load.target)
	if err != nil {
		k.load.loop.at(time.Now().Add(retry), func() { k.open(slot) })
		return
	}
	k.opened++
	if every := k.spec.DropEveryS; every > 0 {
		after := time.Duration(k.load.random.ExpFloat64() * every * 1e9)
		k.load.loop.at(time.Now().Add(after), func() { c.end(dropped) })
	}
}

// ready: the server has said its settings.
func (k *kind) ready(c *connection) {
	if !c.leaving {
		k.slots[c.slot] = c
		k.flush()
	}
}

// gone: a connection takes no new calls. Another comes in its place.
func (k *kind) gone(c *connection) {
	if c.replaced {
		return
	}
	c.replaced = true
	if k.slots[c.slot] == c {
		k.slots[c.slot] = nil
	}
	if c.known {
		k.open(c.slot)
	} else {
		k.load.loop.at(time.Now().Add(retry), func() { k.open(c.slot) })
	}
}

func (k *kind) try(one *call) bool {
	first := int(k.next)
	k.next++
	for i := range k.slots {
		c := k.slots[(first+i)%len(k.slots)]
		if c != nil && c.offer(one) {
			return true
		}
	}
	return false
}

func (k *kind) send(one *call) {
	if len(k.pending) > 0 || !k.try(one) {
		k.pending = append(k.pending, one)
		k.most = max(k.most, len(k.pending))
	}
}

// flush sends what waited for a free stream.
func (k *kind) flush() {
	for len(k.pending) > 0 {
		one := k.pending[0]
		if !one.ended && !k.try(one) {
			return
		}
		k.pending[0] = nil
		k.pending = k.pending[1:]
	}
}

func (l *load) pick(random *rand.Rand) *Workload {
	at := random.Float64() * l.total
	for _, w := range l.spec.Workloads {
		if at -= w.Weight; at < 0 {
			return w
		}
	}
	return l.spec.Workloads[len(l.spec.Workloads)-1]
}

// start sends one call.
func (l *load) start(phase int, intended time.Time, random *rand.Rand) {
	w := l.pick(random)
	one := &call{
		phase: phase, workload: w, intended: intended,
		request: &w.Requests[random.IntN(len(w.Requests))],
	}
	l.flight++
	l.recorder.offered(one)
	if w.DeadlineMS > 0 {
		one.expires = intended.Add(time.Duration(w.DeadlineMS) * time.Millisecond)
		due := l.expiring[w]
		due.calls = append(due.calls, one)
		l.arm(w, due)
	}
	one.taken = w.CancelShare > 0 && random.Float64() < w.CancelShare
	after := time.Duration(random.Float64() * w.CancelAfterMS * 1e6)
	l.kinds[w.Connection].send(one)
	if one.taken {
		l.loop.at(time.Now().Add(after), func() { l.giveUp(one, takenBack) })
	}
}

// giveUp ends a call on the client's side, if it has not ended.
func (l *load) giveUp(one *call, code string) {
	if one.ended {
		return
	}
	if one.connection == nil {
		one.ended = true // it waits in pending, and is passed over there
	} else {
		one.connection.leave(one)
	}
	l.finish(one, code)
}

// finish records a call's end, once.
func (l *load) finish(one *call, code string) {
	now := time.Now()
	wrong := ""
	if code == "OK" {
		wrong = verify(one)
	}
	if one.body != nil {
		l.bodies, one.body = append(l.bodies, one.body[:0]), nil
	}
	l.recorder.ended(one, code, wrong, now)
	l.flight--
	l.kinds[one.workload.Connection].flush()
	if l.phase == one.phase && now.Before(l.until) && !l.over {
		l.start(one.phase, now, l.again)
	}
}

// arm has `sweep` come when the first deadline passes, late by a hundredth at most.
func (l *load) arm(w *Workload, due *deadlines) {
	if due.armed || len(due.calls) == 0 {
		return
	}
	due.armed = true
	next := time.Now().Add(max(2*time.Millisecond, time.Duration(w.DeadlineMS)*10*time.Microsecond))
	if first := due.calls[0].expires; first.After(next) {
		next = first
	}
	l.loop.at(next, func() { l.sweep(w, due) })
}

// sweep ends calls whose deadline has passed, as a gRPC client does.
func (l *load) sweep(w *Workload, due *deadlines) {
	now := time.Now()
	for len(due.calls) > 0 && (due.calls[0].ended || !now.Before(due.calls[0].expires)) {
		one := due.calls[0]
		due.calls[0] = nil
		due.calls = due.calls[1:]
		l.giveUp(one, lateHere)
	}
	due.armed = false
	l.arm(w, due)
}

// run goes through the phases and waits for the last answers.
func (l *load) run() {
	begin := time.Now()
	l.recorder = newRecorder(l.spec, begin)
	never := func() bool { return false }
	for i, p := range l.spec.Phases {
		used := cpuTime()
		until := begin.Add(time.Duration(p.Seconds * 1e9))
		if p.Callers > 0 {
			l.phase, l.until = i, until
			for range p.Callers {
				l.start(i, time.Now(), l.again)
			}
		} else {
			l.phase = -1
			l.arrive(i, newArrivals(p, l.random), begin, until)
		}
		l.loop.run(until, never)
		l.cpu = append(l.cpu, cpuTime()-used)
		begin = until
	}
	l.phase = -1
	l.loop.run(time.Now().Add(10*time.Second), func() bool { return l.flight == 0 })
	l.over = true
}

// arrive starts the next call of an open loop at its time, and has the one after it follow.
func (l *load) arrive(phase int, times *arrivals, begin, until time.Time) {
	at := begin.Add(times.next())
	if at.After(until) {
		return
	}
	l.loop.at(at, func() {
		l.start(phase, at, l.random)
		l.arrive(phase, times, begin, until)
	})
}
