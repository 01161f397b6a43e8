package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/tap"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// Machine is a running micro-VM. Its methods may be called from several goroutines.
type Machine struct {
	meta     Meta
	proc     *qemu.Process
	qmp      *qmp.Client
	channel  *net.UnixConn
	console  *ring
	done     chan struct{} // closed when exit is set
	patience time.Duration // for a change of volumes: changeTimeout, but in tests

	devices sync.Mutex // held over each change of devices; guards the next fields
	slots   [ImageSlots]bool
	disks   map[string]int // LUN by serial, of volumes too
	volumes map[string]*volume
	nextLUN int
	nextSet int
	dimms   int
	added   int64 // bytes

	mu      sync.Mutex // guards the fields below
	reason  string     // of QEMU's SHUTDOWN event
	killed  bool
	stalled bool // for want of space
	goneOn  func()
	waiters []*waiter
	exit    Exit
}

// ExitReason is a way for a machine to end.
type ExitReason string

// Ways to end.
const (
	ExitShutdown ExitReason = "shutdown" // the guest powered off
	ExitReset    ExitReason = "reset"    // the guest rebooted, which it does on a kernel panic
	ExitKilled   ExitReason = "killed"   // Kill or Close was called
	ExitFailed   ExitReason = "failed"   // QEMU ended by itself or was killed by someone else
)

// Exit is how a machine ended.
type Exit struct {
	Reason ExitReason
	Status syscall.WaitStatus // of the QEMU process
	Detail string             // QEMU's last words, may be empty
}

func (e Exit) String() string {
	s := string(e.Reason)
	switch {
	case e.Status.Signaled():
		s += ", qemu killed by " + e.Status.Signal().String()
	case e.Status.ExitStatus() != 0:
		s += fmt.Sprintf(", qemu ended with status %d", e.Status.ExitStatus())
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

// launchConfig is what launch needs beyond the machine itself.
type launchConfig struct {
	uid, gid uint32
	tap      *os.File // nil: one that leads nowhere
}

// launch starts QEMU and everything that watches it.
func launch(q qemu.Config, l launchConfig) (_ *Machine, err error) {
	m := &Machine{
		console: newRing(consoleBytes), done: make(chan struct{}), patience: changeTimeout,
		disks: make(map[string]int), volumes: make(map[string]*volume), nextSet: volumeFDSet,
	}
	var undo []func() error
	defer func() {
		if err != nil {
			for _, f := range undo {
				_ = f()
			}
		}
	}()
	var conns [3]*net.UnixConn
	for i, file := range []**os.File{&q.QMP, &q.Control, &q.Console} {
		var child *os.File
		if conns[i], child, err = socketPair(); err != nil {
			return nil, err
		}
		*file = child
		defer child.Close()
		undo = append(undo, conns[i].Close)
	}
	q.Tap = l.tap
	if q.Tap == nil {
		if q.Tap, err = tap.OpenIsolated("tap0"); err != nil {
			return nil, err
		}
		defer q.Tap.Close()
	}
	groups, err := kvmGroups(Accel(q.Accel))
	if err != nil {
		return nil, err
	}
	m.proc, err = qemu.Start(q, qemu.Credential{UID: l.uid, GID: l.gid, Groups: groups})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrQEMU, err)
	}
	m.channel = conns[1]
	m.qmp = qmp.New(conns[0], m.onEvent)
	go m.watch(conns[2])
	return m, nil
}

// socketPair makes a connected pair of stream sockets, one end for QEMU.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	ours, child := os.NewFile(uintptr(fds[0]), "qemu"), os.NewFile(uintptr(fds[1]), "qemu")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		_ = child.Close()
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	return conn.(*net.UnixConn), child, nil
}

// watch drains the console until QEMU closes it by ending, then records how it ended.
func (m *Machine) watch(console *net.UnixConn) {
	m.console.drain(console)
	_ = console.Close()
	<-m.proc.Done()
	<-m.qmp.Done() // so that the reason QEMU gave is in
	status, err := m.proc.Exit()
	m.mu.Lock()
	e := Exit{Status: status, Reason: ExitFailed, Detail: lastLines(m.proc.Stderr(), 5)}
	switch {
	case err != nil:
		e.Detail = err.Error()
	case m.killed:
		e.Reason = ExitKilled
	case m.reason == "guest-shutdown":
		e.Reason = ExitShutdown
	case m.reason == "guest-reset" || m.reason == "guest-panic":
		e.Reason = ExitReset
	}
	m.exit = e
	m.mu.Unlock()
	close(m.done)
}

// PID is the process id of QEMU.
func (m *Machine) PID() int { return m.proc.PID() }

// Channel is the host end of the virtio-serial port, past the barrier handshake. It is one
// connection for the whole life of the machine; Close closes it.
func (m *Machine) Channel() net.Conn { return m.channel }

// Console returns the last output on the serial console, at most 16 KiB. The guest wrote it.
func (m *Machine) Console() []byte { return m.console.bytes() }

// Done is closed when QEMU has ended and is reaped.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Exit says how the machine ended. Only valid after Done.
func (m *Machine) Exit() Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

// Kill ends the machine at once; Done follows.
func (m *Machine) Kill() error {
	m.mu.Lock()
	m.killed = true
	m.mu.Unlock()
	return m.proc.Kill()
}

// Close kills the machine if it runs, waits for its end and releases what it holds here.
func (m *Machine) Close() error {
	err := m.Kill()
	<-m.done
	return errors.Join(err, m.qmp.Close(), m.channel.Close(), m.proc.Close())
}

// Pause stops the vCPUs. The guest does not notice, except by the clock.
func (m *Machine) Pause(ctx context.Context) error {
	return m.run(ctx, "pausing the machine", qmp.Command{Name: "stop"})
}

// Resume lets the vCPUs run.
func (m *Machine) Resume(ctx context.Context) error {
	return m.run(ctx, "resuming the machine", qmp.Command{Name: "cont"})
}

// run executes commands and translates the end of QEMU to ErrExited.
func (m *Machine) run(ctx context.Context, doing string, commands ...qmp.Command) error {
	err := m.qmp.Run(ctx, commands...)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, qmp.ErrClosed):
		return fmt.Errorf("%s: %w: %w", doing, ErrExited, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// waiter waits for one event.
type waiter struct {
	match func(qmp.Event) bool
	event chan qmp.Event // buffered
}

// expect starts to listen for an event. It must be called before what causes the event.
func (m *Machine) expect(match func(qmp.Event) bool) *waiter {
	w := &waiter{match: match, event: make(chan qmp.Event, 1)}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiters = append(m.waiters, w)
	return w
}

// wait waits for the event.
func (m *Machine) wait(ctx context.Context, w *waiter) (qmp.Event, error) {
	defer m.forget(w)
	select {
	case e := <-w.event:
		return e, nil
	case <-m.done:
		return qmp.Event{}, ErrExited
	case <-ctx.Done():
		return qmp.Event{}, ctx.Err()
	}
}

func (m *Machine) forget(w *waiter) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, other := range m.waiters {
		if other == w {
			m.waiters = append(m.waiters[:i], m.waiters[i+1:]...)
			return
		}
	}
}

// onEvent takes events from QMP.
func (m *Machine) onEvent(e qmp.Event) {
	if e.Name == "BLOCK_IO_ERROR" {
		m.onIOError(e)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.Name == "SHUTDOWN" {
		var data struct {
			Reason string `json:"reason"`
		}
		_ = json.Unmarshal(e.Data, &data) // an unreadable reason is none
		m.reason = data.Reason
	}
	for _, w := range m.waiters {
		if w.match(e) {
			select {
			case w.event <- e:
			default:
			}
		}
	}
}
