package vm

import (
	"context"
	"encoding/json"
	"fmt"

	"atoll.dev/atoll/internal/vm/qmp"
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
	backend, dimm := fmt.Sprintf("m%d", m.dimms), fmt.Sprintf("dimm%d", m.dimms)
	err := m.run(
		ctx, doing,
		qmp.Command{Name: "object-add", Args: map[string]any{
			"qom-type": "memory-backend-ram", "id": backend, "size": bytes,
		}},
		qmp.Command{Name: "device_add", Args: map[string]any{
			"driver": "pc-dimm", "id": dimm, "memdev": backend,
		}},
	)
	if err != nil {
		_ = m.qmp.Execute(context.WithoutCancel(ctx), "object-del", map[string]any{"id": backend}, nil)
		return 0, err
	}
	m.dimms++
	m.added += bytes
	return bytes, nil
}

// SetCPUs plugs vCPUs until the machine has n. The guest must bring them into use. They cannot be
// taken away: a smaller n changes nothing. ErrLimit when n is more than the template's MaxCPUs.
func (m *Machine) SetCPUs(ctx context.Context, n int) error {
	const doing = "adding cpus"
	if n > m.meta.MaxCPUs {
		return fmt.Errorf("%s: %w: %d wanted, %d allowed", doing, ErrLimit, n, m.meta.MaxCPUs)
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	var slots []struct {
		Type  string                     `json:"type"`
		Props map[string]json.RawMessage `json:"props"`
		Path  string                     `json:"qom-path"`
	}
	err := m.run(ctx, doing, qmp.Command{Name: "query-hotpluggable-cpus", Result: &slots})
	if err != nil {
		return err
	}
	present := 0
	for _, s := range slots {
		if s.Path != "" {
			present++
		}
	}
	var commands []qmp.Command
	// QEMU lists the highest first; fill from the lowest.
	for i := len(slots) - 1; i >= 0 && present+len(commands) < n; i-- {
		if slots[i].Path != "" {
			continue
		}
		args := map[string]any{"driver": slots[i].Type, "id": fmt.Sprintf("cpu%d", present+len(commands))}
		for k, v := range slots[i].Props {
			args[k] = v
		}
		commands = append(commands, qmp.Command{Name: "device_add", Args: args})
	}
	if len(commands) == 0 {
		return nil
	}
	return m.run(ctx, doing, commands...)
}
