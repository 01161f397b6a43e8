package container

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/cgroup"
)

// EventKind says what happened.
type EventKind int

// The kinds of events.
const (
	EventOOM       EventKind = iota // a process of the container was killed for memory
	EventLowMemory                  // the pod as a whole hit the end of the guest's memory
)

// Event is something the host must know.
type Event struct {
	Kind      EventKind
	Container string
}

const (
	maxEvents = 256
	podWatch  = ""
)

// Watcher turns changes of memory.events files into events.
type Watcher struct {
	inotify *os.File
	events  chan Event

	mu     sync.Mutex
	groups map[string]*watched
	byWD   map[int32]string
}

type watched struct {
	group *cgroup.Group
	wd    int32
	kills uint64
}

// NewWatcher returns a watcher that also watches the pod's own group.
func NewWatcher(pod *cgroup.Group) (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watching memory events: %w", err)
	}
	w := &Watcher{
		inotify: os.NewFile(uintptr(fd), "inotify"), events: make(chan Event, maxEvents),
		groups: map[string]*watched{}, byWD: map[int32]string{},
	}
	if err := w.add(podWatch, pod); err != nil {
		return nil, err
	}
	return w, nil
}

// Run reads notifications until ctx ends.
func (w *Watcher) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = w.inotify.Close() })
	defer stop()
	buf := make([]byte, 4096)
	for {
		n, err := w.inotify.Read(buf)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("reading memory events: %w", err)
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(b))
			b = b[min(len(b), unix.SizeofInotifyEvent+int(binary.NativeEndian.Uint32(b[12:]))):]
			w.changed(wd)
		}
	}
}

// Next blocks until there is an event.
func (w *Watcher) Next(ctx context.Context) (Event, error) {
	select {
	case e := <-w.events:
		return e, nil
	case <-ctx.Done():
		return Event{}, ctx.Err()
	}
}

func (w *Watcher) add(id string, group *cgroup.Group) error {
	wd, err := unix.InotifyAddWatch(int(w.inotify.Fd()), filepath.Join(group.Dir(), "memory.events"), unix.IN_MODIFY)
	if errors.Is(err, unix.ENOENT) {
		return nil // no memory controller
	}
	if err != nil {
		return fmt.Errorf("watching memory events: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.groups[id] = &watched{group: group, wd: int32(wd)}
	w.byWD[int32(wd)] = id
	return nil
}

// drop forgets a group; the kernel ends the watch when the file goes.
func (w *Watcher) drop(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if g, ok := w.groups[id]; ok {
		delete(w.byWD, g.wd)
		delete(w.groups, id)
	}
}

func (w *Watcher) changed(wd int32) {
	w.mu.Lock()
	id, ok := w.byWD[wd]
	g := w.groups[id]
	w.mu.Unlock()
	if ok {
		w.check(id, g.group)
	}
}

// check reports kills that were not reported yet. Kills inside a container count up to the pod, so
// for the pod only what happened at its own limit counts.
func (w *Watcher) check(id string, group *cgroup.Group) {
	kills, event := uint64(0), Event{Kind: EventOOM, Container: id}
	if id == podWatch {
		kills, event = group.LocalOOMs(), Event{Kind: EventLowMemory}
	} else {
		kills = group.OOMKills()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	g, ok := w.groups[id]
	if !ok || kills <= g.kills {
		return
	}
	g.kills = kills
	select {
	case w.events <- event:
	default: // nobody listens; the next change brings a new one
	}
}
