package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/memfd"
	"atoll.dev/atoll/internal/linux/tsc"
	"atoll.dev/atoll/internal/vm/initramfs"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// metaVersion changes with the device layout or the meaning of Meta.
const metaVersion = 1

// memorySlots is how often memory can be added to one machine.
const memorySlots = 8

// Meta describes a template, as JSON, to the process that opens it.
type Meta struct {
	Version      int       `json:"version"`
	QEMU         string    `json:"qemu"`
	QEMUVersion  string    `json:"qemuVersion"`
	Firmware     string    `json:"firmware"`
	Accel        Accel     `json:"accel"`
	MemoryMiB    int       `json:"memoryMiB"`
	ReservedMiB  int       `json:"reservedMiB,omitempty"` // of MemoryMiB, see Config
	MaxMemoryMiB int       `json:"maxMemoryMiB"`
	CPUs         int       `json:"cpus"`
	MaxCPUs      int       `json:"maxCPUs"`
	ScratchBytes int64     `json:"scratchBytes"`
	StateBytes   int64     `json:"stateBytes"`
	Built        time.Time `json:"built"`
	BootMillis   int64     `json:"bootMillis"` // start of QEMU to the barrier
}

// Template is a machine stopped at its barrier, ready to be cloned any number of times, also by
// several goroutines at once.
type Template struct {
	meta       Meta
	ram, state *os.File
}

// BuildTemplate boots a machine to the barrier and saves it. It takes a second or so, up to
// cfg.BootTimeout. Needs CAP_SETUID, CAP_SETGID, CAP_NET_ADMIN and CAP_SYS_ADMIN (for the
// throw-away tap).
//
// Init may mount and change cfg.Scratch before the barrier. Every clone then needs a copy of the file as it
// is when BuildTemplate returns: nothing writes to it after the machine was saved. The image must not be in
// use at the barrier. Both files stay owned by the caller.
func BuildTemplate(ctx context.Context, cfg Config) (*Template, error) {
	t, err := buildTemplate(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("building the micro-VM template: %w", err)
	}
	return t, nil
}

func buildTemplate(ctx context.Context, cfg Config) (_ *Template, err error) {
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	if err := checkScratch(cfg.Scratch, cfg.ScratchBytes); err != nil {
		return nil, err
	}
	if err := checkSlotImage(cfg.Image); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, cfg.BootTimeout)
	defer cancel()
	t := &Template{meta: cfg.meta()}
	defer func() {
		if err != nil {
			_ = t.Close()
		}
	}()
	if t.ram, err = memfd.Create("atoll-ram", int64(cfg.MemoryMiB)<<20); err != nil {
		return nil, err
	}
	if t.state, err = memfd.Create("atoll-state", 0); err != nil {
		return nil, err
	}
	q, err := bootConfig(cfg)
	if err != nil {
		return nil, err
	}
	defer closeFiles(q.Kernel, q.Initrd)
	q.RAM, q.ShareRAM, q.Scratch, q.Paused = t.ram, true, cfg.Scratch, true
	start := time.Now()
	m, err := launch(q, launchConfig{uid: cfg.UID, gid: cfg.GID})
	if err != nil {
		return nil, err
	}
	defer m.Close()
	if err := m.bootWith(ctx, cfg.Image); err != nil {
		return nil, err
	}
	t.meta.BootMillis = time.Since(start).Milliseconds()
	g, err := m.qmp.Greeting(ctx)
	if err != nil {
		return nil, err
	}
	t.meta.QEMUVersion = g.Version()
	if err := m.save(ctx, t.state); err != nil {
		return nil, fmt.Errorf("saving: %w", withOutput(err, m.proc.Stderr(), nil))
	}
	if err := t.seal(ctx); err != nil {
		return nil, err
	}
	t.meta.Built = time.Now()
	return t, nil
}

func (c Config) meta() Meta {
	return Meta{
		Version: metaVersion, QEMU: c.QEMU, Firmware: c.Firmware, Accel: c.Accel,
		MemoryMiB: c.MemoryMiB, ReservedMiB: c.ReservedMiB, MaxMemoryMiB: c.MaxMemoryMiB, CPUs: c.CPUs, MaxCPUs: c.MaxCPUs,
		ScratchBytes: max(c.ScratchBytes, 0),
	}
}

// machine is the part of the QEMU configuration that template and clones share.
func (m Meta) machine() qemu.Config {
	return qemu.Config{
		Binary: m.QEMU, Firmware: m.Firmware, Accel: string(m.Accel),
		MemoryMiB: m.MemoryMiB, MaxMemoryMiB: m.MaxMemoryMiB, MemorySlots: memorySlots,
		CPUs: m.CPUs, MaxCPUs: m.MaxCPUs, ScratchBytes: m.ScratchBytes,
	}
}

// bootConfig is a machine that boots a kernel. Kernel and initramfs are copied to memory files,
// which QEMU's user can read wherever the originals are. The caller closes both.
func bootConfig(cfg Config) (qemu.Config, error) {
	q := cfg.meta().machine()
	cmdline, err := cfg.cmdline()
	if err != nil {
		return q, err
	}
	q.Cmdline = cmdline
	if q.Kernel, err = kernelFile(cfg.Kernel); err != nil {
		return q, fmt.Errorf("%w: %w", ErrKernel, err)
	}
	if q.Initrd, err = memfd.Create("atoll-initramfs", 0); err != nil {
		closeFiles(q.Kernel)
		return q, err
	}
	if err := initramfs.Write(q.Initrd, cfg.Initramfs); err != nil {
		closeFiles(q.Kernel, q.Initrd)
		return q, fmt.Errorf("%w: %w", ErrKernel, err)
	}
	return q, nil
}

// cmdline is the kernel command line.
//
// Under emulation the guest reads the host's time stamp counter, but calibrating it against
// emulated timers fails on a busy host and then hangs the boot or makes the guest fall back to a
// slow clock source. So it is told the rate, and to trust it where the host trusts its own.
func (c Config) cmdline() (string, error) {
	words := []string{
		"console=ttyS0", "loglevel=4", "panic=-1", "reboot=t", "rcupdate.rcu_expedited=1",
		"dummy.numdummies=0", // no dummy0 in every pod
	}
	if c.Accel == TCG {
		source, _ := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
		trusted := strings.TrimSpace(string(source)) == "tsc"
		khz, err := rate(trusted)
		switch {
		case err == nil:
			words = append(words, fmt.Sprintf("tsc_early_khz=%d", khz))
		case !errors.Is(err, tsc.ErrUnsteady):
			return "", err
		}
		if err == nil && trusted {
			words = append(words, "tsc=reliable")
		}
	}
	if c.Cmdline != "" {
		words = append(words, c.Cmdline)
	}
	return strings.Join(words, " "), nil
}

// rate measures the host's time stamp counter, in kHz. One that the host trusts seems unsteady only if a busy host stands
// still meanwhile, and is looked at again.
func rate(trusted bool) (khz uint64, err error) {
	for range 20 {
		khz, err = tsc.KHz(50 * time.Millisecond)
		if !trusted || !errors.Is(err, tsc.ErrUnsteady) {
			break
		}
	}
	return khz, err
}

// kernelFile copies a kernel image to a memory file and checks that it is one.
func kernelFile(name string) (_ *os.File, err error) {
	src, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("opening the kernel: %w", err)
	}
	defer src.Close()
	dst, err := memfd.Create("atoll-kernel", 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = dst.Close()
		}
	}()
	if _, err = io.Copy(dst, src); err != nil {
		return nil, fmt.Errorf("reading the kernel: %w", err)
	}
	var head [0x206]byte
	if _, err = dst.ReadAt(head[:], 0); err != nil {
		return nil, fmt.Errorf("%s is too short for a kernel", name)
	}
	// ELF64 for x86-64, or the boot sector signature of a bzImage.
	elf := bytes.HasPrefix(head[:], []byte("\x7fELF\x02\x01")) && head[18] == 62 && head[19] == 0
	if !elf && !bytes.Equal(head[0x202:], []byte("HdrS")) {
		return nil, fmt.Errorf("%s is neither an x86-64 ELF kernel nor a bzImage", name)
	}
	return dst, nil
}

// checkSlotImage refuses an image from which the booting guest would learn another size of the slot.
func checkSlotImage(f *os.File) error {
	if f == nil {
		return nil
	}
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("reading the size of the image: %w", err)
	}
	if st.Size() != SlotBytes {
		return fmt.Errorf("image for the template has %d bytes instead of %d", st.Size(), int64(SlotBytes))
	}
	return nil
}

// bootWith lets a machine that is paused boot to the barrier, with an image in its first slot.
func (m *Machine) bootWith(ctx context.Context, image *os.File) error {
	if err := m.negotiate(ctx); err != nil {
		return err
	}
	if image != nil {
		if err := m.AttachImage(ctx, SlotSerial(0), image); err != nil {
			return err
		}
	}
	if err := m.Resume(ctx); err != nil {
		if ctx.Err() != nil {
			return errors.Join(err, m.bootError(ctx))
		}
		return err
	}
	if err := m.reach(ctx); err != nil || image == nil {
		return err
	}
	return m.DetachImage(ctx, SlotSerial(0))
}

// save writes the device state to f, leaving guest memory to the shared memory file, and ends QEMU.
func (m *Machine) save(ctx context.Context, f *os.File) error {
	saved := m.qmp.Expect(migrationEnd)
	err := m.qmp.Run(
		ctx,
		setCapabilities,
		qmp.Command{Name: "getfd", Args: map[string]any{"fdname": "s"}, File: f},
		qmp.Command{Name: "migrate", Args: map[string]any{"uri": "fd:s"}},
	)
	if err != nil {
		return err
	}
	e, err := saved.Wait(ctx)
	if err != nil {
		return err
	}
	if !completed(e) {
		return errors.New("qemu could not write its state")
	}
	if err := m.qmp.Execute(ctx, "quit", nil, nil); err != nil && !errors.Is(err, qmp.ErrClosed) {
		return err
	}
	select {
	case <-m.Done():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for qemu to end: %w", ctx.Err())
	}
}

// setCapabilities makes save and load leave out memory that lives in a shared file, and report
// their end as an event.
var setCapabilities = qmp.Command{
	Name: "migrate-set-capabilities",
	Args: map[string]any{"capabilities": []map[string]any{
		{"capability": "x-ignore-shared", "state": true},
		{"capability": "events", "state": true},
	}},
}

func migrationEnd(e qmp.Event) bool {
	return e.Name == "MIGRATION" && slices.Contains([]string{"completed", "failed"}, migrationStatus(e))
}

func completed(e qmp.Event) bool { return migrationStatus(e) == "completed" }

func migrationStatus(e qmp.Event) string {
	var data struct {
		Status string `json:"status"`
	}
	_ = json.Unmarshal(e.Data, &data) // an unreadable status is none
	return data.Status
}

// seal makes both files final. The kernel drops QEMU's mapping a moment after the process is gone.
func (t *Template) seal(ctx context.Context) error {
	st, err := t.state.Stat()
	if err != nil {
		return fmt.Errorf("reading the size of the state: %w", err)
	}
	t.meta.StateBytes = st.Size()
	for _, f := range []*os.File{t.ram, t.state} {
		for {
			err := memfd.Seal(f)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) || ctx.Err() != nil {
				return err
			}
			<-time.After(time.Millisecond)
		}
	}
	return nil
}

// Meta describes the template.
func (t *Template) Meta() Meta { return t.meta }

// Files are the memory and state files, to be inherited by a process that clones. They stay owned
// by the template.
func (t *Template) Files() []*os.File { return []*os.File{t.ram, t.state} }

// Close releases the files. Machines cloned before live on.
func (t *Template) Close() error {
	closeFiles(t.ram, t.state)
	return nil
}

// OpenTemplate makes a template from what Meta and Files returned, in this or another process. It
// takes over the files. An error wraps ErrTemplate.
func OpenTemplate(meta Meta, files []*os.File) (*Template, error) {
	if meta.Version != metaVersion || len(files) != 2 || files[0] == nil || files[1] == nil {
		return nil, fmt.Errorf("opening the template: %w: version %d with %d files", ErrTemplate, meta.Version, len(files))
	}
	sizes := []int64{int64(meta.MemoryMiB) << 20, meta.StateBytes}
	for i, f := range files {
		if err := memfd.Check(f); err != nil {
			return nil, fmt.Errorf("opening the template: %w: %w", ErrTemplate, err)
		}
		st, err := f.Stat()
		if err != nil {
			return nil, fmt.Errorf("opening the template: %w: %w", ErrTemplate, err)
		}
		if st.Size() != sizes[i] {
			return nil, fmt.Errorf("opening the template: %w: %s has %d bytes instead of %d",
				ErrTemplate, f.Name(), st.Size(), sizes[i])
		}
	}
	return &Template{meta: meta, ram: files[0], state: files[1]}, nil
}

func closeFiles(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}
