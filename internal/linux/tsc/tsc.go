// Package tsc measures how fast this host's time stamp counter runs.
//
// A guest under emulation sees the host's counter, but can calibrate it only against emulated
// timers, which fails on a busy host; so the host measures and tells the guest. The package
// measures afresh on every call and keeps nothing. amd64 only.
package tsc

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// ErrUnsteady is returned when the counter does not advance like a clock.
var ErrUnsteady = errors.New("time stamp counter is not steady")

// read returns the counter after all earlier instructions have finished.
func read() uint64

// KHz measures for about d (at least 10 ms) and returns the rate in kHz. The error is a few parts
// per million for 50 ms.
func KHz(d time.Duration) (uint64, error) {
	d = max(d, 10*time.Millisecond)
	var rates [2]float64
	for i := range rates {
		c0, t0, err := sample()
		if err != nil {
			return 0, err
		}
		<-time.After(d / 2)
		c1, t1, err := sample()
		if err != nil {
			return 0, err
		}
		if c1 <= c0 || t1 <= t0 {
			return 0, ErrUnsteady
		}
		rates[i] = float64(c1-c0) / float64(t1-t0) * 1e6
	}
	// Two halves that differ by more than 0.1 % mean that the thread moved between counters that
	// do not agree, or that the rate changes with the power state.
	if diff := rates[0]/rates[1] - 1; diff > 1e-3 || diff < -1e-3 {
		return 0, fmt.Errorf("%w: %.0f and %.0f kHz", ErrUnsteady, rates[0], rates[1])
	}
	return uint64((rates[0]+rates[1])/2 + 0.5), nil
}

// sample reads counter and clock together: of several tries the one where both were read closest.
func sample() (counter uint64, nanos int64, err error) {
	best := ^uint64(0)
	for range 16 {
		var ts unix.Timespec
		a := read()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
			return 0, 0, fmt.Errorf("reading the raw monotonic clock: %w", err)
		}
		b := read()
		if b-a < best {
			best = b - a
			counter, nanos = a+(b-a)/2, ts.Nano()
		}
	}
	return counter, nanos, nil
}
