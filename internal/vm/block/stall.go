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

	mu      sync.Mutex // guards the fields below
	stalled bool
	goneOn  func()
}

// NewStall watches a machine. done is closed when it has ended, resume lets it go on.
func NewStall(done <-chan struct{}, resume func(context.Context) error) *Stall {
	return &Stall{done: done, resume: resume}
}

// Stalled tells whether the machine stands still for want of space.
func (s *Stall) Stalled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stalled
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
	s.stalled = true
	s.mu.Unlock()
	if first {
		go s.unstall()
	}
}

// unstall lets the machine try again after a while. When it stops again, there is another event.
func (s *Stall) unstall() {
	slog.Warn("the file system of a volume is full; its machine stands still until there is room")
	select {
	case <-s.done:
		return
	case <-time.After(retryStalled):
	}
	s.mu.Lock()
	s.stalled = false
	goneOn := s.goneOn
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if err := s.resume(ctx); err != nil {
		slog.Warn("letting a machine go on", "error", err)
		return
	}
	if goneOn != nil { // unless it stops again at once
		time.AfterFunc(retryStalled, func() {
			if !s.Stalled() {
				goneOn()
			}
		})
	}
}
