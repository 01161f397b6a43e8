// Package container runs the containers of a pod inside its micro-VM: overlay, cgroup, namespaces,
// the exec helper, stdio, exits.
//
// It takes OCI runtime specs and ids from the host (which is trusted) and runs commands of users
// (which are not). It knows nothing of the wire protocol; guest init's service calls it. What a
// start does in detail is in package program. What can go wrong for a user, a command that is not
// there for instance, comes back as the error of Start with a text like runc's.
package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/cgroup"
	"atoll.dev/atoll/internal/guest/disk"
	"atoll.dev/atoll/internal/guest/program"
	"atoll.dev/atoll/internal/guest/usage"
	"atoll.dev/atoll/internal/guest/volume"
)

var (
	// ErrNotFound is wrapped when a container, exec or process is not there (any more).
	ErrNotFound = errors.New("not found")
	// ErrExists is wrapped when an id is taken.
	ErrExists = errors.New("already exists")
	// ErrState is wrapped when the call does not fit the state of the process.
	ErrState = errors.New("wrong state")
	// ErrInvalid is wrapped when a request contradicts itself.
	ErrInvalid = errors.New("invalid")
)

// Config is what a runtime works with.
type Config struct {
	Helper  string // the exec helper
	Rootfs  string // existing directory that every container mounts its root on, in its own namespace
	Scratch string // existing directory for writable layers
	Shm     string // the pod's /dev/shm

	MountPoints MountPoints

	Reaper  *Reaper
	Tree    *cgroup.Tree
	Disks   *disk.Disks
	Volumes *volume.Store
	Meter   *usage.Meter
	Filter  *DeviceFilter
	Watch   *Watcher
}

// Runtime holds the containers.
type Runtime struct {
	cfg    Config
	tasks  sync.WaitGroup
	remove chan string   // directories to delete
	shells chan *shell   // ready for the next containers
	missed chan struct{} // there was no shell

	mu         sync.Mutex
	shellCount int
	pause      started // first process of the shared pid namespace, pid 0: none
	containers map[string]*Container
}

// New returns a runtime without containers.
func New(cfg Config) *Runtime {
	return &Runtime{
		cfg: cfg, remove: make(chan string, 128), containers: map[string]*Container{},
		shells: make(chan *shell, readyShells), missed: make(chan struct{}, 1),
	}
}

// Run deletes the writable layers of deleted containers and makes new shells once all were
// taken, until ctx ends.
func (r *Runtime) Run(ctx context.Context) error {
	var refill <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.missed:
			refill = time.After(refillDelay)
		case <-refill:
			refill = nil
			if err := r.FillShells(); err != nil {
				return err
			}
		case dir := <-r.remove:
			if err := os.RemoveAll(dir); err != nil {
				return fmt.Errorf("removing writable layer: %w", err)
			}
		}
	}
}

// spawn starts a goroutine that ends with a process.
func (r *Runtime) spawn(f func()) {
	r.tasks.Go(f)
}

// SharePID makes the pid namespace that all containers will join.
func (r *Runtime) SharePID() error {
	prog, err := program.Pause()
	if err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	h, err := newHelper(r.cfg.Reaper, launch{helper: r.cfg.Helper, flags: unix.CLONE_NEWPID}, &stdio{child: []*os.File{null}})
	if err != nil {
		return fmt.Errorf("starting pause process: %w", err)
	}
	if err := h.execute(prog); err != nil {
		return fmt.Errorf("starting pause process: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pause = h.child
	return nil
}

// Get returns a container.
func (r *Runtime) Get(id string) (*Container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.containers[id]
	if !ok {
		return nil, fmt.Errorf("container %s: %w", id, ErrNotFound)
	}
	return c, nil
}

// List returns all containers.
func (r *Runtime) List() []*Container {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]*Container, 0, len(r.containers))
	for _, c := range r.containers {
		list = append(list, c)
	}
	return list
}

// Attach gives a process one of its stdio streams. On an error the caller closes the stream.
func (r *Runtime) Attach(id, exec string, fd int, s stream) error {
	c, err := r.Get(id)
	if err != nil {
		return err
	}
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	return p.attach(fd, s)
}

// forget takes a container out of the table.
func (r *Runtime) forget(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.containers, id)
}
