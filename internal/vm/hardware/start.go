package hardware

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
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

// Start starts a machine and returns when QEMU runs it: its guest is in the firmware, or goes on from the
// saved memory.
func Start(ctx context.Context, cfg Config) (*Machine, error) {
	m, err := start(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("starting virtual machine %q: %w", cfg.Machine.Name, err)
	}
	return m, nil
}

func start(ctx context.Context, cfg Config) (*Machine, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	shape, err := cfg.findShape(ctx)
	if err != nil {
		return nil, err
	}
	if err := enoughHugePages(cfg.Machine.Memory, shape.memory()); err != nil {
		return nil, err
	}
	m, c, err := launch(&cfg, shape)
	if c != nil {
		defer c.close()
	}
	if err != nil {
		return nil, err
	}
	if err := m.begin(ctx, &cfg, c); err != nil {
		err = m.blame(err)
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// findShape is the shape of the saved memory, or that of a machine that boots.
func (c *Config) findShape(ctx context.Context) (*shape, error) {
	if c.Incoming == nil {
		return c.newShape(c.chooseModel(ctx))
	}
	h, err := readHeader(c.Incoming)
	if err != nil {
		return nil, err
	}
	if err := h.fits(c); err != nil {
		return nil, err
	}
	return h.Shape, nil
}

// launch starts QEMU and everything that watches it. The command is to be closed, also after an error.
func launch(cfg *Config, s *shape) (_ *Machine, c *command, err error) {
	m := &Machine{
		accel: cfg.Accel, onEvent: cfg.OnEvent, machine: cfg.Machine, shape: s, done: make(chan struct{}),
		disks: map[string]*disk{}, chains: map[string]string{}, hostCPUs: cfg.HostCPUs,
	}
	m.graph = block.New(m.do, block.Patience)
	m.stall = block.NewStall(m.done, m.goOn, m.held)
	if cfg.OnEvent != nil {
		m.stall.OnGoingOn(func() { cfg.OnEvent(Event{Kind: EventGoneOn}) })
	}
	var ends endpoints
	var ours connections
	defer func() {
		if err != nil {
			ours.close()
		}
	}()
	if ours.qmp, ends.qmp, err = qemu.SocketPair(); err != nil {
		return nil, nil, err
	}
	defer ends.qmp.Close()
	if ours.console, ends.console, err = qemu.SocketPair(); err != nil {
		return nil, nil, err
	}
	defer ends.console.Close()
	if ours.agent, ends.agent, err = qemu.SocketPair(); err != nil {
		return nil, nil, err
	}
	defer ends.agent.Close()
	groups, err := qemu.Groups(string(cfg.Accel))
	if err != nil {
		return nil, nil, err
	}
	if c, err = newCommand(cfg, s, m.graph, ends); err != nil {
		return nil, c, err
	}
	m.proc, err = qemu.Spawn(qemu.Spec{
		Args: c.args, Files: c.files, SmallPages: cfg.Accel == vm.TCG,
		Credential: qemu.Credential{UID: cfg.UID, GID: cfg.GID, Groups: groups},
	})
	if err != nil {
		return nil, c, fmt.Errorf("%w: %w", vm.ErrQEMU, err)
	}
	m.next, m.scsi = c.next, c.scsi
	for _, d := range cfg.Machine.Disks {
		m.disks[d.Name] = &disk{Disk: d, chain: c.chains[d.Name]}
		if chain := c.chains[d.Name]; chain != nil {
			m.chains[chain.Prefix()] = d.Name
		}
	}
	m.qmp = monitor.New(ours.qmp, m.done, m.onQMP)
	m.console = serial.New(ours.console)
	m.agent = guestagent.New(ours.agent)
	go m.watch()
	return m, c, nil
}

// do executes commands.
func (m *Machine) do(ctx context.Context, doing string, commands ...qmp.Command) error {
	return m.qmp.Do(ctx, doing, commands...)
}

// begin makes a QEMU that has just been started run the machine.
func (m *Machine) begin(ctx context.Context, cfg *Config, c *command) error {
	ready, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	var machineType string
	err := m.do(
		ready, "talking to qemu",
		qmp.Command{Name: "qmp_capabilities"},
		setMigration,
		qmp.Command{Name: "qom-get", Args: map[string]any{"path": "/machine", "property": "type"}, Result: &machineType},
	)
	if err != nil {
		return err
	}
	greeting, err := m.qmp.Greeting(ready)
	if err != nil {
		return err
	}
	m.devices.Lock()
	m.shape.QEMU, m.shape.Type = greeting.Version(), strings.TrimSuffix(machineType, "-machine")
	m.devices.Unlock()
	for _, d := range m.disks {
		if d.chain == nil {
			continue
		}
		if err := m.graph.Adopt(ready, d.chain); err != nil {
			return fmt.Errorf("disk %q: %w", d.Name, err)
		}
		if l := cfg.Disks[d.Name].Limits; l != (vm.Limits{}) {
			if err := m.do(ready, "limiting disk", block.Throttle(diskID(d.Name), l)); err != nil {
				return err
			}
		}
	}
	if cfg.Incoming != nil {
		if err := m.load(ctx, c.incoming); err != nil {
			return err
		}
	}
	if err := m.pin(ready); err != nil {
		return err
	}
	if cfg.Paused {
		m.hold(1)
		return nil
	}
	if err := m.goOn(ready); err != nil {
		return err
	}
	if fw := cfg.Machine.Firmware; fw.EnterSetup && fw.Type == machinev1.EFI && cfg.Incoming == nil {
		go m.openSetup()
	}
	return nil
}

// load takes the memory from what QEMU has inherited as that descriptor.
func (m *Machine) load(ctx context.Context, fd int) error {
	const doing = "loading the saved memory"
	loaded := m.qmp.Expect(migrationEnd)
	err := m.do(ctx, doing, qmp.Command{Name: "migrate-incoming", Args: map[string]any{"uri": fmt.Sprintf("fd:%d", fd)}})
	if err != nil {
		loaded.Forget()
		return err
	}
	e, err := loaded.Wait(ctx)
	switch {
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("%s: %w", doing, err)
	case err != nil || migrationStatus(e) != "completed":
		return fmt.Errorf("%s: %w: qemu cannot go on from it", doing, ErrMemoryImage)
	}
	return nil
}

// blame says why a machine did not start, in words of QEMU's.
func (m *Machine) blame(err error) error {
	ended := errors.Is(err, vm.ErrExited)
	if ended {
		<-m.done
	}
	text := qemu.LastLines(m.proc.Stderr(), 5)
	if ended {
		text = m.Exit().Detail
	}
	switch {
	case text == "":
	case block.IsLockMessage(text):
		return fmt.Errorf("%w: qemu: %s", vm.ErrLocked, text)
	case strings.Contains(text, "support requested feature"):
		return fmt.Errorf("%w: cpu.model: the processor of this host is not enough for the machine's: qemu: %s", ErrConfig, text)
	case strings.Contains(text, "Cannot allocate memory"):
		return fmt.Errorf("%w: the host does not have that much memory: qemu: %s", vm.ErrLimit, text)
	case strings.Contains(text, "Image is corrupt"), strings.Contains(text, "not in qcow2 format"), strings.Contains(text, "Invalid password"):
		return fmt.Errorf("%w: qemu: %s", vm.ErrImage, text)
	case errors.Is(err, ErrMemoryImage):
		return fmt.Errorf("%w; qemu: %s", err, text)
	case ended:
		return fmt.Errorf("%w: %s", vm.ErrQEMU, text)
	default:
		return fmt.Errorf("%w; qemu: %s", err, text)
	}
	return err
}

// The key that opens the setup of EFI is pressed again and again, for as long as a busy host may take to get there.
// It does nothing in the setup. A BIOS has no setup; it offers its boot menu for setupDelay.
const (
	setupKey     = "f2"
	setupPresses = 480
	setupPause   = 250 * time.Millisecond
	setupDelay   = 5 * time.Second
)

// openSetup opens the firmware's setup.
func (m *Machine) openSetup() {
	ctx, cancel := context.WithTimeout(context.Background(), setupPresses*setupPause)
	defer cancel()
	tick := time.NewTicker(setupPause)
	defer tick.Stop()
	for {
		select {
		case <-m.done:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		key := []any{map[string]any{"type": "qcode", "data": setupKey}}
		if m.qmp.Execute(ctx, "send-key", map[string]any{"keys": key}, nil) != nil {
			return
		}
	}
}

func migrationEnd(e qmp.Event) bool {
	s := migrationStatus(e)
	return s == "completed" || s == "failed" || s == "cancelled"
}

// migrationStatus is the status that an event is about, "" for other events.
func migrationStatus(e qmp.Event) string {
	if e.Name != "MIGRATION" {
		return ""
	}
	var data struct {
		Status string `json:"status"`
	}
	_ = json.Unmarshal(e.Data, &data) // an unreadable status is none
	return data.Status
}

// pageDirs are where the kernel counts huge pages.
const pageDirs = "/sys/kernel/mm/hugepages/hugepages-%dkB/%s"

// hugePages reads one of the kernel's numbers of huge pages.
func hugePages(size int64, name string) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf(pageDirs, size>>10, name))
	if err != nil {
		return 0, fmt.Errorf("reading the number of huge pages: %w", err)
	}
	var n int64
	if _, err := fmt.Sscan(string(data), &n); err != nil {
		return 0, fmt.Errorf("reading the number of huge pages: %w", err)
	}
	return n, nil
}
