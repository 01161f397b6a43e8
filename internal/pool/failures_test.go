package pool

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"atoll.dev/atoll/internal/pool/config"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/vm"
)

// TestBackoff runs hours of a pool whose members never come up: pauses grow to minutes, one is tried at
// a time, and the last failure can be read.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeMaker{delay: time.Minute, failNext: 1 << 30}
		p := runLoop(t, 4, f)
		time.Sleep(time.Hour)
		f.mu.Lock()
		early := f.spawned
		f.mu.Unlock()
		time.Sleep(time.Hour)
		f.mu.Lock()
		late, preparing := f.spawned-early, f.preparing
		f.mu.Unlock()
		if most := int(time.Hour / lastBackoff); late > most || late < most/2 || preparing > 1 {
			t.Errorf("%d members in the second hour, %d at a time", late, preparing)
		}
		s := status(p)
		if s.Error != "no memory" || s.LastFailure != "no memory" || s.FailuresInARow < late || s.LastFailureAt.IsZero() {
			t.Errorf("status %+v", s)
		}

		// The host is repaired.
		f.mu.Lock()
		f.failNext = 0
		f.mu.Unlock()
		time.Sleep(lastBackoff + 10*time.Minute)
		s = status(p)
		if s.Ready != 4 || s.Error != "" || s.FailuresInARow != 0 || !s.RetryAt.IsZero() || s.LastFailure != "no memory" {
			t.Errorf("status after the repair %+v", s)
		}
	})
}

// TestShortLived: members that come up and end soon are failures, too.
func TestShortLived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeMaker{delay: time.Second}
		p := runLoop(t, 1, f)
		stop := time.After(time.Hour)
		for running := true; running; {
			select {
			case <-stop:
				running = false
			case <-time.After(2 * time.Second):
				f.mu.Lock()
				for _, m := range f.members {
					m.kill()
				}
				f.mu.Unlock()
			}
		}
		if s := status(p); f.spawned > 40 || s.FailuresInARow < 10 || s.LastFailure == "" {
			t.Errorf("%d members in an hour, status %+v", f.spawned, s)
		}
	})
}

func TestPause(t *testing.T) {
	for failures, want := range map[int]time.Duration{
		1: firstBackoff, 2: 2 * firstBackoff, 5: 16 * firstBackoff, 13: lastBackoff, 1 << 40: lastBackoff,
	} {
		if got := pause(failures); got != want {
			t.Errorf("pause(%d) = %s, want %s", failures, got, want)
		}
	}
}

// runLoop runs a pool's loop without a socket, for a test with a clock of its own.
func runLoop(t *testing.T, warm int, f *fakeMaker) *Pool {
	t.Helper()
	f.uids = map[uint32]bool{}
	p, err := New(config.Config{RunDir: t.TempDir(), Warm: &warm}, f)
	if err != nil {
		t.Fatal(err)
	}
	p.uids = newUsers(700000, 1000)
	p.template = &Template{Meta: vm.Meta{Accel: vm.TCG}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.loop(ctx)
		p.releaseAll()
		p.wg.Wait()
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		for _, m := range f.members {
			m.kill() // those that were taken
		}
	})
	return p
}

func status(p *Pool) wire.Status {
	s := make(chan wire.Status, 1)
	p.events <- func() { s <- p.snapshot() }
	return <-s
}
