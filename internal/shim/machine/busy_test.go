package machine

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/guestagent"
)

// busy is a machine whose guest agent has answered before, and takes its time since; 0 is for ever.
type busy struct {
	*life
	*world

	mu    sync.Mutex // guards the field below
	asked []string
}

func newBusy(t *testing.T, stop machinev1.Stop, slow time.Duration) *busy {
	t.Helper()
	b := &busy{world: newWorld(t)}
	b.life = &life{s: &Service{board: board.New(), machine: &machinev1.Machine{Stop: stop}}, hw: b.world, reset: make(chan struct{}, 1), askAgain: askAgain}
	b.ctx, b.cancel = context.WithCancel(context.WithoutCancel(t.Context()))
	b.giveUp = func() {}
	mine, theirs := net.Pipe()
	b.agent = guestagent.New(mine)
	lines := make(chan []byte, 100) // what is said meanwhile piles up
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(theirs); in.Scan(); {
			lines <- bytes.TrimLeft([]byte(in.Text()), "\xff")
		}
	}()
	go func() {
		for line := range lines {
			var r struct {
				Execute   string
				Arguments struct{ ID int64 }
			}
			if json.Unmarshal(line, &r) != nil {
				continue
			}
			b.mu.Lock()
			b.asked = append(b.asked, r.Execute)
			b.mu.Unlock()
			if b.agent.Answered() {
				if slow == 0 {
					continue
				}
				time.Sleep(slow)
			}
			answer := `{"return": {}}`
			switch r.Execute {
			case "guest-sync-delimited":
				answer = fmt.Sprintf("\xff{\"return\": %d}", r.Arguments.ID)
			case "guest-shutdown":
				continue
			}
			if _, err := fmt.Fprintln(theirs, answer); err != nil {
				return
			}
		}
	}()
	asking, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_ = b.agent.Ping(asking) // it is in step after that, or says nothing more
	if !b.agent.Answered() {
		t.Fatal("the agent does not answer")
	}
	b.asked = nil
	t.Cleanup(func() {
		b.cancel()
		_ = b.agent.Close()
		_ = theirs.Close()
		b.s.running.Wait()
	})
	return b
}

func (b *busy) was(command string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Contains(b.asked, command)
}

// TestBusyRestart: a guest that takes long to answer is restarted as it was asked for.
func TestBusyRestart(t *testing.T) {
	for _, mode := range []machinev1.StopMode{machinev1.Soft, machinev1.TrySoft} {
		synctest.Test(t, func(t *testing.T) {
			b := newBusy(t, machinev1.Stop{}, 4*time.Second)
			done := make(chan error, 1)
			go func() { done <- b.restart(b.ctx, machinev1.Operation{Kind: machinev1.Reset, Mode: mode}) }()
			time.Sleep(time.Minute)
			if !b.was("guest-shutdown") {
				t.Errorf("asked only %q", b.asked)
			}
			poke(b.reset)
			if err := <-done; err != nil || b.called("reset") > 0 {
				t.Errorf("%s: %v, asked %q, calls %q", mode, err, b.asked, b.calls)
			}
		})
	}
}

// TestSilentRestart: a guest that has answered before and does not now is restarted by force only if that is wanted.
func TestSilentRestart(t *testing.T) {
	for mode, resets := range map[machinev1.StopMode]int{machinev1.Soft: 0, machinev1.TrySoft: 1} {
		synctest.Test(t, func(t *testing.T) {
			b := newBusy(t, machinev1.Stop{}, 0)
			err := b.restart(b.ctx, machinev1.Operation{Kind: machinev1.Reset, Mode: mode})
			if b.called("reset") != resets || (err == nil) != (resets > 0) {
				t.Errorf("%s: %v, calls %q", mode, err, b.calls)
			}
		})
	}
}

// TestBusyShutdown: a guest that takes long to answer is asked to shut down, and its power button is pressed meanwhile.
func TestBusyShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBusy(t, machinev1.Stop{Mode: machinev1.Soft}, 4*time.Second)
		b.stop(false)
		time.Sleep(time.Minute)
		if !b.was("guest-shutdown") || b.called("powerdown") == 0 {
			t.Errorf("asked %q, calls %q", b.asked, b.calls)
		}
		b.end(vm.ExitShutdown)
	})
}

// TestSilentShutdown: one that does not answer any more is powered off when its time is over, and not later.
func TestSilentShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBusy(t, machinev1.Stop{Mode: machinev1.TrySoft, TimeoutSeconds: 22}, 0)
		began := time.Now()
		b.stop(false)
		<-b.world.done
		if time.Since(began) != 22*time.Second || b.called("powerdown") != 2 || b.called("poweroff") != 1 {
			t.Errorf("after %s: calls %q", time.Since(began), b.calls)
		}
	})
}

// TestGivenUp: nobody asks the agent any more for a probe that was given up, which would be in the way of the next.
func TestGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBusy(t, machinev1.Stop{}, 0)
		running, cancel := context.WithCancel(b.ctx)
		run, err := b.command(t.Context(), running, b.world, []string{machinev1.CommandGuestInfo, "ready", "yes"}, false)
		if err != nil {
			t.Fatal(err)
		}
		said, e := io.Pipe()
		go func() { _, _ = io.Copy(io.Discard, said) }()
		ended := make(chan uint32)
		began := time.Now()
		go func() {
			defer e.Close()
			ended <- run(ends{out: e, err: e})
		}()
		time.Sleep(time.Second)
		(&process{ended: make(chan struct{}), cancel: cancel}).end(statusKilled)
		if status := <-ended; status != 1 || time.Since(began) != time.Second {
			t.Errorf("%d after %s", status, time.Since(began))
		}
	})
}
