package heap

import (
	"context"
	"runtime/debug"
	"testing"
	"time"
)

func TestStep(t *testing.T) {
	const live = 800
	var tuner tuner
	begin := time.Unix(0, 0)
	for _, c := range []struct {
		second    int
		allocated uint64
		want      change
	}{
		{0, 100, same}, // an eighth is not more than an eighth
		{1, 101, becameBusy},
		{2, 500, same},
		{3, 0, same},
		{16, 0, same},
		{17, 0, becameIdle},
		{18, 0, same},
		{19, 101, becameBusy},
		{33, 101, same}, // goes on
		{34, 0, same},
		{47, 0, same},
		{48, 0, becameIdle},
	} {
		if got := tuner.step(begin.Add(time.Duration(c.second)*time.Second), c.allocated, live); got != c.want {
			t.Errorf("second %d, %d allocated: got change %d, want %d", c.second, c.allocated, got, c.want)
		}
	}
}

// A process begins small, and GOGC in the environment is left alone.
func TestRun(t *testing.T) {
	before := debug.SetGCPercent(77)
	defer debug.SetGCPercent(before)
	ended, end := context.WithCancel(context.Background())
	end()
	t.Setenv("GOGC", "77")
	if err := Run(ended); err != nil {
		t.Fatal(err)
	}
	if got := debug.SetGCPercent(77); got != 77 {
		t.Errorf("with GOGC set, the percentage became %d", got)
	}
	t.Setenv("GOGC", "")
	if err := Run(ended); err != nil {
		t.Fatal(err)
	}
	if got := debug.SetGCPercent(77); got != idlePercent {
		t.Errorf("a process begins with %d, want %d", got, idlePercent)
	}
}
