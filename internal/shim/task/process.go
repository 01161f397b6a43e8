package task

import (
	"context"
	"fmt"
	"sync"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"

	"atoll.dev/atoll/internal/shim/stdio"
	"atoll.dev/atoll/internal/shim/volumes"
)

// container is a container that was created.
type container struct {
	id      string
	bundle  string
	image   string // id of its image in the guest
	usage   string // file to report the use of the writable layer in
	volumes *volumes.Container
	seccomp program
	limits  Resources

	privileged bool

	init *process // nil while the container is being created

	prepared chan struct{} // closed when the guest has the container, or will not have it
	failed   error         // why not; to be read after that
	giveUp   func()        // ends the preparation, if it is not done yet

	mu    sync.Mutex // guards the fields below
	execs map[string]*process
	last  *statistics // of the last answer of the guest
	oom   bool        // a process was killed for memory
}

// program is a seccomp filter for the guest.
type program struct {
	code  []byte
	flags uint32
}

// exit is how a process ended.
type exit struct {
	status uint32
	at     time.Time
	oom    bool
}

// process is a container's first process or an exec.
type process struct {
	exec   string // "" for the first one
	pid    uint32 // for containerd
	config stdio.Config
	io     *stdio.IO
	ended  chan struct{} // closed when the process has exited

	mu       sync.Mutex // guards the fields below
	guestPID uint32     // 0 before the start
	starting bool
	exit     exit
}

func newProcess(exec string, pid uint32, cfg stdio.Config) *process {
	return &process{exec: exec, pid: pid, config: cfg, ended: make(chan struct{})}
}

// isPrepared reports whether the guest has the container, without waiting for it.
func (c *container) isPrepared() bool {
	select {
	case <-c.prepared:
		return c.failed == nil
	default:
		return false
	}
}

// wait waits until the guest has the container.
func (c *container) wait(ctx context.Context) error {
	select {
	case <-c.prepared:
		return c.failed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// process finds the first process or an exec.
func (c *container) process(exec string) (*process, error) {
	if exec == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.execs[exec]
	if p == nil {
		return nil, fmt.Errorf("exec %s in container %s: %w", exec, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

// processes are all processes, the first one last: its exit is to be the last of the container.
func (c *container) processes() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]*process, 0, len(c.execs)+1)
	for _, p := range c.execs {
		all = append(all, p)
	}
	if c.init != nil {
		all = append(all, c.init)
	}
	return all
}

// addExec enters an exec.
func (c *container) addExec(p *process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[p.exec] != nil {
		return fmt.Errorf("exec %s in container %s: %w", p.exec, c.id, errdefs.ErrAlreadyExists)
	}
	c.execs[p.exec] = p
	return nil
}

func (c *container) removeExec(exec string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, exec)
}

// begin reserves the start of a process, which happens once.
func (p *process) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.starting || p.hasEnded() {
		return fmt.Errorf("process was started before: %w", errdefs.ErrFailedPrecondition)
	}
	p.starting = true
	return nil
}

// unbegin takes back the reservation of a start that did not take place.
func (p *process) unbegin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.starting = false
}

// started notes the pid in the guest.
func (p *process) started(guestPID uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.guestPID = guestPID
}

func (p *process) guest() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.guestPID
}

// end notes the exit; only the first one counts.
func (p *process) end(e exit) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hasEnded() {
		return false
	}
	p.exit = e
	close(p.ended)
	return true
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// status is the state in containerd's terms, and the exit when there is one.
func (p *process) status() (tasktypes.Status, exit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.hasEnded():
		return tasktypes.Status_STOPPED, p.exit
	case p.guestPID != 0:
		return tasktypes.Status_RUNNING, exit{}
	}
	return tasktypes.Status_CREATED, exit{}
}
