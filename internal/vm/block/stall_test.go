package block

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"atoll.dev/atoll/internal/vm/qmp"
)

// TestStall: a machine that stands still tries again, and is said to go on only once it does not stop again.
func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		done := make(chan struct{})
		defer close(done)
		tries, gone := 0, 0
		var s *Stall
		s = NewStall(done, func(context.Context) error {
			if tries++; tries <= 3 {
				s.OnEvent(full()) // at once, before the answer to the command is here
			}
			if !s.Stalled() {
				t.Error("it is said to go on while it tries")
			}
			time.Sleep(10 * time.Millisecond)
			return nil
		}, func() bool { return false })
		s.OnGoingOn(func() { gone++ })
		s.OnEvent(qmp.Event{Name: "BLOCK_IO_ERROR", Data: []byte(`{"action": "report", "nospace": true}`)})
		if s.Stalled() {
			t.Error("it stands still though the guest was told")
		}
		s.OnEvent(full())
		s.OnEvent(full()) // by another request
		time.Sleep(3*retryStalled + time.Second)
		if !s.Stalled() || tries != 3 || gone != 0 {
			t.Errorf("while it is full: stalled %v, %d tries, has gone on %d times", s.Stalled(), tries, gone)
		}
		time.Sleep(2*retryStalled + time.Second)
		if s.Stalled() || tries != 4 || gone != 1 {
			t.Errorf("when there is room: stalled %v, %d tries, has gone on %d times", s.Stalled(), tries, gone)
		}
	})
}

// TestStallTriesAgain: a machine that could not be let go on is tried again, and is not said to go on before.
func TestStallTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		done := make(chan struct{})
		tries, gone := 0, 0
		s := NewStall(done, func(ctx context.Context) error {
			if tries++; tries <= 2 {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}, func() bool { return false })
		s.OnGoingOn(func() { gone++ })
		s.OnEvent(full())
		time.Sleep(2*(retryStalled+Patience) + time.Second)
		if !s.Stalled() || tries != 2 || gone != 0 {
			t.Errorf("while it cannot go on: stalled %v, %d tries, has gone on %d times", s.Stalled(), tries, gone)
		}
		time.Sleep(2 * retryStalled)
		if s.Stalled() || tries != 3 || gone != 1 {
			t.Errorf("when it can: stalled %v, %d tries, has gone on %d times", s.Stalled(), tries, gone)
		}
		tries = 0
		s.OnEvent(full())
		close(done) // nothing is left that waits, or the test ends with an error
		time.Sleep(time.Hour)
		if tries != 0 {
			t.Error("a machine that has ended is let go on")
		}
	})
}

// TestStallHeld: a machine that a snapshot holds does not go on, and is not said to, until the snapshot lets it go.
func TestStallHeld(t *testing.T) {
	for name, from := range map[string]time.Duration{"before it tries": 0, "after it has tried": retryStalled + time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				done := make(chan struct{})
				defer close(done)
				gone, held := 0, false
				s := NewStall(done, func(context.Context) error {
					if held {
						t.Error("it is let go on while it is held")
					}
					return nil
				}, func() bool { return held })
				s.OnGoingOn(func() { gone++ })
				s.OnEvent(full())
				time.Sleep(from)
				held = true
				time.Sleep(20*retryStalled + time.Second/2)
				if !s.Stalled() || gone != 0 {
					t.Errorf("while it is held: stalled %v, has gone on %d times", s.Stalled(), gone)
				}
				held = false
				time.Sleep(3 * retryStalled)
				if s.Stalled() || gone != 1 {
					t.Errorf("then: stalled %v, has gone on %d times", s.Stalled(), gone)
				}
			})
		})
	}
}

func full() qmp.Event {
	return qmp.Event{Name: "BLOCK_IO_ERROR", Data: []byte(`{"action": "stop", "nospace": true}`)}
}
