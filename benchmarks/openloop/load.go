package main

import (
	"fmt"
	"math/rand/v2"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"
)

// kind is the connections that behave alike.
type kind struct {
	load    *load
	spec    *ConnectionKind
	mu      sync.Mutex
	next    uint32
	slots   []*connection
	pending []*call // no connection had a free stream
	most    int     // greatest length of pending
	opened  int
}

// load is a run.
type load struct {
	cpu      []time.Duration // that the generator used, by phase
	spec     *Spec
	kinds    map[string]*kind
	fields   map[*Workload][]hpack.HeaderField
	recorder *recorder
	random   *rand.Rand // the scheduler's
	total    float64    // of the weights
	flight   atomic.Int64
	over     atomic.Bool // no new connections, no new calls
	phase    atomic.Int32
	alarm    *alarm

	expiring struct {
		sync.Mutex
		by map[*Workload][]*call // in the order of their deadlines
	}
	closed struct {
		sync.Mutex
		random *rand.Rand
		until  time.Time
		phase  int
	}
}

func newLoad(spec *Spec) (*load, error) {
	alarm, err := newAlarm()
	if err != nil {
		return nil, err
	}
	l := &load{
		spec: spec, alarm: alarm, kinds: map[string]*kind{}, fields: map[*Workload][]hpack.HeaderField{},
		random: rand.New(rand.NewPCG(spec.Seed, 1)),
	}
	l.closed.random = rand.New(rand.NewPCG(spec.Seed, 2))
	l.expiring.by = map[*Workload][]*call{}
	for _, w := range spec.Workloads {
		l.total += w.Weight
		l.fields[w] = fields(spec, w)
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

// connect opens all connections; keeps them open until the run is over.
func (l *load) connect() error {
	var ready sync.WaitGroup
	for _, k := range l.kinds {
		for slot := range k.slots {
			ready.Add(1)
			go k.keep(slot, ready.Done)
		}
	}
	done := make(chan struct{})
	go func() { ready.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-time.After(greeting):
		return fmt.Errorf("%s does not answer as an HTTP/2 server", l.spec.Target)
	}
}

func (k *kind) keep(slot int, ready func()) {
	var once sync.Once
	for !k.load.over.Load() {
		c, err := dial(k, k.load.spec.Target)
		if err != nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		k.mu.Lock()
		k.opened++
		k.mu.Unlock()
		left := make(chan struct{})
		go func() {
			c.serve(func() {
				k.mu.Lock()
				if !c.leaving {
					k.slots[slot] = c
				}
				k.mu.Unlock()
				once.Do(ready)
				k.flush()
			})
			close(left)
		}()
		select {
		case <-left:
		case <-c.told: // its last calls end beside the new connection
		}
		k.replace(c)
	}
}

// replace forgets a connection that takes no new calls.
func (k *kind) replace(c *connection) {
	k.mu.Lock()
	for slot, have := range k.slots {
		if have == c {
			k.slots[slot] = nil
		}
	}
	k.mu.Unlock()
}

// try needs the lock, so that a call is either in pending or on a connection.
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
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.pending) > 0 || !k.try(one) {
		k.pending = append(k.pending, one)
		k.most = max(k.most, len(k.pending))
	}
}

// flush sends what waited for a free stream.
func (k *kind) flush() {
	k.mu.Lock()
	defer k.mu.Unlock()
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
	l.flight.Add(1)
	l.recorder.offered(one)
	if w.DeadlineMS > 0 {
		one.expires = intended.Add(time.Duration(w.DeadlineMS) * time.Millisecond)
		l.expiring.Lock()
		l.expiring.by[w] = append(l.expiring.by[w], one)
		l.expiring.Unlock()
	}
	take := w.CancelShare > 0 && random.Float64() < w.CancelShare
	after := time.Duration(random.Float64() * w.CancelAfterMS * 1e6)
	one.taken = take
	l.kinds[w.Connection].send(one)
	if take {
		time.AfterFunc(after, func() { l.giveUp(one, takenBack) })
	}
}

// giveUp ends a call on the client's side.
func (l *load) giveUp(one *call, code string) {
	k := l.kinds[one.workload.Connection]
	k.mu.Lock()
	c := one.connection
	if c == nil {
		if one.ended {
			k.mu.Unlock()
			return
		}
		one.ended = true // it waits in pending, and is passed over there
		k.mu.Unlock()
		l.finish(one, code)
		return
	}
	k.mu.Unlock()
	if c.leave(one) {
		l.finish(one, code)
	}
}

// finish records a call's end, once; no lock is held.
func (l *load) finish(one *call, code string) {
	now := time.Now()
	wrong := ""
	if code == "OK" {
		wrong = verify(one)
	}
	one.body = nil
	l.recorder.ended(one, code, wrong, now)
	l.flight.Add(-1)
	l.kinds[one.workload.Connection].flush()
	if int(l.phase.Load()) == one.phase && l.spec.Phases[one.phase].Callers > 0 {
		l.closed.Lock()
		again := l.closed.phase == one.phase && now.Before(l.closed.until) && !l.over.Load()
		if again {
			l.start(one.phase, now, l.closed.random)
		}
		l.closed.Unlock()
	}
}

// sweep ends calls whose deadline has passed, as a gRPC client does.
func (l *load) sweep() {
	every := time.Second
	for _, w := range l.spec.Workloads {
		if w.DeadlineMS > 0 { // late by a hundredth at most
			every = min(every, max(2*time.Millisecond, time.Duration(w.DeadlineMS)*10*time.Microsecond))
		}
	}
	for !l.over.Load() || l.flight.Load() > 0 {
		time.Sleep(every)
		now := time.Now()
		var late []*call
		l.expiring.Lock()
		for w, calls := range l.expiring.by {
			n := 0
			for n < len(calls) && !now.Before(calls[n].expires) {
				late = append(late, calls[n])
				calls[n] = nil
				n++
			}
			l.expiring.by[w] = calls[n:]
		}
		l.expiring.Unlock()
		for _, one := range late {
			l.giveUp(one, lateHere)
		}
	}
}

// run goes through the phases and waits for the last answers.
func (l *load) run() {
	begin := time.Now()
	l.recorder = newRecorder(l.spec, begin)
	for _, w := range l.spec.Workloads {
		if w.DeadlineMS > 0 {
			go l.sweep() // it wakes up five hundred times a second: not for nothing
			break
		}
	}
	for i, p := range l.spec.Phases {
		l.phase.Store(int32(i))
		used := cpuTime()
		until := begin.Add(time.Duration(p.Seconds * 1e9))
		if p.Callers > 0 {
			l.closed.Lock()
			l.closed.until, l.closed.phase = until, i
			for range p.Callers {
				l.start(i, time.Now(), l.closed.random)
			}
			l.closed.Unlock()
			time.Sleep(time.Until(until))
		} else {
			l.open(i, p, begin, until)
		}
		l.cpu = append(l.cpu, cpuTime()-used)
		begin = until
	}
	l.phase.Store(-1)
	for i := 0; l.flight.Load() > 0 && i < 1000; i++ {
		time.Sleep(10 * time.Millisecond)
	}
	l.over.Store(true)
}

func (l *load) open(i int, p *Phase, begin, until time.Time) {
	times := newArrivals(p, l.random)
	for {
		at := begin.Add(times.next())
		if at.After(until) {
			l.alarm.sleep(time.Until(until))
			return
		}
		l.alarm.sleep(time.Until(at))
		l.start(i, at, l.random)
	}
}
