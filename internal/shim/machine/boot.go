package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/shim/disks"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/shim/machine/freeze"
	"atoll.dev/atoll/internal/shim/machine/seed"
	"atoll.dev/atoll/internal/shim/machine/usage"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/hardware"
	"atoll.dev/atoll/internal/vm/swtpm"
)

// boot starts the machine. What it has made when it fails is released by finish.
func (l *life) boot(ctx context.Context) error {
	m, err := l.complete(ctx)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.spec = m
	l.mu.Unlock()
	if data, err := os.ReadFile("/proc/meminfo"); err == nil {
		if err := usage.EnoughMemory(data, m.Memory.Bytes); err != nil {
			return err
		}
	}
	cfg := hardware.Config{
		Machine: *m, QEMU: l.s.cfg.Host.QEMU, Accel: l.s.cfg.Accel(ctx), UID: l.s.cfg.UID, GID: l.s.cfg.UID,
		Disks: map[string]vm.Volume{}, Taps: map[string]*os.File{}, TempDir: l.s.cfg.Host.DataDir, OnEvent: l.event,
	}
	// QEMU has its own copies of all files when it runs.
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
		for _, v := range cfg.Disks {
			disks.CloseVolume(v)
		}
	}()
	keep := func(f *os.File) *os.File {
		if f != nil {
			files = append(files, f)
		}
		return f
	}
	for _, step := range []struct {
		doing string
		run   func() error
	}{
		{"opening disks", func() error { return l.openDisks(ctx, m, cfg.Disks) }},
		{"joining networks", func() error { return l.openNICs(m, cfg.Taps, keep) }},
		{"making seed disk", func() (err error) { cfg.Seed, err = l.openSeed(m); keep(cfg.Seed); return err }},
		{"preparing firmware", func() error { return l.openFirmware(ctx, m, &cfg, keep) }},
		{"opening saved memory", func() (err error) {
			cfg.Incoming, err = l.openMemory(ctx, m.Restore, os.O_RDONLY)
			keep(cfg.Incoming)
			return err
		}},
	} {
		if err := step.run(); err != nil {
			return fmt.Errorf("%s: %w", step.doing, err)
		}
	}
	l.place(m)
	hw, err := l.s.cfg.Engine.Start(ctx, cfg)
	if err != nil {
		return fmt.Errorf("starting machine: %w", err)
	}
	l.mu.Lock()
	l.hw = hw
	l.files = freeze.New(freeze.Config{
		Agent: hw.Agent(), Gone: hw.Done(), Go: l.s.running.Go, Log: slog.With("sandbox", l.s.ID()),
	})
	l.mu.Unlock()
	if ctx.Err() != nil { // it was stopped meanwhile
		l.powerOff()
	}
	l.join(hw.PID())
	if m.Restore != nil {
		l.closeMemory(m.Restore)
	}
	l.fit(hw)
	return nil
}

// complete waits until all disks are there that the machine is not to be started without, and returns it as it is
// then.
func (l *life) complete(ctx context.Context) (*machinev1.Machine, error) {
	for {
		l.s.mu.Lock()
		m := l.s.machine
		l.s.mu.Unlock()
		if len(m.Awaiting) == 0 {
			l.s.board.Update(func(st *machinev1.State) { st.Applied, st.Reason, st.Message = m.Revision, "", "" })
			own := *m
			own.NICs = slices.Clone(m.NICs) // which are completed
			return &own, nil
		}
		l.s.board.Update(func(st *machinev1.State) {
			st.Applied, st.Reason, st.Message = m.Revision, "AwaitingDisks", board.Cut("waiting for disks: "+strings.Join(m.Awaiting, ", "))
		})
		select {
		case <-l.wake:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for disks %s: %w", strings.Join(m.Awaiting, ", "), ctx.Err())
		}
	}
}

// fit notes what the machine has. What is to be different since the start began is the worker's.
func (l *life) fit(hw Hardware) {
	l.mu.Lock()
	var writable []*disk
	for _, d := range l.disks {
		if d.spec.Volume != "" && !d.spec.ReadOnly && !d.spec.CDROM && !d.spec.NonPersistent {
			writable = append(writable, d)
		}
	}
	l.mu.Unlock()
	for _, d := range writable {
		// It may have been decided to grow the volume while nobody had it open.
		if err := hw.ResizeDisk(l.ctx, d.spec.Name, d.size.Load()); err != nil {
			l.warn("growing disk "+d.spec.Name, err)
		}
	}
	size := hw.Size()
	l.s.board.Update(func(st *machinev1.State) { st.CPUs, st.Memory = size.CPUs, size.Memory })
	l.report()
	poke(l.wake)
}

// warn logs what does not keep the machine from running.
func (l *life) warn(doing string, err error) {
	slog.Warn(doing, "sandbox", l.s.ID(), "error", err)
}

// openDisks opens the volumes of all disks.
func (l *life) openDisks(ctx context.Context, m *machinev1.Machine, out map[string]vm.Volume) error {
	for _, d := range m.Disks {
		if d.Volume == "" {
			l.mu.Lock()
			l.disks[d.Name] = &disk{spec: d}
			l.mu.Unlock()
			continue
		}
		opened, v, err := l.open(ctx, d)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
		l.mu.Lock()
		l.disks[d.Name] = opened
		l.mu.Unlock()
		out[d.Name] = v
	}
	return nil
}

// openSeed makes the seed disk, nil without one.
func (l *life) openSeed(m *machinev1.Machine) (*os.File, error) {
	if m.Seed == nil {
		return nil, nil
	}
	l.s.mu.Lock()
	dir := l.s.seed
	l.s.mu.Unlock()
	if dir == "" {
		return nil, fmt.Errorf("the pod has no volume at %s", machinev1.SeedDir)
	}
	files, err := seed.Read(dir)
	if err != nil {
		return nil, err
	}
	return seed.Image(m, files, l.podNetwork())
}

// dir is where the machine keeps what is its own on this host, made when it is missing.
func (l *life) dir(m *machinev1.Machine) (string, error) {
	dir := filepath.Join(l.s.cfg.Host.DataDir, m.UID)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", fmt.Errorf("making directory of the machine: %w", err)
	}
	return dir, nil
}

// openFirmware finds EFI, opens its variables and starts the TPM, as far as the machine has them.
func (l *life) openFirmware(ctx context.Context, m *machinev1.Machine, cfg *hardware.Config, keep func(*os.File) *os.File) error {
	if m.Firmware.Type != machinev1.EFI && !m.Firmware.TPM {
		return nil
	}
	dir, err := l.dir(m)
	if err != nil {
		return err
	}
	if m.Firmware.Type == machinev1.EFI {
		from := l.s.cfg.Host.Firmware
		if from == "" {
			from = hardware.DefaultFirmwareDir
		}
		if cfg.Firmware, err = hardware.FindFirmware(from, m.Firmware.SecureBoot); err != nil {
			return err
		}
		if cfg.NVRAM, err = openNVRAM(dir, cfg.Firmware, m.Firmware.SecureBoot); err != nil {
			return err
		}
		keep(cfg.NVRAM)
	}
	if !m.Firmware.TPM {
		return nil
	}
	state := filepath.Join(dir, "tpm")
	if err := giveTo(state, l.s.cfg.UID); err != nil {
		return fmt.Errorf("preparing TPM: %w", err)
	}
	tpm, err := l.s.cfg.Engine.StartTPM(ctx, swtpm.Config{UID: l.s.cfg.UID, GID: l.s.cfg.UID, Dir: state})
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.tpm = tpm
	l.mu.Unlock()
	cfg.TPM = keep(tpm.Socket())
	return nil
}

// openNVRAM opens the variables of the firmware, which a machine gets when it is started for the first time.
func openNVRAM(dir string, fw hardware.Firmware, secure bool) (*os.File, error) {
	name := filepath.Join(dir, "nvram")
	if secure {
		name += "-secure"
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	if f, err = os.OpenFile(name+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
		return nil, fmt.Errorf("making the variables of the firmware: %w", err)
	}
	err = hardware.CreateNVRAM(f, fw)
	if err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// giveTo gives a directory, if it is there, and what is in it to a user: a machine has another one each time.
func giveTo(dir string, uid uint32) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	errs := []error{os.Lchown(dir, int(uid), int(uid))}
	for _, e := range entries {
		errs = append(errs, os.Lchown(filepath.Join(dir, e.Name()), int(uid), int(uid)))
	}
	return errors.Join(errs...)
}

// openMemory opens the volume in which memory is saved, as one file; nil without one.
func (l *life) openMemory(ctx context.Context, at *machinev1.MemoryState, flags int) (*os.File, error) {
	if at == nil {
		return nil, nil
	}
	if err := l.s.records.Put(attach.Record{Volume: at.Volume, Pod: l.s.uid(), Socket: l.s.cfg.Socket}); err != nil {
		return nil, err
	}
	opened, err := l.s.cfg.Agent.Open(ctx, l.request(machinev1.Disk{Volume: at.Volume}, true))
	if err != nil {
		return nil, errors.Join(err, l.s.records.Remove(at.Volume, l.s.uid()))
	}
	f, err := os.OpenFile(opened.File, flags, 0)
	if err != nil {
		l.closeMemory(at)
		return nil, fmt.Errorf("opening volume for memory: %w", err)
	}
	return f, nil
}

// closeMemory says that the volume is not needed any more.
func (l *life) closeMemory(at *machinev1.MemoryState) {
	if err := l.s.records.Remove(at.Volume, l.s.uid()); err != nil {
		l.warn("forgetting the volume for memory", err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.ctx), releaseTimeout)
	defer cancel()
	if err := l.s.cfg.Agent.Close(ctx, l.request(machinev1.Disk{Volume: at.Volume}, true)); err != nil {
		l.warn("telling the agent that the volume for memory is closed", err) // it notices by itself
	}
}

// request is what the agent is asked about a volume.
func (l *life) request(d machinev1.Disk, memory bool) attach.OpenRequest {
	meta := l.s.pod.GetMetadata() // not changed after the sandbox was created
	return attach.OpenRequest{
		Volume: d.Volume, Pod: meta.GetUid(),
		Machine: &attach.MachineUse{
			Namespace: meta.GetNamespace(), Name: meta.GetName(), ReadOnly: d.ReadOnly || d.CDROM, Shared: d.Shared, Memory: memory,
		},
	}
}

// place moves this process into the pod's cgroup, where QEMU begins as its child.
func (l *life) place(m *machinev1.Machine) {
	parent := l.s.pod.GetLinux().GetCgroupParent()
	if parent == "" {
		return
	}
	id := l.s.ID()
	if err := l.s.cfg.Cgroups.Join(parent, "vm-"+id[:min(len(id), 12)], os.Getpid()); err != nil {
		l.warn("joining the pod's cgroup", err)
		return
	}
	if err := l.s.cfg.Cgroups.Sustain(m.Memory.Bytes); err != nil {
		l.warn("raising the limits of the pod", err)
	}
}

// join tells the kernel whom to kill first when memory runs out.
func (l *life) join(pid int) {
	l.s.mu.Lock()
	score := l.s.score
	l.s.mu.Unlock()
	l.s.setScore(pid, score)
}
