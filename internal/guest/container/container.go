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
	"atoll.dev/atoll/internal/guest/flatspec"
	"atoll.dev/atoll/internal/guest/program"
	"atoll.dev/atoll/internal/guest/usage"
)

// deleteTimeout bounds how long a container's processes may take to die of SIGKILL.
const deleteTimeout = 30 * time.Second

// Container is one container.
type Container struct {
	id      string
	runtime *Runtime
	shell   *shell
	pid     pidMode
	init    *process

	privileged bool // all devices of the guest, a writable cgroup tree

	mu    sync.Mutex
	group *cgroup.Group // of the shell; nil until the container is completely created
	execs map[string]*process
}

// ID is the container's id.
func (c *Container) ID() string { return c.id }

// ready returns the cgroup of a container that was completely created.
func (c *Container) ready() (*cgroup.Group, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.group == nil {
		return nil, fmt.Errorf("container %s is not ready: %w", c.id, ErrState)
	}
	return c.group, nil
}

// process finds the first process (exec "") or an exec.
func (c *Container) process(exec string) (*process, error) {
	if _, err := c.ready(); err != nil {
		return nil, err
	}
	if exec == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.execs[exec]
	if !ok {
		return nil, fmt.Errorf("exec %s in container %s: %w", exec, c.id, ErrNotFound)
	}
	return p, nil
}

// Start starts the first process or an exec and returns its pid in the guest.
func (c *Container) Start(exec string) (int, error) {
	p, err := c.process(exec)
	if err != nil {
		return 0, err
	}
	group, err := c.ready()
	if err != nil {
		return 0, err
	}
	enter := group
	if exec != "" && c.privileged {
		if enter, err = c.currentGroup(); err != nil {
			return 0, err
		}
	}
	cg, err := enter.Open()
	if err != nil {
		return 0, err
	}
	defer cg.Close()
	l := launch{helper: c.runtime.cfg.Helper, cgroup: cg}
	if exec == "" {
		err = c.pidNamespace(&l)
	} else {
		err = c.join(&l)
	}
	if err != nil {
		return 0, err
	}
	if l.pidNS != nil {
		defer l.pidNS.Close()
	}
	var ready *helper
	if exec == "" {
		c.mu.Lock()
		ready, c.shell.helper = c.shell.helper, nil
		c.mu.Unlock()
	}
	if err := p.start(c.runtime.cfg.Reaper, l, ready, c.runtime.spawn); err != nil {
		return 0, err
	}
	c.runtime.spawn(func() { p.wait(func() bool { return c.ended(exec, group) }) })
	return p.child.pid, nil
}

// currentGroup is the group the first process is in now. A privileged container may have moved it
// and divided its own group up, which no process can enter then.
func (c *Container) currentGroup() (*cgroup.Group, error) {
	c.init.mu.Lock()
	defer c.init.mu.Unlock()
	if !c.init.running {
		return nil, fmt.Errorf("container %s is not running: %w", c.id, ErrState)
	}
	return c.runtime.cfg.Tree.Of(c.init.child.pid)
}

// pidNamespace chooses the namespace of a first process.
func (c *Container) pidNamespace(l *launch) error {
	switch {
	case c.pid.path != "":
		ns, err := os.Open(c.pid.path)
		if err != nil {
			return fmt.Errorf("opening pid namespace of the target container: %w", err)
		}
		l.pidNS = ns
	case c.pid.shared:
		c.runtime.mu.Lock()
		pause := c.runtime.pause.pidFD
		c.runtime.mu.Unlock()
		ns, err := dup(pause)
		if err != nil {
			return err
		}
		l.pidNS = ns
	default:
		l.flags |= unix.CLONE_NEWPID
	}
	return nil
}

// join makes an exec start in the running container's namespaces.
func (c *Container) join(l *launch) error {
	c.init.mu.Lock()
	defer c.init.mu.Unlock()
	if !c.init.running {
		return fmt.Errorf("container %s is not running: %w", c.id, ErrState)
	}
	l.target = c.init.child.pidFD
	ns, err := dup(c.init.child.pidFD)
	if err != nil {
		return err
	}
	l.pidNS = ns
	l.target = ns
	return nil
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicating descriptor: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// ended is called when a process is gone: it ends what the first process of a container in a
// shared namespace leaves behind and reports whether memory ran out.
func (c *Container) ended(exec string, group *cgroup.Group) (oom bool) {
	if exec == "" && (c.pid.shared || c.pid.path != "") {
		_ = group.Kill() //nolint:errcheck // Delete tries again and reports
	}
	oom = group.OOMKills() > 0
	if oom && exec == "" {
		c.runtime.cfg.Watch.check(c.id, group)
	}
	return oom
}

// Exec is a request for another process in a running container.
type Exec struct {
	ID           string
	Process      []byte // OCI process, see package flatspec
	Terminal     bool
	Stdin        bool
	Seccomp      []byte
	SeccompFlags uint32
}

// CreateExec prepares an exec; Start runs it.
func (c *Container) CreateExec(req Exec) error {
	spec, err := flatspec.ReadProcess(req.Process)
	if err != nil {
		return fmt.Errorf("reading process: %w: %w", ErrInvalid, err)
	}
	if _, err := c.ready(); err != nil {
		return err
	}
	c.init.mu.Lock()
	running, pid := c.init.running, c.init.child.pid
	c.init.mu.Unlock()
	if !running {
		return fmt.Errorf("container %s is not running: %w", c.id, ErrState)
	}
	prog, err := program.Exec{
		Process: spec, Terminal: req.Terminal, Seccomp: req.Seccomp, SeccompFlags: req.SeccompFlags,
		Home: home([]string{fmt.Sprintf("/proc/%d/root", pid)}, spec),
	}.Compile()
	if err != nil {
		return err
	}
	p := newProcess(prog, req.Terminal, req.Stdin)
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.execs[req.ID]; ok {
		return fmt.Errorf("exec %s in container %s: %w", req.ID, c.id, ErrExists)
	}
	c.execs[req.ID] = p
	return nil
}

// Wait waits for a process to end and its output to be passed on.
func (c *Container) Wait(ctx context.Context, exec string) (State, error) {
	p, err := c.process(exec)
	if err != nil {
		return State{}, err
	}
	select {
	case <-p.done:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.state, nil
	case <-ctx.Done():
		return State{}, ctx.Err()
	}
}

// Kill sends a signal to one process, or to all of the container.
func (c *Container) Kill(exec string, sig unix.Signal, all bool) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	group, err := c.ready()
	if err != nil {
		return err
	}
	if all && exec == "" {
		if sig == unix.SIGKILL {
			return group.Kill()
		}
		pids, err := group.Pids()
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("signalling process %d: %w", pid, err)
			}
		}
		return nil
	}
	p.mu.Lock()
	running, pid := p.running, p.child.pid
	p.mu.Unlock()
	if !running {
		return fmt.Errorf("process is not running: %w", ErrNotFound)
	}
	if err := c.runtime.cfg.Reaper.kill(pid, sig); errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("process is not running: %w", ErrNotFound)
	} else if err != nil {
		return fmt.Errorf("signalling process: %w", err)
	}
	return nil
}

// Delete forgets a process that has ended, or was never started. Deleting a container ends
// whatever of it still runs.
func (c *Container) Delete(ctx context.Context, exec string) (State, error) {
	p, err := c.process(exec)
	if err != nil {
		return State{}, err
	}
	p.mu.Lock()
	state, running := p.state, p.child.pid != 0 && !p.isStopped()
	p.mu.Unlock()
	if running {
		return State{}, fmt.Errorf("process is running: %w", ErrState)
	}
	if exec != "" {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.execs, exec)
		return state, nil
	}
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	group, err := c.ready()
	if err != nil {
		return State{}, err
	}
	if err := group.Delete(ctx); err != nil {
		return State{}, err
	}
	c.runtime.cfg.Watch.drop(c.id)
	c.shell.dropHelper()
	c.runtime.forget(c.id)
	return state, c.runtime.removeLayer(ctx, c.shell.dir)
}

// Resize sets the size of a process's terminal.
func (c *Container) Resize(exec string, width, height uint16) error {
	p, err := c.process(exec)
	if err != nil {
		return err
	}
	return p.resize(width, height)
}

// Update changes limits in place.
func (c *Container) Update(resources []byte) error {
	r, err := flatspec.ReadResources(resources)
	if err != nil {
		return fmt.Errorf("reading resources: %w: %w", ErrInvalid, err)
	}
	group, err := c.ready()
	if err != nil {
		return err
	}
	return group.Apply(r)
}

// Pids lists the container's processes by their ids in the guest.
func (c *Container) Pids() ([]int, error) {
	group, err := c.ready()
	if err != nil {
		return nil, err
	}
	return group.Pids()
}

// Stats reads the container's counters and the usage of its writable layer.
func (c *Container) Stats() (cgroup.Stats, usage.Usage, error) {
	group, err := c.ready()
	if err != nil {
		return cgroup.Stats{}, usage.Usage{}, err
	}
	s, err := group.Stats()
	if err != nil {
		return cgroup.Stats{}, usage.Usage{}, err
	}
	u, err := c.shell.usage.Usage()
	return s, u, err
}
