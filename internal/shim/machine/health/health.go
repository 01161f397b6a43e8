// Package health watches over a running guest: what its QEMU says of a kernel that has crashed and of disks that cannot
// be written to becomes the Trouble in the state of the machine, and goes away with its cause.
//
// A guest whose kernel has crashed may go on by itself: it restarts, or dumps its memory first. One that does not is
// ended after a while, and so is one that crashes again and again, so that whoever starts it anew can wait between
// attempts. It is called by the shim of virtual machines, with the events of package hardware; it touches the machine
// only through Config. What can go wrong: nothing here.
package health

import (
	"fmt"
	"sync"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/vm/hardware"
)

const (
	// restartGrace is how long a guest may take to restart itself after a crash, as Linux does with panic=10.
	restartGrace = 15 * time.Second
	// dumpGrace is how long it may take to dump its memory, when it has said that it will.
	dumpGrace = 30 * time.Minute
	// A guest that has crashed loopCrashes times within loopTime is in a loop.
	loopCrashes = 3
	loopTime    = 10 * time.Minute
)

// Config is what a Health works with.
type Config struct {
	Board *board.Board
	// Keep tells that a guest which has crashed is to be left as it is.
	Keep func() bool
	// End ends the machine for a reason. It must not block, and may be called more than once.
	End func(message string)
	// After is time.AfterFunc.
	After func(time.Duration, func()) *time.Timer
	Now   func() time.Time
}

// Health of one guest. Make one with New.
type Health struct {
	cfg Config

	mu      sync.Mutex // guards the fields below
	crashes []time.Time
	crash   int         // counts crashes and restarts, so that a timer knows what it was started for
	timer   *time.Timer // of the last crash
	over    string      // why a guest is to be ended whose time is over, which only Keep can prevent
}

// New makes the Health of a guest that is started.
func New(cfg Config) *Health {
	if cfg.After == nil {
		cfg.After = time.AfterFunc
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Health{cfg: cfg}
}

// Event takes an event of the machine. It does not block.
func (h *Health) Event(e hardware.Event) {
	switch e.Kind {
	case hardware.EventPanic:
		h.crashed(e.Reason == hardware.ReasonDump)
	case hardware.EventReset:
		h.Stop()
		h.cfg.Board.Update(func(st *machinev1.State) {
			st.Resets++
			st.Started, st.Trouble = h.now(), nil
		})
	case hardware.EventStopped:
		h.cfg.Board.Update(func(st *machinev1.State) { st.Phase = machinev1.Paused })
	case hardware.EventResumed:
		h.cfg.Board.Update(func(st *machinev1.State) {
			// One that stands still for a disk tries again now and then, and may stop at once.
			if st.Phase == machinev1.Paused && !full(st) {
				st.Phase = machinev1.Running
			}
		})
	case hardware.EventGoneOn:
		h.cfg.Board.Update(func(st *machinev1.State) {
			if full(st) {
				st.Phase, st.Trouble = machinev1.Running, nil
			}
		})
	case hardware.EventFull:
		h.disk(machinev1.DatastoreFull, e.Device)
	case hardware.EventIOError:
		h.disk(machinev1.DiskError, e.Device)
	}
}

// Stop forgets the last crash: the guest goes on, or nothing does any more.
func (h *Health) Stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.crash++
	h.over = ""
	if h.timer != nil {
		h.timer.Stop()
	}
}

// KeepChanged is to be called when Keep may tell something else than before: a guest that was left as it is and need not
// be any more is ended.
func (h *Health) KeepChanged() {
	if h.cfg.Keep() {
		return
	}
	h.mu.Lock()
	message := h.over
	h.over = ""
	h.mu.Unlock()
	if message != "" {
		h.cfg.End(message)
	}
}

func full(st *machinev1.State) bool {
	return st.Trouble != nil && st.Trouble.Reason == machinev1.DatastoreFull
}

func (h *Health) now() string { return h.cfg.Now().UTC().Format(time.RFC3339) }

// disk notes a disk that cannot be used. That matters less than a crash, and a failure less than standing still.
func (h *Health) disk(reason machinev1.TroubleReason, disk string) {
	t := &machinev1.Trouble{Reason: reason, Disk: disk, At: h.now()}
	h.cfg.Board.Update(func(st *machinev1.State) {
		if old := st.Trouble; old == nil || old.Reason == machinev1.DiskError && reason == machinev1.DatastoreFull {
			st.Trouble = t
		}
	})
}

// crashed takes a crash of the guest's kernel.
func (h *Health) crashed(dumps bool) {
	now := h.cfg.Now()
	h.mu.Lock()
	recent := h.crashes[:0]
	for _, at := range h.crashes {
		if now.Sub(at) < loopTime {
			recent = append(recent, at)
		}
	}
	if dumps { // it says so again when it has dumped
		h.crashes = recent
	} else {
		h.crashes = append(recent, now)
	}
	count := len(h.crashes)
	h.crash++
	h.over = ""
	this := h.crash
	if h.timer != nil {
		h.timer.Stop()
	}
	grace, message := restartGrace, fmt.Sprintf("the kernel of the guest has crashed, and the guest has not restarted within %s", restartGrace)
	switch {
	case dumps:
		grace, message = dumpGrace, fmt.Sprintf("the kernel of the guest has crashed, and its dump has not ended within %s", dumpGrace)
	case count >= loopCrashes:
		grace, message = 0, fmt.Sprintf("the kernel of the guest has crashed %d times within %s", count, loopTime)
	}
	h.timer = h.cfg.After(grace, func() { h.give(this, message) })
	h.mu.Unlock()
	t := &machinev1.Trouble{Reason: machinev1.GuestPanicked, At: h.now()}
	h.cfg.Board.Update(func(st *machinev1.State) { st.Trouble = t })
}

// give ends the machine, if it has not gone on since that crash.
func (h *Health) give(crash int, message string) {
	h.mu.Lock()
	if h.crash == crash {
		h.over = message
	}
	h.mu.Unlock()
	h.KeepChanged()
}
