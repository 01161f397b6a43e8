package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"

	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/shim/hostcgroup"
)

// ledger is the daemon's record in the registry.
type ledger struct {
	reg registry.Registry

	saving sync.Mutex // held while the record is written

	mu    sync.Mutex // guards the field below
	entry registry.Entry
}

// get is the record as it is now.
func (l *ledger) get() registry.Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.entry
}

// change changes the record and writes it, as it is by then.
func (l *ledger) change(f func(*registry.Entry)) error {
	l.mu.Lock()
	f(&l.entry)
	l.mu.Unlock()
	l.saving.Lock()
	defer l.saving.Unlock()
	return l.reg.Put(l.get())
}

func (l *ledger) setQEMU(pid int) {
	if err := l.change(func(e *registry.Entry) { e.QEMU = pid }); err != nil {
		slog.Warn("recording qemu", "error", err)
	}
}

// file is a file in the daemon's directory, socket the one that containerd connects to.
func (l *ledger) file(name string) string { return filepath.Join(l.reg.Dir(l.get().Member), name) }
func (l *ledger) socket() string          { return l.reg.Socket(l.get().Member) }

// listen makes the daemon's directory, record and socket.
func (l *ledger) listen() (net.Listener, error) {
	if err := os.MkdirAll(l.reg.Dir(l.get().Member), 0o700); err != nil {
		return nil, fmt.Errorf("making directory of member: %w", err)
	}
	if err := l.change(func(*registry.Entry) {}); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", l.socket())
	if err != nil {
		return nil, fmt.Errorf("listening for containerd: %w", err)
	}
	return listener, nil
}

// remove removes the record.
func (l *ledger) remove() error { return l.reg.Remove(l.get()) }

// cgroups places processes and keeps the record of where.
type cgroups struct {
	ledger *ledger

	mu    sync.Mutex // guards the field below
	group hostcgroup.Group
}

func (c *cgroups) Join(parent, name string, pids ...int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	c.group, err = hostcgroup.Join(parent, name, pids...)
	return errors.Join(err, c.ledger.change(func(e *registry.Entry) { e.Cgroups = c.group.Dirs }))
}

func (c *cgroups) Sustain(memory int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.group.Sustain(memory)
}

func (*cgroups) SetOOMScore(pid, score int) error { return process.SetOOMScore(pid, score) }

// OOMKilled tells whether the kernel has killed a process of the group for memory.
func (c *cgroups) OOMKilled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.group.OOMKilled()
}

func (c *cgroups) Leave() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.group
	c.group = hostcgroup.Group{}
	if err := g.Leave(os.Getpid()); err != nil {
		return err
	}
	return hostcgroup.Remove(context.Background(), g.Dirs)
}
