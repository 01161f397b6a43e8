package vm

import (
	"context"
	"fmt"

	"atoll.dev/atoll/internal/vm/monitor"
	"atoll.dev/atoll/internal/vm/qemu"
)

// MemoryGranule is the unit that AddMemory works in: the guest kernel's memory block.
const MemoryGranule = 128 << 20

// AddMemory plugs at least that many bytes of memory, rounded up to MemoryGranule, and returns what
// it plugged. The guest must bring it into use. It cannot be taken away again. Each machine has
// room for a few calls only: ask for all that is needed at once. ErrLimit when the template's
// MaxMemoryMiB or the number of slots is used up.
func (m *Machine) AddMemory(ctx context.Context, bytes int64) (int64, error) {
	const doing = "adding memory"
	if bytes <= 0 {
		return 0, fmt.Errorf("%s: %d bytes make no sense", doing, bytes)
	}
	bytes = (bytes + MemoryGranule - 1) / MemoryGranule * MemoryGranule
	m.devices.Lock()
	defer m.devices.Unlock()
	room := int64(m.meta.MaxMemoryMiB-m.meta.MemoryMiB)<<20 - m.added
	if bytes > room || m.dimms >= memorySlots {
		return 0, fmt.Errorf("%s: %w: %d bytes wanted, %d left in %d slots",
			doing, ErrLimit, bytes, room, memorySlots-m.dimms)
	}
	err := m.qmp.PlugMemory(ctx, m.dimms, map[string]any{"qom-type": "memory-backend-ram", "size": bytes})
	if err != nil {
		return 0, err
	}
	m.dimms++
	m.added += bytes
	return bytes, nil
}

// SetCPUs plugs vCPUs until the machine has n. The guest must bring them into use. They cannot be
// taken away: a smaller n changes nothing. ErrLimit when n is more than the template's MaxCPUs.
func (m *Machine) SetCPUs(ctx context.Context, n int) error {
	if n > m.meta.MaxCPUs {
		return fmt.Errorf("adding cpus: %w: %d wanted, %d allowed", ErrLimit, n, m.meta.MaxCPUs)
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	var err error
	if m.meta.Accel == TCG {
		e := monitor.Emulated{BufferMiB: qemu.TranslatedMiB, Limit: m.meta.MaxCPUs, Pause: m.Pause, Resume: m.Resume}
		_, err = m.qmp.PlugEmulatedCPUs(ctx, e, n)
	} else {
		_, err = m.qmp.PlugCPUs(ctx, n)
	}
	return err
}
