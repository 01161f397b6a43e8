package hardware

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/monitor"
	"atoll.dev/atoll/internal/vm/qmp"
)

// Size is what a machine has now.
type Size struct {
	CPUs   int
	Memory int64 // bytes
}

// Size is what the machine has now.
func (m *Machine) Size() Size {
	m.devices.Lock()
	defer m.devices.Unlock()
	return Size{CPUs: m.shape.CPUs, Memory: m.shape.memory()}
}

// AddMemory plugs at least that many bytes, rounded up to vm.MemoryGranule, and returns what it plugged. The
// guest must bring it into use. vm.ErrLimit beyond Machine.Memory.Max.
func (m *Machine) AddMemory(ctx context.Context, bytes int64) (int64, error) {
	const doing = "adding memory"
	if bytes <= 0 {
		return 0, fmt.Errorf("%s: %d bytes make no sense", doing, bytes)
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	memory, s := m.machine.Memory, m.shape
	granule := max(vm.MemoryGranule, memory.HugePageBytes)
	bytes = (bytes + granule - 1) / granule * granule
	if room := memory.Max - s.memory(); bytes > room || len(s.DIMMs) >= memorySlots {
		return 0, fmt.Errorf("%s: %w: %d bytes wanted, %d left in %d slots",
			doing, vm.ErrLimit, bytes, room, memorySlots-len(s.DIMMs))
	}
	if err := enoughHugePages(memory, bytes); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	if err := m.qmp.PlugMemory(ctx, len(s.DIMMs), memoryBackend(bytes, memory.HugePageBytes)); err != nil {
		return 0, err
	}
	s.DIMMs = append(s.DIMMs, bytes)
	return bytes, nil
}

// SetCPUs plugs vCPUs until the machine has n, and returns how many it has. They cannot be taken away: a
// smaller n changes nothing. vm.ErrLimit beyond Machine.CPU.Max.
func (m *Machine) SetCPUs(ctx context.Context, n int) (int, error) {
	m.devices.Lock()
	defer m.devices.Unlock()
	if limit := m.machine.CPU.Max; n > limit {
		return m.shape.CPUs, fmt.Errorf("adding cpus: %w: %d wanted, %d allowed", vm.ErrLimit, n, limit)
	}
	if n <= m.shape.CPUs {
		return m.shape.CPUs, nil
	}
	present, err := m.plugCPUs(ctx, n)
	if errors.Is(err, monitor.ErrTranslations) {
		err = fmt.Errorf("%w: %w", ErrHotPlug, err)
	}
	m.shape.CPUs = max(m.shape.CPUs, present)
	if err != nil {
		return m.shape.CPUs, err
	}
	return m.shape.CPUs, m.pin(ctx)
}

// plugCPUs adds vCPUs until there are n.
func (m *Machine) plugCPUs(ctx context.Context, n int) (int, error) {
	if m.accel != vm.TCG {
		return m.qmp.PlugCPUs(ctx, n)
	}
	return m.qmp.PlugEmulatedCPUs(ctx, monitor.Emulated{
		BufferMiB: translated, Limit: sockets(m.machine.CPU) * m.machine.CPU.CoresPerSocket, Pause: m.Pause, Resume: m.Resume,
	}, n)
}

// pin gives each vCPU a processor of the host, if the machine is to be pinned.
func (m *Machine) pin(ctx context.Context) error {
	const doing = "pinning vCPUs"
	if !m.machine.CPU.Pinned {
		return nil
	}
	hosts := m.hostCPUs
	if len(hosts) == 0 {
		var err error
		if hosts, err = allowedCPUs(); err != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
	}
	var cpus []struct {
		Index  int `json:"cpu-index"`
		Thread int `json:"thread-id"`
	}
	if err := m.do(ctx, doing, qmp.Command{Name: "query-cpus-fast", Result: &cpus}); err != nil {
		return err
	}
	if len(cpus) > len(hosts) {
		return fmt.Errorf("%s: %w: %d vCPUs and %d processors of the host for them; use fewer, or do not pin",
			doing, vm.ErrLimit, len(cpus), len(hosts))
	}
	slices.SortFunc(cpus, func(a, b struct {
		Index  int `json:"cpu-index"`
		Thread int `json:"thread-id"`
	},
	) int {
		return a.Index - b.Index
	})
	for i, c := range cpus {
		// QEMU said it, and a guest may have taken it over.
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", m.PID(), c.Thread)); err != nil {
			return fmt.Errorf("%s: thread %d is none of qemu's: %w", doing, c.Thread, err)
		}
		var set unix.CPUSet
		set.Set(hosts[i])
		if err := unix.SchedSetaffinity(c.Thread, &set); err != nil {
			return fmt.Errorf("%s %d to processor %d: %w", doing, i, hosts[i], err)
		}
	}
	return nil
}

// allowedCPUs are the processors this process may run on.
func allowedCPUs() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("reading the processors of this process: %w", err)
	}
	var out []int
	for i := 0; len(out) < set.Count(); i++ {
		if set.IsSet(i) {
			out = append(out, i)
		}
	}
	return out, nil
}

// enoughHugePages refuses memory that the host has no huge pages for.
func enoughHugePages(memory machinev1.Memory, bytes int64) error {
	size := memory.HugePageBytes
	if size == 0 {
		return nil
	}
	free, err := hugePages(size, "free_hugepages")
	if err != nil {
		return fmt.Errorf("%w: the host has no huge pages of %d bytes: %w", vm.ErrLimit, size, err)
	}
	reserved, err := hugePages(size, "resv_hugepages")
	if err != nil {
		return err
	}
	if need := bytes / size; need > free-reserved {
		return fmt.Errorf("%w: %d huge pages of %d bytes needed, %d are free; raise nr_hugepages of the host",
			vm.ErrLimit, need, size, free-reserved)
	}
	return nil
}
