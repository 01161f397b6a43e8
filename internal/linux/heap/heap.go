// Package heap lets a long-running process be small while it is idle and fast while it is busy.
//
// A role of Atoll holds much (caches) and does little most of the time. A small percentage for the garbage collector
// keeps it small, but costs a third of its processor time as soon as much happens at once, such as twenty virtual
// machines being made: each collection goes through everything that is held. Run looks once a second at how much was
// allocated and gives the collector more room for as long as it is much.
//
// Called by the roles. What can go wrong: nothing; GOGC in the environment wins.
package heap

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// idlePercent and busyPercent are how much may be allocated, in percent of what is held, between two collections.
	idlePercent = 40
	busyPercent = 150
	// busyShare of what is held is allocated within a second by a process that is busy: collections at idlePercent
	// would come every three seconds or more often.
	busyShare = 1.0 / 8
	// calm is how long little must be allocated until a process counts as idle again.
	calm = 15 * time.Second
)

// Run tunes the garbage collector until ctx ends. It always returns nil.
func Run(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		<-ctx.Done()
		return nil
	}
	debug.SetGCPercent(idlePercent)
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	metrics.Read(samples)
	t, before := tuner{}, samples[0].Value.Uint64()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			metrics.Read(samples)
			total := samples[0].Value.Uint64()
			switch t.step(now, total-before, samples[1].Value.Uint64()) {
			case becameBusy:
				debug.SetGCPercent(busyPercent)
			case becameIdle:
				debug.SetGCPercent(idlePercent)
				debug.FreeOSMemory()
			}
			before = total
		}
	}
}

// tuner knows whether a process is busy.
type tuner struct {
	busy  bool
	until time.Time // when it is idle again, unless it goes on
}

type change int

const (
	same change = iota
	becameBusy
	becameIdle
)

// step takes what was allocated in the last second and what the last collection found in use, in bytes.
func (t *tuner) step(now time.Time, allocated, live uint64) change {
	was := t.busy
	if float64(allocated) > busyShare*float64(live) {
		t.busy, t.until = true, now.Add(calm)
	} else if !now.Before(t.until) {
		t.busy = false
	}
	switch {
	case t.busy && !was:
		return becameBusy
	case !t.busy && was:
		return becameIdle
	}
	return same
}
