package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// exit is how a process ended.
type exit struct {
	status int // exit code, or 128 + signal
	at     time.Time
}

// Reaper is the part of process 1 that forks and waits. Every child of init is started and reaped
// here, so that a process id is never reused between a look-up and a signal.
type Reaper struct {
	selfPID *os.File // init's own pid namespace

	mu      sync.Mutex
	waiting map[int]chan exit
}

// NewReaper returns the reaper of process 1.
func NewReaper() (*Reaper, error) {
	self, err := os.Open("/proc/self/ns/pid")
	if err != nil {
		return nil, fmt.Errorf("opening own pid namespace: %w", err)
	}
	return &Reaper{selfPID: self, waiting: map[int]chan exit{}}, nil
}

// Run reaps children and orphans until ctx ends.
func (r *Reaper) Run(ctx context.Context) error {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGCHLD)
	defer signal.Stop(sig)
	for {
		r.reap()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-sig:
		}
	}
}

func (r *Reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if !ws.Exited() && !ws.Signaled() {
			continue
		}
		if ch, ok := r.waiting[pid]; ok {
			delete(r.waiting, pid)
			e := exit{status: ws.ExitStatus(), at: time.Now()}
			if ws.Signaled() {
				e.status = 128 + int(ws.Signal())
			}
			ch <- e
		}
	}
}

// child says how to fork one.
type child struct {
	path   string
	files  []uintptr // descriptors 0, 1, ... of the child
	flags  uintptr   // CLONE_NEW*
	pidNS  *os.File  // pidfd or namespace to fork into, nil for own
	cgroup *os.File
}

// started is a running child.
type started struct {
	pid   int
	pidFD *os.File
	exit  <-chan exit
}

// fork starts a child. The channel of its exit has room for the one value it gets.
func (r *Reaper) fork(c child) (started, error) {
	pidFD := -1
	attr := &syscall.ProcAttr{Dir: "/", Env: []string{}, Files: c.files, Sys: &syscall.SysProcAttr{
		Cloneflags: c.flags, PidFD: &pidFD,
	}}
	if c.cgroup != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(c.cgroup.Fd())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := r.forkIn(c.pidNS, func() (int, error) {
		return syscall.ForkExec(c.path, []string{c.path}, attr)
	})
	if err != nil {
		return started{}, fmt.Errorf("forking: %w", err)
	}
	ch := make(chan exit, 1)
	r.waiting[pid] = ch
	return started{pid: pid, pidFD: os.NewFile(uintptr(pidFD), "pidfd"), exit: ch}, nil
}

// forkIn calls fork on a thread whose children are born in the given pid namespace. If the thread
// cannot be brought back it is given up: the goroutine stays locked to it, and it ends with it.
func (r *Reaper) forkIn(ns *os.File, fork func() (int, error)) (int, error) {
	if ns == nil {
		return fork()
	}
	type result struct {
		pid int
		err error
	}
	done := make(chan result)
	go func() { // its own goroutine, so that it may take its thread with it
		runtime.LockOSThread()
		var res result
		if res.err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWPID); res.err != nil {
			res.err = fmt.Errorf("joining pid namespace: %w", res.err)
		} else {
			res.pid, res.err = fork()
		}
		if unix.Setns(int(r.selfPID.Fd()), unix.CLONE_NEWPID) == nil {
			runtime.UnlockOSThread()
		}
		done <- res
	}()
	res := <-done
	return res.pid, res.err
}

// kill signals a child that has not been reaped.
func (r *Reaper) kill(pid int, sig unix.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.waiting[pid]; !ok {
		return unix.ESRCH
	}
	return unix.Kill(pid, sig)
}
