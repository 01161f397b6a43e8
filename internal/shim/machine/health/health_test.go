package health

import (
	"testing"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/vm/hardware"
)

// guest is a Health whose timers are fired by hand.
type guest struct {
	*Health
	board *board.Board
	now   time.Time
	keep  bool
	ended []string
	fire  func() // the last timer, also when it was stopped
	grace time.Duration
}

func newGuest() *guest {
	g := &guest{board: board.New(), now: time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC), fire: func() {}}
	g.board.Update(func(st *machinev1.State) { st.Phase = machinev1.Running })
	g.Health = New(Config{
		Board: g.board, Keep: func() bool { return g.keep }, End: func(m string) { g.ended = append(g.ended, m) },
		After: func(d time.Duration, f func()) *time.Timer {
			g.grace, g.fire = d, f
			return time.NewTimer(time.Hour)
		},
		Now: func() time.Time { return g.now },
	})
	return g
}

func (g *guest) events(kinds ...hardware.EventKind) {
	for _, k := range kinds {
		g.Event(hardware.Event{Kind: k, Device: "boot"})
	}
}

func (g *guest) trouble() machinev1.Trouble {
	if t := g.board.Get().Trouble; t != nil {
		return *t
	}
	return machinev1.Trouble{}
}

func TestCrash(t *testing.T) {
	g := newGuest()
	g.events(hardware.EventPanic)
	if got := g.trouble(); got != (machinev1.Trouble{Reason: machinev1.GuestPanicked, At: "2026-11-28T12:00:00Z"}) || g.grace != restartGrace {
		t.Errorf("%+v, %s", got, g.grace)
	}
	g.events(hardware.EventIOError, hardware.EventFull) // of no matter to a guest that has crashed
	if got := g.trouble(); got.Reason != machinev1.GuestPanicked {
		t.Errorf("%+v", got)
	}
	g.fire()
	if len(g.ended) != 1 {
		t.Errorf("a guest that stands still is not ended: %q", g.ended)
	}
}

func TestCrashThatRestarts(t *testing.T) {
	g := newGuest()
	for i, ended := range []int{0, 0, 1} {
		g.events(hardware.EventPanic)
		if i < 2 {
			g.events(hardware.EventReset)
			if st := g.board.Get(); st.Trouble != nil || st.Resets != int64(i+1) || st.Started != "2026-11-28T12:00:00Z" {
				t.Errorf("restarted: %+v", st)
			}
		}
		g.fire()
		if len(g.ended) != ended {
			t.Errorf("crash %d: %q", i+1, g.ended)
		}
	}
	g.ended = nil
	g.now = g.now.Add(loopTime)
	g.events(hardware.EventPanic, hardware.EventReset)
	g.fire()
	if len(g.ended) != 0 || g.grace != restartGrace {
		t.Errorf("crashes of long ago count: %q, %s", g.ended, g.grace)
	}
}

func TestCrashThatDumps(t *testing.T) {
	g := newGuest()
	for range loopCrashes {
		g.Event(hardware.Event{Kind: hardware.EventPanic, Reason: hardware.ReasonDump})
	}
	if g.grace != dumpGrace || g.trouble().Reason != machinev1.GuestPanicked {
		t.Errorf("%+v, %s", g.trouble(), g.grace)
	}
	g.events(hardware.EventPanic) // the dump has ended
	if g.grace != restartGrace {
		t.Errorf("%s", g.grace)
	}
}

func TestCrashThatIsKept(t *testing.T) {
	g := newGuest()
	g.keep = true
	g.events(hardware.EventPanic)
	g.fire()
	if len(g.ended) != 0 || g.trouble().Reason != machinev1.GuestPanicked {
		t.Errorf("%q, %+v", g.ended, g.trouble())
	}
	g.KeepChanged()
	if len(g.ended) != 0 {
		t.Errorf("still kept, and ended: %q", g.ended)
	}
	g.keep = false
	g.KeepChanged()
	if len(g.ended) != 1 {
		t.Errorf("no longer kept, and not ended: %q", g.ended)
	}
}

// TestCrashThatWasKept: a guest whose time is not over, or that goes on, is not ended for no longer being kept.
func TestCrashThatWasKept(t *testing.T) {
	g := newGuest()
	g.events(hardware.EventPanic)
	g.KeepChanged()
	if len(g.ended) != 0 {
		t.Errorf("before its time is over: %q", g.ended)
	}
	g.keep = true
	g.fire()
	g.events(hardware.EventReset) // by hand
	g.keep = false
	g.KeepChanged()
	g.fire()
	if len(g.ended) != 0 {
		t.Errorf("after it was restarted: %q", g.ended)
	}
	g.keep = true
	g.events(hardware.EventPanic)
	g.fire()
	g.events(hardware.EventPanic)
	g.keep = false
	g.KeepChanged()
	if len(g.ended) != 0 {
		t.Errorf("for the crash before the last: %q", g.ended)
	}
}

func TestFullDatastore(t *testing.T) {
	g := newGuest()
	g.events(hardware.EventIOError)
	if st := g.board.Get(); st.Phase != machinev1.Running || g.trouble().Reason != machinev1.DiskError || g.trouble().Disk != "boot" {
		t.Errorf("an error that the guest was told of: %+v", st)
	}
	g.events(hardware.EventFull, hardware.EventStopped)
	revision := g.board.Get().Revision
	for range 3 {
		g.now = g.now.Add(time.Second)
		g.events(hardware.EventResumed, hardware.EventFull, hardware.EventIOError, hardware.EventStopped)
	}
	st := g.board.Get()
	if st.Phase != machinev1.Paused || g.trouble() != (machinev1.Trouble{Reason: machinev1.DatastoreFull, Disk: "boot", At: "2026-11-28T12:00:00Z"}) {
		t.Errorf("while it is full: %+v", st)
	}
	if st.Revision != revision {
		t.Error("trying again changes what is said")
	}
	g.events(hardware.EventResumed, hardware.EventGoneOn)
	if st := g.board.Get(); st.Phase != machinev1.Running || st.Trouble != nil {
		t.Errorf("when there is room: %+v", st)
	}
	g.events(hardware.EventStopped)
	if st := g.board.Get(); st.Phase != machinev1.Paused {
		t.Errorf("paused: %+v", st)
	}
	g.events(hardware.EventGoneOn, hardware.EventResumed)
	if st := g.board.Get(); st.Phase != machinev1.Running {
		t.Errorf("resumed: %+v", st)
	}
}
