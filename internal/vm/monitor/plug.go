package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"atoll.dev/atoll/internal/vm/qmp"
)

// PlugMemory adds a memory module: a backend of the type and options in backend, behind the slot of that number.
func (m *Monitor) PlugMemory(ctx context.Context, slot int, backend map[string]any) error {
	const doing = "adding memory"
	id := fmt.Sprintf("m%d", slot)
	backend["id"] = id
	err := m.Do(
		ctx, doing,
		qmp.Command{Name: "object-add", Args: backend},
		qmp.Command{Name: "device_add", Args: map[string]any{
			"driver": "pc-dimm", "id": fmt.Sprintf("dimm%d", slot), "memdev": id,
		}},
	)
	if err != nil {
		_ = m.Execute(context.WithoutCancel(ctx), "object-del", map[string]any{"id": id}, nil)
	}
	return err
}

const addingCPUs = "adding cpus"

// cpuSlot is a place for a vCPU.
type cpuSlot struct {
	Type  string                     `json:"type"`
	Props map[string]json.RawMessage `json:"props"`
	Path  string                     `json:"qom-path"` // "" when it is empty
}

// cpuSlots are all places, the highest first, and how many of them have a vCPU.
func (m *Monitor) cpuSlots(ctx context.Context) (slots []cpuSlot, present int, err error) {
	if err := m.Do(ctx, addingCPUs, qmp.Command{Name: "query-hotpluggable-cpus", Result: &slots}); err != nil {
		return nil, 0, err
	}
	for _, s := range slots {
		if s.Path != "" {
			present++
		}
	}
	return slots, present, nil
}

// PlugCPUs adds vCPUs until there are n and returns how many there are.
func (m *Monitor) PlugCPUs(ctx context.Context, n int) (present int, err error) {
	slots, present, err := m.cpuSlots(ctx)
	if err != nil {
		return 0, err
	}
	// Fill from the lowest.
	for i := len(slots) - 1; i >= 0 && present < n; i-- {
		if slots[i].Path != "" {
			continue
		}
		args := map[string]any{"driver": slots[i].Type, "id": fmt.Sprintf("cpu%d", present)}
		for k, v := range slots[i].Props {
			args[k] = v
		}
		if err := m.Do(ctx, addingCPUs, qmp.Command{Name: "device_add", Args: args}); err != nil {
			return present, err
		}
		present++
	}
	return present, nil
}

// Unplug takes a device away and waits until it is gone. One that is not there is fine, and so is one that is
// on its way already.
func (m *Monitor) Unplug(ctx context.Context, id string) error {
	gone := m.Expect(func(e qmp.Event) bool { return e.Name == "DEVICE_DELETED" && DeviceOf(e) == id })
	err := m.Do(ctx, "unplugging", qmp.Command{Name: "device_del", Args: map[string]any{"id": id}})
	if err != nil && !unplugging(err) {
		gone.Forget()
		if notFound(err) {
			return nil
		}
		return err
	}
	_, err = gone.Wait(ctx)
	return err
}

// DeviceOf is the device that an event is about, "" if it says none.
func DeviceOf(e qmp.Event) string {
	var data struct {
		Device string `json:"device"`
		ID     string `json:"id"` // of DEVICE_TRAY_MOVED
	}
	if json.Unmarshal(e.Data, &data) != nil {
		return ""
	}
	if data.ID != "" {
		return data.ID
	}
	return data.Device
}

func unplugging(err error) bool {
	var q *qmp.Error
	return errors.As(err, &q) && strings.Contains(q.Desc, "in the process of unplug")
}

func notFound(err error) bool {
	var q *qmp.Error
	return errors.As(err, &q) && strings.Contains(q.Desc, "not found")
}
