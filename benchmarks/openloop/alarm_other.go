//go:build !linux

package main

import "time"

// alarm wakes up one goroutine at its time, or a millisecond later.
type alarm struct{}

func newAlarm() (*alarm, error) { return &alarm{}, nil }

func (*alarm) sleep(d time.Duration) { time.Sleep(d) }
