package freeze

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"atoll.dev/atoll/internal/vm/guestagent"
)

const (
	freeze = "guest-fsfreeze-freeze"
	thaw   = "guest-fsfreeze-thaw"
	status = "guest-fsfreeze-status"
)

// starved is a guest whose agent writes down what it is asked, but for whether it is there, and answers when it has time.
type starved struct {
	t      *testing.T
	conn   net.Conn
	gone   chan struct{}
	exited sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	all    []string
	still  chan struct{} // it does nothing until this is closed
	frozen bool
}

// guestOf is a guest, and what the shim has of it.
func guestOf(t *testing.T) (*starved, *Guest) {
	mine, theirs := net.Pipe()
	s := &starved{t: t, conn: theirs, gone: make(chan struct{}), still: make(chan struct{})}
	close(s.still)
	go s.run()
	return s, New(Config{Agent: guestagent.New(mine), Gone: s.gone, Go: s.exited.Go, Log: slog.New(slog.DiscardHandler)})
}

func (s *starved) run() {
	lines := make(chan []byte, 1000) // what is said meanwhile piles up
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(s.conn); in.Scan(); {
			lines <- bytes.TrimLeft([]byte(in.Text()), "\xff")
		}
	}()
	for line := range lines {
		var r struct {
			Execute   string
			Arguments struct{ ID int64 }
		}
		if err := json.Unmarshal(line, &r); err != nil {
			continue
		}
		s.mu.Lock()
		still := s.still
		s.mu.Unlock()
		<-still
		answer := `{"return": 1}`
		switch s.mu.Lock(); r.Execute {
		case "guest-sync-delimited":
			answer = fmt.Sprintf("\xff{\"return\": %d}", r.Arguments.ID)
		case "guest-ping":
		case freeze, thaw:
			s.frozen = r.Execute == freeze
			fallthrough
		default:
			s.all = append(s.all, r.Execute)
		}
		s.mu.Unlock()
		if _, err := fmt.Fprintln(s.conn, answer); err != nil {
			return
		}
	}
}

// starve has the guest do nothing until what it returns is called.
func (s *starved) starve() (feed func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	still := make(chan struct{})
	s.still = still
	return func() { close(still) }
}

// want checks what the guest was asked, and whether it is frozen.
func (s *starved) want(frozen bool, commands ...string) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.all, commands) || s.frozen != frozen {
		s.t.Errorf("asked %q, want %q; frozen %v", s.all, commands, s.frozen)
	}
}

// end ends the machine.
func (s *starved) end() {
	close(s.gone)
	_ = s.conn.Close()
	s.exited.Wait()
}

// TestFrozenByOne: a guest is not frozen twice, nor thawed while another needs it frozen.
func TestFrozenByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, g := guestOf(t)
		release := g.TryFreeze(t.Context()) // of one disk
		var all func()
		waiting := make(chan error)
		go func() {
			var err error
			all, err = g.Freeze(t.Context(), time.Minute) // of the machine
			waiting <- err
		}()
		synctest.Wait()
		g.TryFreeze(t.Context())()
		s.want(true, freeze)
		release()
		if err := <-waiting; err != nil {
			t.Fatal(err)
		}
		g.TryFreeze(t.Context())()
		s.want(true, freeze, thaw, freeze)
		all()
		s.want(false, freeze, thaw, freeze, thaw)
		s.end()
	})
}

// TestStarved: a guest that does not hear the thaw in time is thawed when it hears again, and not frozen before that.
func TestStarved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, g := guestOf(t)
		release, err := g.Freeze(t.Context(), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		feed := s.starve()
		release() // the snapshot is taken, and its caller goes on
		s.want(true, freeze)
		g.TryFreeze(t.Context())() // of a disk, which is kept as it is
		if _, err := g.Freeze(t.Context(), time.Minute); !errors.Is(err, ErrFrozen) {
			t.Errorf("it was frozen again: %v", err)
		}
		if err := g.Flush(t.Context(), "TrySoft"); !errors.Is(err, ErrFrozen) {
			t.Errorf("its memory would be saved while it is frozen: %v", err)
		}
		s.want(true, freeze)
		time.Sleep(time.Hour)
		again := make(chan error)
		var next func()
		go func() {
			var err error
			next, err = g.Freeze(t.Context(), time.Minute)
			again <- err
		}()
		feed()
		if err := <-again; err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour) // no thaw comes from before
		s.mu.Lock()
		asked := slices.Clone(s.all)
		s.mu.Unlock()
		if n := slices.Index(asked, thaw); n < 0 || asked[len(asked)-1] != freeze || !s.frozen {
			t.Errorf("asked %q", asked)
		}
		next()
		if s.frozen {
			t.Error("it is frozen in the end")
		}
		s.end()
	})
}

// TestEndedWhileFrozen: nothing is left to do when the machine ends before its guest hears.
func TestEndedWhileFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, g := guestOf(t)
		release := g.TryFreeze(t.Context())
		feed := s.starve()
		release()
		feed()
		s.end()
	})
}

// TestRestored: a guest whose memory was saved while it was frozen goes on.
func TestRestored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, g := guestOf(t)
		s.frozen = true
		g.Restored(context.WithoutCancel(t.Context()))
		s.want(false, thaw)
		s.end()
	})
}

// TestNobodyThere: a guest without an agent was never frozen, so nobody waits for its thaw.
func TestNobodyThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, g := guestOf(t)
		feed := s.starve()
		for range 2 {
			release, err := g.Freeze(t.Context(), time.Minute)
			if err == nil || errors.Is(err, ErrFrozen) {
				t.Errorf("freezing it: %v", err)
			}
			release()
			g.TryFreeze(t.Context())()
		}
		if err := g.Flush(t.Context(), "TrySoft"); err != nil {
			t.Errorf("suspending it: %v", err)
		}
		s.want(false)
		feed()
		s.end()
	})
}

// TestResetWhileFrozen: a guest that has begun anew is not frozen, whether or not its agent comes back.
func TestResetWhileFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, g := guestOf(t)
		g.Reset() // of before
		release, err := g.Freeze(t.Context(), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		feed := s.starve()
		release()
		g.Reset()
		time.Sleep(2 * time.Minute)
		if err := g.Flush(t.Context(), "TrySoft"); err != nil {
			t.Errorf("suspending it: %v", err)
		}
		feed()
		s.end()
	})
}
