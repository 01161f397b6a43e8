// Package monitor is QMP as the packages that run machines use it: commands that fail with ErrExited once
// QEMU has ended, and waiting for events.
//
// It is a thin layer on package qmp and knows no machine. Packages vm and hardware use it.
package monitor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"atoll.dev/atoll/internal/vm/qmp"
)

// ErrExited is wrapped when the machine has ended.
var ErrExited = errors.New("machine has ended")

// Monitor is the monitor of one QEMU. Its methods may be called from several goroutines.
type Monitor struct {
	*qmp.Client
	ended   <-chan struct{}
	onEvent func(qmp.Event)

	mu      sync.Mutex // guards the field below
	waiters []*Waiter
}

// New takes over a connection. ended is closed when the machine has ended. onEvent, which may be nil, is called
// for every event in order, before those who wait for it are told; it must not block or call the monitor.
func New(conn *net.UnixConn, ended <-chan struct{}, onEvent func(qmp.Event)) *Monitor {
	m := &Monitor{ended: ended, onEvent: onEvent}
	m.Client = qmp.New(conn, m.deliver)
	return m
}

// Do executes commands. Errors begin with doing.
func (m *Monitor) Do(ctx context.Context, doing string, commands ...qmp.Command) error {
	err := m.Run(ctx, commands...)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, qmp.ErrClosed):
		return fmt.Errorf("%s: %w: %w", doing, ErrExited, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// Waiter waits for one event.
type Waiter struct {
	m     *Monitor
	match func(qmp.Event) bool
	event chan qmp.Event // buffered
}

// Expect starts to listen for an event. It must be called before what causes the event, and Wait or Forget after.
func (m *Monitor) Expect(match func(qmp.Event) bool) *Waiter {
	w := &Waiter{m: m, match: match, event: make(chan qmp.Event, 1)}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiters = append(m.waiters, w)
	return w
}

// Wait waits for the event.
func (w *Waiter) Wait(ctx context.Context) (qmp.Event, error) {
	defer w.Forget()
	select {
	case e := <-w.event:
		return e, nil
	case <-w.m.ended:
		return qmp.Event{}, ErrExited
	case <-ctx.Done():
		return qmp.Event{}, ctx.Err()
	}
}

// Forget stops to listen.
func (w *Waiter) Forget() {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	for i, other := range w.m.waiters {
		if other == w {
			w.m.waiters = append(w.m.waiters[:i], w.m.waiters[i+1:]...)
			return
		}
	}
}

// deliver takes events from QMP.
func (m *Monitor) deliver(e qmp.Event) {
	if m.onEvent != nil {
		m.onEvent(e)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.waiters {
		if w.match(e) {
			select {
			case w.event <- e:
			default:
			}
		}
	}
}
