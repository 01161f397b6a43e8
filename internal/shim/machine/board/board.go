// Package board is where the state of a virtual machine is written, and waited for by those who want to know.
//
// It decides nothing and forgets everything but the last state. internal/shim/machine writes, and has the host's agent
// wait. What can go wrong: nothing.
package board

import (
	"context"
	"encoding/json"
	"reflect"
	"sync"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// maxWait bounds how long a caller may wait for a change.
const maxWait = 2 * time.Minute

// Board holds the state of one machine. Make one with New.
type Board struct {
	mu      sync.Mutex // guards the fields below
	state   machinev1.State
	changed chan struct{} // closed at the next change
}

// New makes a board on which the machine is being started.
func New() *Board {
	return &Board{state: machinev1.State{Revision: 1, Phase: machinev1.Starting}, changed: make(chan struct{})}
}

// Update changes the state. Slices and pointers in it must be replaced, not written to.
func (b *Board) Update(change func(*machinev1.State)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := b.state
	change(&next)
	next.Revision = b.state.Revision
	if reflect.DeepEqual(next, b.state) {
		return
	}
	next.Revision++
	b.state = next
	close(b.changed)
	b.changed = make(chan struct{})
}

// Get returns the state as it is now.
func (b *Board) Get() machinev1.State {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state
}

// Wait returns the state once it is another than the caller has seen, or after some time.
func (b *Board) Wait(ctx context.Context, r machinev1.StateRequest) machinev1.State {
	limit := time.NewTimer(min(max(time.Duration(r.WaitMillis)*time.Millisecond, 0), maxWait))
	defer limit.Stop()
	b.mu.Lock()
	state, changed := b.state, b.changed
	b.mu.Unlock()
	if state.Revision != r.Seen {
		return state
	}
	select {
	case <-changed:
	case <-limit.C:
	case <-ctx.Done():
	}
	return b.Get()
}

// JSON is the state as text.
func (b *Board) JSON() string {
	data, err := json.Marshal(b.Get())
	if err != nil {
		return "{}"
	}
	return string(data)
}

// Now is the time as a State has it.
func Now() string { return time.Now().UTC().Format(time.RFC3339) }

// Cut bounds a message for people.
func Cut(s string) string {
	const limit = 1000
	if len(s) <= limit {
		return s
	}
	return s[:limit] + "..."
}
