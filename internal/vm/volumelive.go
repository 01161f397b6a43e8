package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"atoll.dev/atoll/internal/vm/qmp"
)

// ErrNoVolume is wrapped when the machine has no volume with the serial.
var ErrNoVolume = errors.New("no such volume")

// retryStalled is how long a machine stands still before it tries again to write to a full file system.
const retryStalled = 2 * time.Second

// SnapshotVolume freezes the top layer and lets the guest write to overlay, an empty qcow2 file as large as
// the volume, from one moment to the next. frozen is what was the top layer, its file opened anew for reading
// only: from then on QEMU cannot write to it.
//
// After an error the volume is as before, unless the error wraps ErrExited or is a timeout. What became of it
// after a timeout is found out with the next change of the volume; the same snapshot again goes on from there.
func (m *Machine) SnapshotVolume(ctx context.Context, serial string, frozen, overlay Layer) error {
	doing := fmt.Sprintf("taking a snapshot of volume %q", serial)
	if overlay.Format != QCOW2 {
		return fmt.Errorf("%s: a layer of format %q cannot be on top of another", doing, overlay.Format)
	}
	if err := errors.Join(checkLayer(overlay, true), checkLayer(frozen, false)); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	v, err := m.writable(serial)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.patience)
	defer cancel()
	if err := m.settle(ctx, v); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	old := len(v.layers) - 1
	if old > 0 && v.layers[old].image == imageOf(overlay) {
		m.freezeOrWarn(ctx, serial, v, old-1, frozen)
		return nil
	}
	if len(v.layers) >= MaxLayers {
		return fmt.Errorf("%s: %w: it has %d layers; delete snapshots of it", doing, ErrLimit, MaxLayers)
	}
	err = m.addLayer(ctx, v, overlay, "", true)
	if err == nil {
		err = m.run(ctx, doing, qmp.Command{Name: "blockdev-snapshot", Args: map[string]any{
			"node": v.layers[old].node, "overlay": v.top(),
		}})
	}
	if err != nil {
		failed := v.layers[old+1]
		v.layers = v.layers[:old+1]
		if ctx.Err() != nil {
			v.unsure = &failed
			return fmt.Errorf("%s: %w", doing, err)
		}
		return fmt.Errorf("%s: %w", doing, errors.Join(locked(err), m.dropLayer(ctx, failed)))
	}
	m.freezeOrWarn(ctx, serial, v, old, frozen)
	return nil
}

// freezeOrWarn freezes layer i, which is below a snapshot that is taken. That QEMU could still write there is no
// reason to call the snapshot failed.
func (m *Machine) freezeOrWarn(ctx context.Context, serial string, v *volume, i int, frozen Layer) {
	var err error
	if frozen.RBD != nil {
		err = m.freezeRBD(ctx, v, i, *frozen.RBD)
	} else {
		err = m.freezeFile(ctx, &v.layers[i], frozen.File)
	}
	if err != nil {
		slog.Warn("opening a frozen layer for reading only", "volume", serial, "error", err)
	}
}

// freezeFile makes QEMU reopen a file for reading only and give up the descriptor it could write with.
func (m *Machine) freezeFile(ctx context.Context, l *layer, frozen *os.File) error {
	var added struct {
		FD int `json:"fd"`
	}
	err := m.run(
		ctx, "freezing layer",
		qmp.Command{Name: "add-fd", Args: map[string]any{"fdset-id": l.set}, File: frozen, Result: &added},
		qmp.Command{Name: "blockdev-reopen", Args: map[string]any{"options": []any{fileNodeOf(*l, false)}}},
	)
	if err != nil {
		return err
	}
	commands := make([]qmp.Command, 0, len(l.fds))
	for _, fd := range l.fds {
		commands = append(commands, qmp.Command{Name: "remove-fd", Args: map[string]any{"fdset-id": l.set, "fd": fd}})
	}
	l.fds = []int{added.FD}
	return m.run(ctx, "freezing layer", commands...)
}

// writable finds a volume that can be changed. Callers hold devices.
func (m *Machine) writable(serial string) (*volume, error) {
	v := m.volumes[serial]
	switch {
	case v == nil:
		return nil, ErrNoVolume
	case v.readOnly:
		return nil, errors.New("the volume is read-only")
	}
	return v, nil
}

// Depth is how many layers a volume has.
func (m *Machine) Depth(ctx context.Context, serial string) (int, error) {
	m.devices.Lock()
	defer m.devices.Unlock()
	v := m.volumes[serial]
	if v == nil {
		return 0, fmt.Errorf("looking at volume %q: %w", serial, ErrNoVolume)
	}
	if err := m.settle(ctx, v); err != nil {
		return 0, fmt.Errorf("looking at volume %q: %w", serial, err)
	}
	return len(v.layers), nil
}

// ResizeVolume makes a volume at least that size, in bytes. The guest is told and has to look. A volume that
// is larger, because growing it was interrupted before it was written down, stays as it is.
func (m *Machine) ResizeVolume(ctx context.Context, serial string, bytes int64) error {
	doing := fmt.Sprintf("resizing volume %q", serial)
	m.devices.Lock()
	defer m.devices.Unlock()
	v, err := m.writable(serial)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if bytes <= 0 || bytes%512 != 0 {
		return fmt.Errorf("%s: a disk cannot have %d bytes", doing, bytes)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.patience)
	defer cancel()
	if err := m.settle(ctx, v); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if n, err := m.blockNode(ctx, v.top()); err != nil || n.Image.Size >= bytes {
		return err
	}
	return m.run(ctx, doing, qmp.Command{Name: "block_resize", Args: map[string]any{"node-name": v.top(), "size": bytes}})
}

// LimitVolume changes what a volume may do per second.
func (m *Machine) LimitVolume(ctx context.Context, serial string, l Limits) error {
	doing := fmt.Sprintf("limiting volume %q", serial)
	m.devices.Lock()
	defer m.devices.Unlock()
	v := m.volumes[serial]
	if v == nil {
		return fmt.Errorf("%s: %w", doing, ErrNoVolume)
	}
	return m.run(ctx, doing, throttle(v.lun, l))
}

func throttle(lun int, l Limits) qmp.Command {
	return qmp.Command{Name: "block_set_io_throttle", Args: map[string]any{
		"id": diskID(lun), "iops": l.IOPS, "iops_rd": l.ReadIOPS, "iops_wr": l.WriteIOPS,
		"bps": l.Bytes, "bps_rd": l.ReadBytes, "bps_wr": l.WriteBytes,
	}}
}

// Stalled tells whether the machine stands still since a volume's file system on the host is full. It goes
// on by itself once there is room.
func (m *Machine) Stalled() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stalled
}

// onIOError takes the event of a failed request of a disk.
func (m *Machine) onIOError(e qmp.Event) {
	var data struct {
		Action  string `json:"action"`
		NoSpace bool   `json:"nospace"`
	}
	if json.Unmarshal(e.Data, &data) != nil || data.Action != "stop" || !data.NoSpace {
		return
	}
	m.mu.Lock()
	first := !m.stalled
	m.stalled = true
	m.mu.Unlock()
	if first {
		go m.unstall()
	}
}

// unstall lets the machine try again after a while. When it stops again, there is another event.
func (m *Machine) unstall() {
	slog.Warn("the file system of a volume is full; its micro-VM stands still until there is room")
	select {
	case <-m.done:
		return
	case <-time.After(retryStalled):
	}
	m.mu.Lock()
	m.stalled = false
	goneOn := m.goneOn
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	if err := m.Resume(ctx); err != nil {
		slog.Warn("letting a micro-VM go on", "error", err)
		return
	}
	if goneOn != nil { // unless it stops again at once
		time.AfterFunc(retryStalled, func() {
			if !m.Stalled() {
				goneOn()
			}
		})
	}
}

// OnGoingOn sets what is called when the machine has stood still and goes on. Its clock has stood still as well.
func (m *Machine) OnGoingOn(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.goneOn = f
}

// isLockMessage knows what QEMU says about an image that another process has open.
func isLockMessage(text string) bool {
	return strings.Contains(text, "lock") && (strings.Contains(text, "Failed to get") || strings.Contains(text, "another process"))
}

// missing knows what QEMU says about a node, a device, a set of descriptors or an object that is not there.
func missing(err error) bool {
	var q *qmp.Error
	return errors.As(err, &q) && (strings.Contains(q.Desc, "Failed to find node") || strings.Contains(q.Desc, "not found"))
}

// inUse knows what QEMU says about a node that another one needs.
func inUse(err error) bool {
	var q *qmp.Error
	return errors.As(err, &q) && strings.Contains(q.Desc, "is in use")
}
