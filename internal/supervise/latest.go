package supervise

import (
	"context"
	"sync"
)

// Latest holds a value of which only the newest state matters, and lets others
// wait for it to become what they need. The zero value holds the zero T.
type Latest[T any] struct {
	mu      sync.Mutex
	value   T
	changed chan struct{} // closed and replaced on every Set; nil while nobody waits
}

// Set replaces the value and wakes those who wait.
func (l *Latest[T]) Set(value T) {
	l.Update(func(T) T { return value })
}

// Update replaces the value by change(value) in one step.
func (l *Latest[T]) Update(change func(T) T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.value = change(l.value)
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// Get returns the value and a channel that is closed when it changes.
func (l *Latest[T]) Get() (T, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.value, l.changed
}

// Wait returns the first value for which ok is true, or the context's error.
// Values that come and go between two looks are not seen.
func (l *Latest[T]) Wait(ctx context.Context, ok func(T) bool) (T, error) {
	for {
		value, changed := l.Get()
		if ok(value) {
			return value, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return value, ctx.Err()
		}
	}
}
