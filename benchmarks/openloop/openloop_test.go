package main

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func TestQuantilesAreKnownWithinTwoPercent(t *testing.T) {
	var h Histogram
	for i := 1; i <= 100_000; i++ {
		h.Add(time.Duration(i) * time.Microsecond)
	}
	for _, q := range []float64{.01, .5, .99, .9999} {
		want := q * 1e5 * 1e3
		if got := float64(h.Quantile(q)); math.Abs(got-want) > .02*want {
			t.Errorf("q %v is %v, not %v", q, got, want)
		}
	}
	if h.Quantile(1) != 100*time.Millisecond || h.n != 100_000 {
		t.Error("the greatest value is lost")
	}
	if share := h.Within(5 * time.Millisecond); math.Abs(share-.05) > .002 {
		t.Errorf("%v are within 5 ms", share)
	}
}

func TestBucketsHoldTheirValues(t *testing.T) {
	for _, v := range []uint64{0, 1, 63, 64, 127, 128, 129, 1000, 1 << 40} {
		at := bucketOf(v)
		if v > upper(at) || (at > 0 && v <= upper(at-1)) {
			t.Errorf("%d is in bucket %d, which ends at %d", v, at, upper(at))
		}
	}
}

func TestArrivalsKeepTheirRate(t *testing.T) {
	for _, p := range []*Phase{
		{Rate: 1000}, {Rate: 1000, Arrivals: "constant"}, {Rate: 1000, Arrivals: "batch", Batch: 16},
		{Rate: 1000, Arrivals: "onoff", OnS: .1, OffS: .3},
	} {
		a := newArrivals(p, rand.New(rand.NewPCG(1, 1)))
		n, last := 0, time.Duration(0)
		for {
			at := a.next()
			if at < last {
				t.Fatalf("%s: time runs back", p.Arrivals)
			}
			if last = at; at > 200*time.Second {
				break
			}
			n++
		}
		if n < 170_000 || n > 230_000 {
			t.Errorf("%s: %d calls in 200 s", p.Arrivals, n)
		}
	}
}

func TestChecksReadTheAnswer(t *testing.T) {
	// {1: {1: 2.5 (double)}, 1: {2: "a"}, 3: 7}
	number := binary.LittleEndian.AppendUint64([]byte{1<<3 | 1}, math.Float64bits(2.5))
	message := append([]byte{1<<3 | 2, byte(len(number))}, number...)
	message = append(message, 1<<3|2, 3, 2<<3|2, 1, 'a', 3<<3, 7)
	right := []Check{
		{Path: []uint64{1, 1}, As: "double", Value: 2.5},
		{Path: []uint64{1, 2}, Index: 1, As: "string", Text: "a"},
		{Path: []uint64{1}, As: "count", Value: 2},
	}
	wrong := []Check{
		{Path: []uint64{1, 1}, As: "double", Value: 2.4, Tolerance: .01},
		{Path: []uint64{1, 2}, As: "string", Text: "a"},
		{Path: []uint64{1, 2}, Index: 1, As: "bytes", Data: []byte("b")},
		{Path: []uint64{1}, As: "count", Value: 1},
		{Path: []uint64{4}, As: "bytes"},
	}
	for _, c := range right {
		if said := c.verify(message); said != "" {
			t.Error(said)
		}
	}
	for _, c := range wrong {
		if c.verify(message) == "" {
			t.Errorf("%+v passes", c)
		}
	}
	for cut := range message {
		for _, c := range append(right, wrong...) {
			c.verify(message[:cut]) // must not panic
		}
	}
}
