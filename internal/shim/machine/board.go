package machine

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

// board is where the state of the machine is written and waited for.
type board struct {
	mu      sync.Mutex // guards the fields below
	state   machinev1.State
	changed chan struct{} // closed at the next change
}

func newBoard() *board {
	return &board{state: machinev1.State{Revision: 1, Phase: machinev1.Starting}, changed: make(chan struct{})}
}

// update changes the state. Slices and pointers in it must be replaced, not written to.
func (b *board) update(change func(*machinev1.State)) {
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

func (b *board) get() machinev1.State {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state
}

// wait returns the state once it is another than the caller has seen, or after some time.
func (b *board) wait(ctx context.Context, r machinev1.StateRequest) machinev1.State {
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
	return b.get()
}

// json is the state as text.
func (b *board) json() string {
	data, err := json.Marshal(b.get())
	if err != nil {
		return "{}"
	}
	return string(data)
}

// now is the time as State has it.
func now() string { return time.Now().UTC().Format(time.RFC3339) }

// cut bounds a message for people.
func cut(s string) string {
	const limit = 1000
	if len(s) <= limit {
		return s
	}
	return s[:limit] + "..."
}
