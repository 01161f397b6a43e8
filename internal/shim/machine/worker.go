package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/disks"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/hardware"
)

const (
	// firstRetry is the pause before a change that failed is tried again; it doubles up to lastRetry.
	firstRetry = 2 * time.Second
	lastRetry  = time.Minute
	// changeTimeout bounds one change of the machine.
	changeTimeout = 2 * time.Minute
)

// Apply takes a changed machine. The changes have begun when it returns.
func (s *Service) Apply(_ context.Context, m machinev1.Machine) (machinev1.State, error) {
	if err := m.Check(); err != nil {
		return machinev1.State{}, err
	}
	s.mu.Lock()
	switch {
	case s.machine == nil || s.machine.UID != m.UID:
		s.mu.Unlock()
		return machinev1.State{}, fmt.Errorf("machine %s does not run here", m.UID)
	case m.Revision < s.machine.Revision: // an agent that has slept
		s.mu.Unlock()
		return s.board.Get(), nil
	}
	s.machine = &m
	l := s.life
	s.mu.Unlock()
	if l != nil {
		poke(l.wake)
	}
	return s.board.Get(), nil
}

// worker makes the machine what it is to be, whenever that or the machine changes, and again while anything fails.
func (l *life) worker() {
	retry := firstRetry
	for {
		l.s.mu.Lock()
		m := l.s.machine
		l.s.mu.Unlock()
		failed := l.converge(m)
		var again <-chan time.Time
		if failed {
			again = time.After(retry)
			retry = min(2*retry, lastRetry)
		} else {
			retry = firstRetry
		}
		select {
		case <-l.wake:
		case <-again:
		case <-l.ctx.Done():
			return
		}
	}
}

// converge does what there is to do for a machine, and reports whether something of it failed.
func (l *life) converge(m *machinev1.Machine) (failed bool) {
	ctx, cancel := context.WithTimeout(l.ctx, changeTimeout)
	defer cancel()
	l.health.KeepChanged()
	var pending []string
	note := func(err error, what string) {
		switch {
		case err == nil:
		case errors.Is(err, hardware.ErrHotPlug), errors.Is(err, vm.ErrLimit):
			pending = append(pending, board.Cut(what+": "+err.Error()))
		default:
			failed = true
			slog.Warn("changing a virtual machine", "sandbox", l.s.ID(), "change", what, "error", err)
		}
	}
	pending = append(pending, l.fixed(m)...)
	pending = append(pending, l.resize(ctx, m, note)...)
	l.changeDisks(ctx, m, note)
	l.changeNICs(ctx, m, note)
	l.tellClosed(ctx)
	size := l.hw.Size()
	l.s.board.Update(func(st *machinev1.State) {
		st.Applied, st.Pending = m.Revision, pending
		st.CPUs, st.Memory = size.CPUs, size.Memory
	})
	l.report()
	l.operate(m)
	return failed
}

// fixed are the changes of what a running machine cannot change.
func (l *life) fixed(m *machinev1.Machine) []string {
	l.mu.Lock()
	was := l.spec
	l.mu.Unlock()
	var out []string
	for _, c := range []struct {
		differs bool
		what    string
	}{
		{m.Firmware.Type != was.Firmware.Type, "the firmware"},
		{m.Firmware.SecureBoot != was.Firmware.SecureBoot, "Secure Boot"},
		{m.Firmware.TPM != was.Firmware.TPM, "the TPM"},
		{m.BIOSUUID != was.BIOSUUID, "the BIOS UUID"},
		{m.CPU.Model != was.CPU.Model, "the processor model"},
		{m.CPU.CoresPerSocket != was.CPU.CoresPerSocket, "the cores of a socket"},
		{m.CPU.Nested != was.CPU.Nested, "nested virtualisation"},
		{m.CPU.Pinned != was.CPU.Pinned, "the pinning of processors"},
		{m.Memory.HugePageBytes != was.Memory.HugePageBytes, "the size of memory pages"},
	} {
		if c.differs {
			out = append(out, c.what+" changes when the machine is powered off and on")
		}
	}
	return out
}

// resize adds processors and memory.
func (l *life) resize(ctx context.Context, m *machinev1.Machine, note func(error, string)) (pending []string) {
	size := l.hw.Size()
	if n := m.CPU.Count; n > size.CPUs {
		_, err := l.hw.SetCPUs(ctx, n)
		note(err, fmt.Sprintf("%d processors", n))
	} else if n < size.CPUs {
		pending = append(pending, fmt.Sprintf("the number of processors goes down from %d to %d when the machine is powered off and on", size.CPUs, n))
	}
	if want := m.Memory.Bytes; want > size.Memory {
		_, err := l.hw.AddMemory(ctx, want-size.Memory)
		note(err, fmt.Sprintf("%d MiB of memory", want>>20))
		if err == nil {
			if err := l.s.cfg.Cgroups.Sustain(want); err != nil {
				slog.Warn("raising the limits of the pod", "sandbox", l.s.ID(), "error", err)
			}
		}
	} else if want < size.Memory {
		// A machine has memory in blocks, so it may have a little more than it was to.
		if now := size.Memory - vm.MemoryGranule; want <= now {
			pending = append(pending, fmt.Sprintf("memory goes down from %d to %d MiB when the machine is powered off and on", size.Memory>>20, want>>20))
		}
	}
	return pending
}

// changeDisks adds, removes and changes disks. Those that go come first: they may be in the place of others.
func (l *life) changeDisks(ctx context.Context, m *machinev1.Machine, note func(error, string)) {
	wanted := map[string]machinev1.Disk{}
	for _, d := range m.Disks {
		wanted[d.Name] = d
	}
	l.mu.Lock()
	have := maps.Clone(l.disks)
	l.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(have)) {
		d := have[name]
		want, stays := wanted[name]
		switch {
		case stays && want == d.spec:
		case stays && d.spec.CDROM && sameDrive(want, d.spec):
			note(l.changeDisc(ctx, d, want), "the disc in drive "+name)
		default:
			note(l.removeDisk(ctx, d), "removing disk "+name)
		}
	}
	for _, want := range m.Disks {
		l.mu.Lock()
		d := l.disks[want.Name]
		l.mu.Unlock()
		if d == nil || d.spec.Volume == "" && !d.spec.CDROM {
			note(l.addDisk(ctx, want), "adding disk "+want.Name)
		}
	}
}

// sameDrive tells whether two disks are one drive with different discs.
func sameDrive(a, b machinev1.Disk) bool {
	a.Volume, b.Volume = "", ""
	return a == b
}

// addDisk adds a disk while the machine runs.
func (l *life) addDisk(ctx context.Context, want machinev1.Disk) error {
	err := l.tryAddDisk(ctx, want)
	if err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.disks[want.Name] == nil {
			l.disks[want.Name] = &disk{spec: machinev1.Disk{Name: want.Name, Bus: want.Bus}, failed: board.Cut(err.Error())}
		} else {
			l.disks[want.Name].failed = board.Cut(err.Error())
		}
	}
	return err
}

func (l *life) tryAddDisk(ctx context.Context, want machinev1.Disk) error {
	if want.Bus == machinev1.SATA || want.Bus == machinev1.IDE {
		return fmt.Errorf("%s disks %w", want.Bus, hardware.ErrHotPlug)
	}
	if want.Volume == "" {
		return l.plug(ctx, &disk{spec: want}, vm.Volume{})
	}
	d, v, err := l.open(ctx, want)
	if err != nil {
		return err
	}
	defer disks.CloseVolume(v)
	return l.plug(ctx, d, v)
}

// plug gives an open volume to the machine.
func (l *life) plug(ctx context.Context, d *disk, v vm.Volume) error {
	err := l.hw.AddDisk(ctx, d.spec, v)
	if err == nil && d.spec.Volume != "" && !v.ReadOnly && !d.spec.NonPersistent {
		err = l.hw.ResizeDisk(ctx, d.spec.Name, d.size.Load())
	}
	if err == nil {
		l.put(d)
		return nil
	}
	if gone := l.hw.RemoveDisk(ctx, d.spec.Name); gone != nil && !errors.Is(gone, vm.ErrNoVolume) && !errors.Is(gone, vm.ErrExited) {
		d.failed = board.Cut(err.Error())
		l.put(d) // QEMU may have it open still: it is removed before the next attempt
		return errors.Join(err, gone)
	}
	l.forget(ctx, d)
	return err
}

func (l *life) put(d *disk) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.disks[d.spec.Name] = d
}

// removeDisk takes a disk away. One that the guest does not let go of stays, and is tried again.
func (l *life) removeDisk(ctx context.Context, d *disk) error {
	if d.spec.Volume != "" || d.spec.CDROM {
		d.mu.Lock() // for a snapshot that is under way
		err := l.hw.RemoveDisk(ctx, d.spec.Name)
		d.mu.Unlock()
		if err != nil && !errors.Is(err, vm.ErrNoVolume) {
			l.mu.Lock()
			d.failed = board.Cut(err.Error())
			l.mu.Unlock()
			return err
		}
	}
	l.mu.Lock()
	delete(l.disks, d.spec.Name)
	l.mu.Unlock()
	l.forget(ctx, d)
	return nil
}

// changeDisc puts another disc into a drive, or none.
func (l *life) changeDisc(ctx context.Context, d *disk, want machinev1.Disk) error {
	next, err := l.tryChangeDisc(ctx, want)
	if err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		d.failed = board.Cut(err.Error())
		return err
	}
	l.put(next)
	l.forget(ctx, d)
	return nil
}

func (l *life) tryChangeDisc(ctx context.Context, want machinev1.Disk) (*disk, error) {
	if want.Volume == "" {
		return &disk{spec: want}, l.hw.EjectDisc(ctx, want.Name)
	}
	next, v, err := l.open(ctx, want)
	if err != nil {
		return nil, err
	}
	defer disks.CloseVolume(v)
	if err := l.hw.ChangeDisc(ctx, want.Name, v); err != nil {
		l.forget(ctx, next)
		return nil, err
	}
	return next, nil
}

// changeNICs adds and removes network interfaces. The pod's own can be neither.
func (l *life) changeNICs(ctx context.Context, m *machinev1.Machine, note func(error, string)) {
	wanted := map[string]machinev1.NIC{}
	for _, n := range m.NICs {
		wanted[n.Name] = n
	}
	l.mu.Lock()
	have := maps.Clone(l.nics)
	l.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(have)) {
		n := have[name]
		if want, stays := wanted[name]; stays && !n.missing && sameCard(want, n.spec) {
			continue
		}
		err := hardware.ErrHotPlug
		switch {
		case n.missing:
			err = nil
		case !n.spec.Pod:
			err = l.hw.RemoveNIC(ctx, name)
		}
		l.mu.Lock()
		if err == nil {
			delete(l.nics, name)
		} else {
			n.failed = board.Cut(err.Error())
		}
		l.mu.Unlock()
		note(err, "removing network interface "+name)
	}
	for _, want := range m.NICs {
		l.mu.Lock()
		_, ok := l.nics[want.Name]
		l.mu.Unlock()
		if !ok {
			note(l.addNIC(ctx, want), "adding network interface "+want.Name)
		}
	}
}

// sameCard tells whether two interfaces are the same for the machine; what the guest configures is not its matter.
func sameCard(a, b machinev1.NIC) bool {
	return a.Model == b.Model && (a.MAC == "" || b.MAC == "" || strings.EqualFold(a.MAC, b.MAC)) && a.Pod == b.Pod && a.Bridge == b.Bridge && a.VLAN == b.VLAN
}

// addNIC adds a network interface while the machine runs.
func (l *life) addNIC(ctx context.Context, want machinev1.NIC) error {
	err := l.tryAddNIC(ctx, want)
	if err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.nics[want.Name] = &nic{spec: want, missing: true, failed: board.Cut(err.Error())}
	}
	return err
}

func (l *life) tryAddNIC(ctx context.Context, want machinev1.NIC) error {
	if want.Pod {
		return fmt.Errorf("the pod's own interface %w", hardware.ErrHotPlug)
	}
	tap, err := l.openNIC(&want)
	if err != nil {
		return err
	}
	defer func(f *os.File) { _ = f.Close() }(tap)
	if err := l.hw.AddNIC(ctx, want, tap); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nics[want.Name] = &nic{spec: want}
	return nil
}

// report writes down which disks and network interfaces the machine has.
func (l *life) report() {
	pod := l.podNetwork()
	l.mu.Lock()
	var ds []machinev1.DiskState
	for _, name := range slices.Sorted(maps.Keys(l.disks)) {
		d := l.disks[name]
		st := machinev1.DiskState{Name: name, Volume: d.spec.Volume, Attached: d.spec.Volume != "", Bytes: d.size.Load(), Error: d.failed}
		ds = append(ds, st)
	}
	var ns []machinev1.NICState
	for _, name := range slices.Sorted(maps.Keys(l.nics)) {
		n := l.nics[name]
		st := machinev1.NICState{Name: name, MAC: n.spec.MAC, Addresses: n.spec.Addresses, Gateway4: n.spec.Gateway4, Error: n.failed}
		if n.spec.Pod {
			st.Addresses, st.Gateway4 = nil, ""
			for _, a := range pod.Addresses {
				st.Addresses = append(st.Addresses, a.String())
			}
			if pod.Gateway4.IsValid() {
				st.Gateway4 = pod.Gateway4.String()
			}
		}
		ns = append(ns, st)
	}
	l.mu.Unlock()
	l.s.board.Update(func(st *machinev1.State) { st.Disks, st.NICs = ds, ns })
}
