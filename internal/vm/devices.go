package vm

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// Disk is a disk that is added to a running machine.
type Disk struct {
	Serial   string   // unit serial number; 1 to 36 letters, digits, '-', '_' or '.'
	File     *os.File // raw image; open for reading only if ReadOnly, else for both
	ReadOnly bool
}

// Bounds of the SCSI controller of one machine.
const (
	maxDisks = 128 // at a time
	maxLUNs  = 256 // that fit the simple form of a LUN
)

// fdset numbers: 1 is the scratch disk.
const (
	imageFDSet = 10
	diskFDSet  = 100
)

// AttachImage puts a read-only image behind the disk with the given serial (see SlotSerial). f must
// be open for reading only and stays owned by the caller. The guest sees a disk of a fixed, larger
// size; what is behind the end of the image is an I/O error.
//
// Images are swapped without the guest noticing: only after DetachImage may the slot be used again.
func (m *Machine) AttachImage(ctx context.Context, serial string, f *os.File) error {
	doing := "attaching an image to " + serial
	i, err := slotIndex(serial)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if err := block.CheckAccess(f, unix.O_RDONLY); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if st, err := f.Stat(); err != nil || st.Size() > qemu.PlaceholderBytes {
		return fmt.Errorf("%s: image is unreadable or larger than %d bytes", doing, int64(qemu.PlaceholderBytes))
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	if m.slots[i] {
		return fmt.Errorf("%s: %w", doing, ErrBusy)
	}
	node := imageNode(i)
	add := addFile(imageFDSet+i, node, f, true)
	err = m.run(ctx, doing, append(add, setDrive(i, node))...)
	if err != nil {
		_ = m.qmp.Run(context.WithoutCancel(ctx), clearSlot(i)...) // whatever of it had worked
		return err
	}
	m.slots[i] = true
	return nil
}

// DetachImage takes the image away again. The guest must have unmounted it: it would go on to read
// cached pages of the old image and new pages of the next.
func (m *Machine) DetachImage(ctx context.Context, serial string) error {
	doing := "detaching the image of " + serial
	i, err := slotIndex(serial)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	if !m.slots[i] {
		return fmt.Errorf("%s: %w", doing, ErrBusy)
	}
	if err := m.run(ctx, doing, clearSlot(i)...); err != nil {
		return err
	}
	m.slots[i] = false
	return nil
}

func slotIndex(serial string) (int, error) {
	for i := range ImageSlots {
		if SlotSerial(i) == serial {
			return i, nil
		}
	}
	return 0, fmt.Errorf("no image slot %q", serial)
}

func imageNode(i int) string { return fmt.Sprintf("f%d", i) }

// addFile hands a file to QEMU and makes a block node of it.
func addFile(set int, node string, f *os.File, readOnly bool) []qmp.Command {
	return []qmp.Command{
		{Name: "add-fd", Args: map[string]any{"fdset-id": set}, File: f},
		{Name: "blockdev-add", Args: block.FileNode(set, node, !readOnly, false)},
	}
}

// dropFile is the reverse of addFile.
func dropFile(set int, node string) []qmp.Command {
	return []qmp.Command{
		{Name: "blockdev-del", Args: map[string]any{"node-name": node}},
		{Name: "remove-fd", Args: map[string]any{"fdset-id": set}},
	}
}

// setDrive changes what a preplugged disk reads from.
func setDrive(i int, node string) qmp.Command {
	return qmp.Command{Name: "qom-set", Args: map[string]any{
		"path": qemu.SlotDevice(i), "property": "drive", "value": node,
	}}
}

func clearSlot(i int) []qmp.Command {
	return append([]qmp.Command{setDrive(i, qemu.SlotEmptyNode(i))}, dropFile(imageFDSet+i, imageNode(i))...)
}

// HotAddDisk adds a disk to the SCSI controller and returns its LUN on target 0 of bus 0. It is the
// way for writable disks, and for images when all slots are taken; it takes the guest some
// milliseconds to find the disk.
func (m *Machine) HotAddDisk(ctx context.Context, d Disk) (lun int, err error) {
	doing := fmt.Sprintf("adding disk %q", d.Serial)
	if err := block.CheckSerial(d.Serial); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	access := unix.O_RDWR
	if d.ReadOnly {
		access = unix.O_RDONLY
	}
	if err := block.CheckAccess(d.File, access); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	m.devices.Lock()
	defer m.devices.Unlock()
	if _, ok := m.disks[d.Serial]; ok {
		return 0, fmt.Errorf("%s: there is one already", doing)
	}
	if lun, err = m.takeLUN(); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	commands := append(addFile(diskFDSet+lun, diskNode(lun), d.File, d.ReadOnly),
		qmp.Command{Name: "device_add", Args: map[string]any{
			"driver": "scsi-hd", "id": diskID(lun), "bus": qemu.SCSIBus, "channel": 0, "scsi-id": 0,
			"lun": lun, "drive": diskNode(lun), "serial": d.Serial,
		}})
	if err := m.run(ctx, doing, commands...); err != nil {
		_ = m.qmp.Run(context.WithoutCancel(ctx), dropFile(diskFDSet+lun, diskNode(lun))...) // whatever had worked
		return 0, err
	}
	m.disks[d.Serial] = lun
	return lun, nil
}

// RemoveDisk takes a disk of HotAddDisk away, whether or not the guest still uses it.
func (m *Machine) RemoveDisk(ctx context.Context, serial string) error {
	doing := fmt.Sprintf("removing disk %q", serial)
	m.devices.Lock()
	defer m.devices.Unlock()
	lun, ok := m.disks[serial]
	if !ok || m.volumes[serial] != nil {
		return fmt.Errorf("%s: no such disk", doing)
	}
	if err := m.unplug(ctx, lun); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if err := m.run(ctx, doing, dropFile(diskFDSet+lun, diskNode(lun))...); err != nil {
		return err
	}
	delete(m.disks, serial)
	return nil
}

// unplug takes a device off the SCSI controller and waits until it is gone. One that is not there is fine.
func (m *Machine) unplug(ctx context.Context, lun int) error {
	return m.qmp.Unplug(ctx, diskID(lun))
}

// takeLUN is the next unused LUN. It does not reuse one soon, so that a guest that has not yet
// noticed the end of one disk does not take it for the next.
func (m *Machine) takeLUN() (int, error) {
	if len(m.disks) >= maxDisks {
		return 0, fmt.Errorf("%w: %d disks", ErrLimit, maxDisks)
	}
	for {
		lun := m.nextLUN
		m.nextLUN = (m.nextLUN + 1) % maxLUNs
		if !slices.Contains(slices.Collect(maps.Values(m.disks)), lun) {
			return lun, nil
		}
	}
}

func diskID(lun int) string   { return fmt.Sprintf("d%d", lun) }
func diskNode(lun int) string { return fmt.Sprintf("D%d", lun) }
