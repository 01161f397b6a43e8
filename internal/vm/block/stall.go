package block

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	"atoll.dev/atoll/internal/vm/qmp"
)

// retryStalled is how long a machine stands still before it tries again to write to a full file system.
const retryStalled = 2 * time.Second

// Stall lets a machine go on that stands still since a volume's file system on the host is full.
type Stall struct {
	done   <-chan struct{}
	resume func(context.Context) error
	held   func() bool

	mu      sync.Mutex // guards the fields below
	stalled bool
	still   bool // from when it stalls until it has gone on for good
	count   int  // how often it has stood still
	goneOn  func()
}

// NewStall watches a machine. done is closed when it has ended, resume lets it go on, held tells whether it stands still
// for another reason, so that it is not to go on.
func NewStall(done <-chan struct{}, resume func(context.Context) error, held func() bool) *Stall {
	return &Stall{done: done, resume: resume, held: held}
}

// Stalled tells whether the machine stands still for want of space, also while it tries whether it can go on.
func (s *Stall) Stalled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.still
}

// OnGoingOn sets what is called when the machine has stood still and goes on.
func (s *Stall) OnGoingOn(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.goneOn = f
}

// OnEvent takes events of the machine. It does not block.
func (s *Stall) OnEvent(e qmp.Event) {
	if e.Name != "BLOCK_IO_ERROR" {
		return
	}
	var data struct {
		Action  string `json:"action"`
		NoSpace bool   `json:"nospace"`
	}
	if json.Unmarshal(e.Data, &data) != nil || data.Action != "stop" || !data.NoSpace {
		return
	}
	s.mu.Lock()
	first := !s.stalled
	s.stalled, s.still = true, true
	s.count++
	s.mu.Unlock()
	if first {
		go s.unstall()
	}
}

// unstall lets the machine try again every so often, until it has. When it stops again, there is another event, for which
// OnEvent begins anew.
func (s *Stall) unstall() {
	slog.Warn("the file system of a volume is full; its machine stands still until there is room")
	for s.wait() {
		if s.held() {
			continue
		}
		s.mu.Lock()
		s.stalled = false
		count := s.count
		s.mu.Unlock()
		tried := s.try()
		if tried && !s.wait() {
			return
		}
		held := s.held()
		s.mu.Lock()
		again, goneOn := s.count != count, s.goneOn // and perhaps it has just been let go on once more
		retry := !again && (!tried || held)
		s.stalled = s.stalled || retry
		s.still = again || retry
		s.mu.Unlock()
		if retry {
			continue
		}
		if !again && goneOn != nil {
			goneOn()
		}
		return
	}
}

// wait waits until the next try. It tells whether the machine is still there.
func (s *Stall) wait() bool {
	select {
	case <-s.done:
		return false
	case <-time.After(retryStalled):
		return true
	}
}

// try lets the machine go on, and tells whether that could be done.
func (s *Stall) try() bool {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if err := s.resume(ctx); err != nil {
		slog.Warn("letting a machine go on; it is tried again", "error", err)
		return false
	}
	return true
}
