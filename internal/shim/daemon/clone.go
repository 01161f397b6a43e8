package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"atoll.dev/atoll/internal/guest/rehearsal"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/shim/sandbox"
	"atoll.dev/atoll/internal/shim/session"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/scratch"
)

const (
	// warmRounds is how often a start is rehearsed in a clone, so that the emulator has translated the code.
	// Another round would gain little, once the guest has settled.
	warmRounds  = 1
	warmTimeout = 5 * time.Minute // it gives way to pods that start
	// settleTime is how long the guest's kernel gets to free what it puts off when a container goes, which it
	// would else do during the start of the pod.
	settleTime = 300 * time.Millisecond
	// lastNice is the priority of what gives way.
	lastNice = 19
)

// files are what the pool hands over.
type files struct {
	ram, state, scratch, warm *os.File
}

func inherited() files {
	return files{
		ram: os.NewFile(wire.FDRAM, "template-ram"), state: os.NewFile(wire.FDState, "template-state"),
		scratch: os.NewFile(wire.FDScratch, "scratch-master"), warm: os.NewFile(wire.FDWarm, "warm-image"),
	}
}

// clone is the micro-VM, from nothing to waiting.
type clone struct {
	init   wire.Init
	files  files
	urgent chan struct{} // closed when a pod waits: no more warming up
	done   chan struct{} // closed when the fields below are set
	vm     *sandbox.VM
	err    error

	mu      sync.Mutex // guards the fields below, and the closing of urgent
	machine *vm.Machine
	setNice func(nice int) error // of QEMU; nil as long as there is none
	polite  bool                 // the pool wants QEMU to yield
	yields  bool                 // QEMU does, or may: it runs when nobody else wants to
}

func newClone(i wire.Init, f files) *clone {
	return &clone{init: i, files: f, urgent: make(chan struct{}), done: make(chan struct{})}
}

// hurry says that a pod waits.
func (c *clone) hurry() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.hurried() {
		close(c.urgent)
	}
	c.yield(false)
}

// aside is an order of the pool: whether to leave the processors to pods that start.
func (c *clone) aside(yes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.polite = yes
	c.yield(yes && !c.hurried())
}

// yield makes QEMU the last to run, or like any other again. The lock is held.
func (c *clone) yield(yes bool) {
	if c.setNice == nil || c.yields == yes {
		return
	}
	nice := 0
	if yes {
		nice = lastNice
	}
	err := c.setNice(nice)
	if err != nil {
		slog.Warn("a micro-VM that is being prepared", "error", err)
	}
	c.yields = yes || err != nil // what failed may have been done in part
}

// begin notes the machine.
func (c *clone) begin(m *vm.Machine) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.machine = m
	c.setNice = func(nice int) error { return process.SetNice(m.PID(), nice) }
	c.yield(c.polite && !c.hurried())
}

// rest ends that for a machine that is prepared.
func (c *clone) rest() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.polite = false
	c.yield(false)
}

func (c *clone) hurried() bool {
	select {
	case <-c.urgent:
		return true
	default:
		return false
	}
}

// wait returns the micro-VM once it is prepared.
func (c *clone) wait(ctx context.Context) (*sandbox.VM, error) {
	select {
	case <-c.done:
		return c.vm, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// pid is QEMU's, 0 without one.
func (c *clone) pid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.machine == nil {
		return 0
	}
	return c.machine.PID()
}

// kill ends QEMU.
func (c *clone) kill() {
	c.mu.Lock()
	m := c.machine
	c.mu.Unlock()
	if m == nil {
		return
	}
	if err := m.Close(); err != nil && !errors.Is(err, net.ErrClosed) { // the session closes its end, too
		slog.Warn("ending micro-VM", "error", err)
	}
}

// prepare makes the micro-VM.
func (c *clone) prepare(ctx context.Context) error {
	c.vm, c.err = c.make(ctx)
	close(c.done)
	return c.err
}

func (c *clone) make(ctx context.Context) (*sandbox.VM, error) {
	t, err := vm.OpenTemplate(c.init.Template, []*os.File{c.files.ram, c.files.state})
	if err != nil {
		return nil, err
	}
	defer t.Close()
	tap, err := network.NewTap(c.init.PoolNetns, c.init.Tap)
	if err != nil {
		return nil, err
	}
	defer tap.Close() // QEMU has it
	disk, err := c.scratch()
	if err != nil {
		return nil, err
	}
	defer disk.Close() // QEMU has it
	m, err := t.Clone(ctx, vm.CloneConfig{UID: c.init.UID, GID: c.init.UID, Tap: tap.File, Scratch: disk})
	if err != nil {
		return nil, err
	}
	c.begin(m)
	s, err := session.Open(m.Channel())
	if err != nil {
		return nil, err
	}
	meta := t.Meta()
	tap.File = nil
	v := &sandbox.VM{
		Machine: m, Volumes: m, Session: s, Tap: tap, Memory: int64(meta.MemoryMiB-meta.ReservedMiB) << 20,
		Kernel: int64(meta.ReservedMiB) << 20, CPUs: meta.CPUs, Scratch: vm.ScratchSerial, Accel: meta.Accel,
	}
	if c.hurried() {
		return v, c.files.warm.Close()
	}
	if err := c.warm(ctx, m, s); err != nil {
		return nil, fmt.Errorf("warming up: %w", err)
	}
	if !c.hurried() {
		v.Warm = true
		if err := m.Pause(ctx); err != nil {
			return nil, err
		}
		c.rest()
	}
	return v, nil
}

// scratch makes the disk of this micro-VM.
func (c *clone) scratch() (*os.File, error) {
	master, err := scratch.Open(c.init.ScratchDir, c.files.scratch)
	if err != nil {
		return nil, err
	}
	defer master.Close()
	return master.Copy()
}

// warm runs what a pod start will run, round by round as long as no pod waits for it.
func (c *clone) warm(ctx context.Context, m *vm.Machine, s *session.Session) error {
	defer c.files.warm.Close()
	ctx, cancel := context.WithTimeout(ctx, warmTimeout)
	defer cancel()
	serial := vm.SlotSerial(0)
	for range warmRounds {
		if c.hurried() {
			return nil
		}
		if err := m.AttachImage(ctx, serial, c.files.warm); err != nil {
			return err
		}
		err := rehearsal.Run(ctx, rehearsal.Config{
			Guest: s, Image: serial, Scratch: vm.ScratchSerial, Network: true, Stop: c.hurried,
		})
		if err != nil {
			return err
		}
		if err := m.DetachImage(ctx, serial); err != nil {
			return err
		}
	}
	select {
	case <-c.urgent:
	case <-time.After(settleTime):
	case <-ctx.Done():
	}
	return nil
}

// isTemplate reports whether an error is the template's fault.
func isTemplate(err error) bool { return errors.Is(err, vm.ErrTemplate) }

// hostNetwork is the real network.
type hostNetwork struct{}

func (hostNetwork) JoinTap(netns string, tap network.Tap) (network.Guest, error) {
	return network.JoinTap(netns, tap)
}

func (hostNetwork) ServePortForward(ctx context.Context, netns string, dial func(context.Context, uint16) (net.Conn, error)) error {
	return network.ServePortForward(ctx, netns, dial)
}
