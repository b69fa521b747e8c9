package main

import (
	"math/rand/v2"
	"time"
)

// arrivals gives the times of calls, since the phase began, in rising order.
type arrivals struct {
	phase  *Phase
	random *rand.Rand
	at     float64 // seconds
	batch  int     // calls of the present batch that are left
	onLeft float64 // seconds that calls still come for
}

func newArrivals(phase *Phase, random *rand.Rand) *arrivals {
	a := &arrivals{phase: phase, random: random}
	if phase.Arrivals == "onoff" {
		a.onLeft = random.ExpFloat64() * phase.OnS
	}
	return a
}

func (a *arrivals) next() time.Duration {
	p := a.phase
	switch p.Arrivals {
	case "constant":
		a.at += 1 / p.Rate
	case "batch":
		if a.batch == 0 {
			a.at += a.random.ExpFloat64() * float64(p.Batch) / p.Rate
			a.batch = p.Batch
		}
		a.batch--
	case "onoff":
		gap := a.random.ExpFloat64() / (p.Rate * (p.OnS + p.OffS) / p.OnS)
		for gap > a.onLeft { // the rest of the gap lies in the next stretch with calls
			gap -= a.onLeft
			a.at += a.onLeft + a.random.ExpFloat64()*p.OffS
			a.onLeft = a.random.ExpFloat64() * p.OnS
		}
		a.onLeft -= gap
		a.at += gap
	default:
		a.at += a.random.ExpFloat64() / p.Rate
	}
	return time.Duration(a.at * 1e9)
}
