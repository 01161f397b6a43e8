package hardware

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/hardware/serial"
	"atoll.dev/atoll/internal/vm/monitor"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// Machine is a running virtual machine. Its methods may be called from several goroutines.
type Machine struct {
	accel   vm.Accel
	proc    *qemu.Process
	qmp     *monitor.Monitor
	console *serial.Port
	agent   *guestagent.Client
	onEvent func(Event)
	stall   *block.Stall
	done    chan struct{} // closed when exit is set

	display sync.Mutex // held while a descriptor is handed to the display
	saving  sync.Mutex // held while the memory is saved

	devices  sync.Mutex // held over each change of devices; guards the next fields
	graph    *block.Graph
	machine  machinev1.Machine // as it is now
	shape    *shape
	disks    map[string]*disk
	scsi     [maxControllers]bool // controllers that are there
	next     int                  // number of the next chain
	hostCPUs []int

	mu     sync.Mutex        // guards the fields below
	chains map[string]string // names of disks by the prefix of their nodes
	guest  bool              // the guest powered itself off
	killed bool
	holds  int // who wants the machine to stand still
	exit   vm.Exit
}

// disk is a disk or CD-ROM drive of a machine.
type disk struct {
	machinev1.Disk
	chain *block.Chain // nil: an empty drive
}

// PID is the process id of QEMU.
func (m *Machine) PID() int { return m.proc.PID() }

// Done is closed when QEMU has ended and is reaped.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Exit says how the machine ended. Only valid after Done.
func (m *Machine) Exit() vm.Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

// Accelerator is how guest code runs.
func (m *Machine) Accelerator() vm.Accel { return m.accel }

// Stalled tells whether the machine stands still since a disk's file system on the host is full. It goes on
// by itself once there is room.
func (m *Machine) Stalled() bool { return m.stall.Stalled() }

// Kill ends QEMU at once; Done follows. What QEMU has not written yet of qcow2's structure is lost, as with a
// power cut of the host.
func (m *Machine) Kill() error {
	m.mu.Lock()
	m.killed = true
	m.mu.Unlock()
	return m.proc.Kill()
}

// PowerOff is a power cut for the guest: QEMU writes what it has and ends. When ctx ends first, QEMU is
// killed. It returns when the machine has ended.
func (m *Machine) PowerOff(ctx context.Context) error {
	m.mu.Lock()
	m.killed = true
	m.mu.Unlock()
	// The answer may not come any more.
	err := m.qmp.Execute(ctx, "quit", nil, nil)
	if errors.Is(err, qmp.ErrClosed) {
		err = nil
	}
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
	}
	err = errors.Join(err, m.Kill())
	<-m.done
	if err != nil {
		return fmt.Errorf("powering the machine off: %w", err)
	}
	return nil
}

// Close kills the machine if it runs, waits for its end and releases what it holds here.
func (m *Machine) Close() error {
	err := m.Kill()
	<-m.done
	return errors.Join(err, m.qmp.Close(), m.agent.Close(), m.proc.Close())
}

// hold changes who wants the machine to stand still.
func (m *Machine) hold(by int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.holds = max(m.holds+by, 0)
}

// held tells whether somebody wants the machine to stand still.
func (m *Machine) held() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.holds > 0
}

// Pause stops the vCPUs. The guest does not notice, except by the clock. Pauses count: the machine goes on with as
// many calls of Resume.
func (m *Machine) Pause(ctx context.Context) error {
	m.hold(1)
	if err := m.qmp.Do(ctx, "pausing the machine", qmp.Command{Name: "stop"}); err != nil {
		m.hold(-1)
		return err
	}
	return nil
}

// Resume lets the vCPUs run, unless somebody else has paused them.
func (m *Machine) Resume(ctx context.Context) error {
	m.hold(-1)
	return m.goOn(ctx)
}

// goOn lets the vCPUs run unless somebody wants them to stand still.
func (m *Machine) goOn(ctx context.Context) error {
	if m.held() {
		return nil
	}
	for {
		err := m.qmp.Do(ctx, "resuming the machine", qmp.Command{Name: "cont"})
		if !unfinished(err) {
			return err
		}
		select { // QEMU says that a migration has ended a moment before it is so
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

func unfinished(err error) bool {
	var q *qmp.Error
	return errors.As(err, &q) && strings.Contains(q.Desc, "not finalized yet")
}

// Reset restarts the guest like a reset button.
func (m *Machine) Reset(ctx context.Context) error {
	return m.qmp.Do(ctx, "resetting the machine", qmp.Command{Name: "system_reset"})
}

// PowerDown presses the power button (ACPI). The guest may do anything, also nothing.
func (m *Machine) PowerDown(ctx context.Context) error {
	return m.qmp.Do(ctx, "pressing the power button", qmp.Command{Name: "system_powerdown"})
}

// WakeUp wakes a guest that sleeps (EventSuspend).
func (m *Machine) WakeUp(ctx context.Context) error {
	return m.qmp.Do(ctx, "waking the machine up", qmp.Command{Name: "system_wakeup"})
}

// watch waits for the end of QEMU and records how it ended.
func (m *Machine) watch() {
	<-m.proc.Done()
	<-m.qmp.Done() // so that the reason QEMU gave is in
	status, err := m.proc.Exit()
	m.mu.Lock()
	e := vm.Exit{Status: status, Reason: vm.ExitFailed, Detail: qemu.LastLines(m.proc.Stderr(), 5)}
	switch {
	case err != nil:
		e.Detail = err.Error()
	case m.guest && status.ExitStatus() == 0:
		e.Reason = vm.ExitShutdown
	case m.killed:
		e.Reason = vm.ExitKilled
	}
	m.exit = e
	m.mu.Unlock()
	close(m.done)
}

// onQMP takes events from QMP.
func (m *Machine) onQMP(e qmp.Event) {
	m.stall.OnEvent(e)
	out, ok := m.translate(e)
	if ok && m.onEvent != nil {
		m.onEvent(out)
	}
}

// translate makes an Event of QEMU's.
func (m *Machine) translate(e qmp.Event) (Event, bool) {
	var data struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
		Action string `json:"action"`
		Node   string `json:"node-name"`
		Open   bool   `json:"tray-open"`
		Full   bool   `json:"nospace"`
	}
	_ = json.Unmarshal(e.Data, &data) // what cannot be read is empty
	out := Event{Guest: data.Guest, Reason: qemu.LastLines(data.Reason, 1), Device: nameOf(monitor.DeviceOf(e))}
	switch e.Name {
	case "RESET":
		out.Kind = EventReset
	case "SHUTDOWN":
		out.Kind = EventShutdown
		m.mu.Lock()
		m.guest = data.Guest
		m.mu.Unlock()
	case "GUEST_PANICKED":
		out.Kind, out.Guest = EventPanic, true
	case "GUEST_CRASHLOADED":
		out.Kind, out.Guest, out.Reason = EventPanic, true, ReasonDump
	case "STOP":
		out.Kind = EventStopped
	case "RESUME":
		out.Kind = EventResumed
	case "BLOCK_IO_ERROR":
		out.Kind, out.Device, out.Reason = EventIOError, m.diskOf(data.Node), ioReason(data.Reason, data.Action)
		if data.Full && data.Action == "stop" {
			out.Kind = EventFull
		}
	case "DEVICE_TRAY_MOVED":
		out.Kind = EventTray
	case "SUSPEND":
		out.Kind = EventSuspend
	case "WAKEUP":
		out.Kind = EventWakeup
	case "DEVICE_DELETED":
		out.Kind = EventUnplug
		return out, out.Device != ""
	case "DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR":
		out.Kind = EventRefused
	default:
		return out, false
	}
	return out, true
}

func ioReason(reason, action string) string {
	return qemu.LastLines(reason, 1) + ", " + qemu.LastLines(action, 1)
}

// watchTimeout bounds how long Start waits for QEMU to take commands.
const watchTimeout = 60 * time.Second

// connections are the ends of QEMU's sockets here.
type connections struct{ qmp, console, agent *net.UnixConn }

func (c connections) close() {
	for _, conn := range []*net.UnixConn{c.qmp, c.console, c.agent} {
		if conn != nil {
			_ = conn.Close()
		}
	}
}
