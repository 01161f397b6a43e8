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

	"atoll.dev/atoll/internal/linux/tap"
	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/monitor"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// consoleBytes is how much of the serial console is kept.
const consoleBytes = 16 << 10

// Machine is a running micro-VM. Its methods may be called from several goroutines.
type Machine struct {
	meta    Meta
	proc    *qemu.Process
	qmp     *monitor.Monitor
	channel *net.UnixConn
	console *qemu.Tail
	done    chan struct{} // closed when exit is set
	stall   *block.Stall

	devices sync.Mutex // held over each change of devices; guards the next fields
	graph   *block.Graph
	slots   [ImageSlots]bool
	disks   map[string]int // LUN by serial, of volumes too
	volumes map[string]*volume
	nextLUN int
	dimms   int
	added   int64 // bytes

	mu     sync.Mutex // guards the fields below
	reason string     // of QEMU's SHUTDOWN event
	killed bool
	exit   Exit
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
		console: qemu.NewTail(consoleBytes), done: make(chan struct{}),
		disks: make(map[string]int), volumes: make(map[string]*volume),
	}
	m.stall = block.NewStall(m.done, m.Resume, func() bool { return false })
	m.graph = block.New(m.run, block.Patience)
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
		if conns[i], child, err = qemu.SocketPair(); err != nil {
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
	groups, err := qemu.Groups(q.Accel)
	if err != nil {
		return nil, err
	}
	m.proc, err = qemu.Start(q, qemu.Credential{UID: l.uid, GID: l.gid, Groups: groups})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrQEMU, err)
	}
	m.channel = conns[1]
	m.qmp = monitor.New(conns[0], m.done, m.onEvent)
	go m.watch(conns[2])
	return m, nil
}

// watch drains the console until QEMU closes it by ending, then records how it ended.
func (m *Machine) watch(console *net.UnixConn) {
	m.console.Drain(console)
	_ = console.Close()
	<-m.proc.Done()
	<-m.qmp.Done() // so that the reason QEMU gave is in
	status, err := m.proc.Exit()
	m.mu.Lock()
	e := Exit{Status: status, Reason: ExitFailed, Detail: qemu.LastLines(m.proc.Stderr(), 5)}
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
func (m *Machine) Console() []byte { return m.console.Bytes() }

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
	return m.qmp.Do(ctx, doing, commands...)
}

// onEvent takes events from QMP.
func (m *Machine) onEvent(e qmp.Event) {
	m.stall.OnEvent(e)
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.Name == "SHUTDOWN" {
		var data struct {
			Reason string `json:"reason"`
		}
		_ = json.Unmarshal(e.Data, &data) // an unreadable reason is none
		m.reason = data.Reason
	}
}
