package vm

import (
	"context"
	"errors"
	"fmt"

	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

type (
	// Volume is a persistent disk, to be added to a running machine.
	Volume = block.Volume
	// Layer is one file of a volume, or one image in Ceph.
	Layer = block.Layer
	// Limits is what a volume may do per second.
	Limits = block.Limits
	// Format is how a layer of a volume is written in its file.
	Format = block.Format
	// RBD is an image in Ceph.
	RBD = block.RBD
)

// The formats, and how many layers a volume can have.
const (
	Raw       = block.Raw
	QCOW2     = block.QCOW2
	MaxLayers = block.MaxLayers
)

// volume is a volume that the machine has.
type volume struct {
	lun   int
	chain *block.Chain
}

// AddVolume adds a volume as a SCSI disk. Everything that reaches a disk and is flushed by the guest is
// flushed to the file. When the host's file system is full the machine stops instead of failing a write; see
// Stalled.
//
// After an error, RemoveVolume tells whether QEMU has closed all files: it has if there is no such volume.
//
// It returns the LUN on target 0 of bus 0.
func (m *Machine) AddVolume(ctx context.Context, v Volume) (lun int, err error) {
	doing := fmt.Sprintf("adding volume %q", v.Serial)
	if err := errors.Join(block.CheckSerial(v.Serial), v.Check()); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	if _, ok := m.disks[v.Serial]; ok {
		return 0, fmt.Errorf("%s: there is one already", doing)
	}
	if lun, err = m.takeLUN(); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	ctx, cancel := m.graph.WithPatience(ctx)
	defer cancel()
	chain, err := m.graph.Open(ctx, fmt.Sprintf("v%d", lun), v)
	vol := &volume{lun: lun, chain: chain}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", doing, errors.Join(err, m.abandonVolume(ctx, v.Serial, vol)))
	}
	device := map[string]any{
		"driver": "scsi-hd", "id": diskID(lun), "bus": qemu.SCSIBus, "channel": 0, "scsi-id": 0, "lun": lun,
		"drive": chain.Top(), "serial": v.Serial, "rerror": "report", "werror": "enospc",
	}
	if v.Shared {
		device["share-rw"] = true
	}
	err = m.run(ctx, doing, qmp.Command{Name: "device_add", Args: device})
	if err == nil && v.Limits != (Limits{}) {
		if err = m.run(ctx, doing, block.Throttle(diskID(lun), v.Limits)); err != nil {
			err = errors.Join(err, m.unplug(ctx, lun))
		}
	}
	if err != nil {
		return 0, errors.Join(block.Locked(err), m.abandonVolume(ctx, v.Serial, vol))
	}
	m.disks[v.Serial] = lun
	m.volumes[v.Serial] = vol
	return lun, nil
}

// abandonVolume closes what was opened of a volume that cannot be added. What cannot be closed is left to
// RemoveVolume.
func (m *Machine) abandonVolume(ctx context.Context, serial string, v *volume) error {
	err := m.graph.Close(ctx, v.chain)
	if err != nil {
		m.disks[serial] = v.lun
		m.volumes[serial] = v
	}
	return err
}

// RemoveVolume takes a volume away, whether or not the guest still uses it, and closes its files. What the
// guest has flushed is in them, and what QEMU keeps of their structure is written.
func (m *Machine) RemoveVolume(ctx context.Context, serial string) error {
	return m.onVolume(serial, "removing", func(v *volume) error {
		ctx, cancel := m.graph.WithPatience(ctx)
		defer cancel()
		if err := m.unplug(ctx, v.lun); err != nil {
			return err
		}
		if err := m.graph.Close(ctx, v.chain); err != nil {
			return err
		}
		delete(m.volumes, serial)
		delete(m.disks, serial)
		return nil
	})
}

// onVolume does something to a volume while nothing else changes.
func (m *Machine) onVolume(serial, doing string, f func(*volume) error) error {
	m.devices.Lock()
	defer m.devices.Unlock()
	v := m.volumes[serial]
	err := ErrNoVolume
	if v != nil {
		err = f(v)
	}
	if err != nil {
		return fmt.Errorf("%s volume %q: %w", doing, serial, err)
	}
	return nil
}

// SnapshotVolume freezes the top layer and lets the guest write to overlay, an empty qcow2 file as large as
// the volume, from one moment to the next. frozen is what was the top layer, its file opened anew for reading
// only: from then on QEMU cannot write to it.
//
// After an error the volume is as before, unless the error wraps ErrExited or is a timeout. What became of it
// after a timeout is found out with the next change of the volume; the same snapshot again goes on from there.
func (m *Machine) SnapshotVolume(ctx context.Context, serial string, frozen, overlay Layer) error {
	return m.onVolume(serial, "taking a snapshot of", func(v *volume) error {
		return m.graph.Snapshot(ctx, v.chain, frozen, overlay)
	})
}

// Depth is how many layers a volume has.
func (m *Machine) Depth(ctx context.Context, serial string) (depth int, err error) {
	err = m.onVolume(serial, "looking at", func(v *volume) error {
		depth, err = m.graph.Depth(ctx, v.chain)
		return err
	})
	return depth, err
}

// ResizeVolume makes a volume at least that size, in bytes. The guest is told and has to look. A volume that
// is larger, because growing it was interrupted before it was written down, stays as it is.
func (m *Machine) ResizeVolume(ctx context.Context, serial string, bytes int64) error {
	return m.onVolume(serial, "resizing", func(v *volume) error { return m.graph.Resize(ctx, v.chain, bytes) })
}

// LimitVolume changes what a volume may do per second.
func (m *Machine) LimitVolume(ctx context.Context, serial string, l Limits) error {
	return m.onVolume(serial, "limiting", func(v *volume) error {
		return m.run(ctx, "changing limits", block.Throttle(diskID(v.lun), l))
	})
}

// Stalled tells whether the machine stands still since a volume's file system on the host is full. It goes
// on by itself once there is room.
func (m *Machine) Stalled() bool { return m.stall.Stalled() }

// OnGoingOn sets what is called when the machine has stood still and goes on. Its clock has stood still as well.
func (m *Machine) OnGoingOn(f func()) { m.stall.OnGoingOn(f) }
