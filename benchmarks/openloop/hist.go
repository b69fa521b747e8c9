package main

import (
	"math/bits"
	"time"
)

// Buckets are linear within each power of two: 64 a power, so a value is known to 1.6%.
const subBuckets = 64

// Histogram of durations, in nanoseconds, without a bound. Not safe for concurrent use.
type Histogram struct {
	counts []uint64
	n      uint64
	sum    float64
	max    uint64
}

func bucketOf(v uint64) int {
	if v < subBuckets {
		return int(v)
	}
	power := bits.Len64(v) - 7 // values of 7 bits have their own bucket each
	return (power+1)*subBuckets + int(v>>power) - subBuckets
}

// upper is the greatest value of a bucket.
func upper(bucket int) uint64 {
	if bucket < subBuckets {
		return uint64(bucket)
	}
	power := bucket/subBuckets - 1
	return (uint64(bucket%subBuckets+subBuckets)+1)<<power - 1
}

// Add counts a duration; negative ones count as zero.
func (h *Histogram) Add(d time.Duration) {
	v := uint64(max(d, 0))
	at := bucketOf(v)
	if at >= len(h.counts) {
		h.counts = append(h.counts, make([]uint64, at+1-len(h.counts))...)
	}
	h.counts[at]++
	h.n++
	h.sum += float64(v)
	h.max = max(h.max, v)
}

// Quantile gives the duration that a share q of the values does not exceed.
func (h *Histogram) Quantile(q float64) time.Duration {
	if h.n == 0 {
		return 0
	}
	rank := uint64(q*float64(h.n) + 0.5)
	rank = min(max(rank, 1), h.n)
	seen := uint64(0)
	for at, count := range h.counts {
		seen += count
		if seen >= rank {
			return time.Duration(min(upper(at), h.max))
		}
	}
	return time.Duration(h.max)
}

// Within gives the share of values that are not greater than d.
func (h *Histogram) Within(d time.Duration) float64 {
	if h.n == 0 {
		return 0
	}
	seen := uint64(0)
	for at, count := range h.counts {
		if upper(at) > uint64(d) {
			break
		}
		seen += count
	}
	return float64(seen) / float64(h.n)
}

// Summary is a histogram as the output has it; times in milliseconds.
type Summary struct {
	Count       uint64             `json:"count"`
	MeanMS      float64            `json:"mean_ms"`
	MaxMS       float64            `json:"max_ms"`
	Percentiles map[string]float64 `json:"percentiles_ms"`
	Within5MS   float64            `json:"within_5ms"`
	// Pairs of a bucket's greatest value in milliseconds and its count.
	Buckets [][2]float64 `json:"buckets,omitempty"`
}

var percentiles = []struct {
	name string
	q    float64
}{
	{"1", .01}, {"5", .05}, {"10", .1}, {"25", .25}, {"50", .5}, {"75", .75}, {"90", .9},
	{"95", .95}, {"99", .99}, {"99.9", .999}, {"99.99", .9999}, {"100", 1},
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

func (h *Histogram) summary(buckets bool) *Summary {
	if h.n == 0 {
		return nil
	}
	out := &Summary{
		Count: h.n, MeanMS: h.sum / float64(h.n) / 1e6, MaxMS: ms(time.Duration(h.max)),
		Percentiles: map[string]float64{}, Within5MS: h.Within(5 * time.Millisecond),
	}
	for _, p := range percentiles {
		out.Percentiles[p.name] = ms(h.Quantile(p.q))
	}
	if buckets {
		for at, count := range h.counts {
			if count > 0 {
				out.Buckets = append(out.Buckets, [2]float64{ms(time.Duration(upper(at))), float64(count)})
			}
		}
	}
	return out
}
