package hardware

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/qmp"
)

// UnplugTimeout is how long a guest has to let go of a device.
const UnplugTimeout = 30 * time.Second

// AddDisk adds a disk. ErrHotPlug on buses where that cannot be. After an error, RemoveDisk tells whether QEMU
// has closed all files: it has if it returns vm.ErrNoVolume.
func (m *Machine) AddDisk(ctx context.Context, d machinev1.Disk, v vm.Volume) error {
	m.devices.Lock()
	defer m.devices.Unlock()
	if err := m.addDisk(ctx, d, v); err != nil {
		return fmt.Errorf("adding disk %q: %w", d.Name, err)
	}
	return nil
}

func (m *Machine) addDisk(ctx context.Context, d machinev1.Disk, v vm.Volume) error {
	if err := m.checkAdded(d, v); err != nil {
		return err
	}
	ctx, cancel := m.graph.WithPatience(ctx)
	defer cancel()
	bus, err := m.plugController(ctx, d)
	if err != nil {
		return err
	}
	dk := &disk{Disk: d}
	m.disks[d.Name] = dk
	err = m.insert(ctx, dk, v)
	if err == nil {
		err = m.do(ctx, "plugging", qmp.Command{Name: "device_add", Args: diskDevice(d, dk.chain.Top(), 0, bus)})
	}
	if err == nil && v.Limits != (vm.Limits{}) {
		if err = m.do(ctx, "limiting", block.Throttle(diskID(d.Name), v.Limits)); err != nil {
			err = errors.Join(err, m.qmp.Unplug(ctx, diskID(d.Name)))
		}
	}
	if err != nil {
		return errors.Join(block.Locked(err), m.dropDisk(ctx, dk))
	}
	m.machine.Disks = append(m.machine.Disks, d)
	return nil
}

// checkAdded refuses a disk that cannot be added.
func (m *Machine) checkAdded(d machinev1.Disk, v vm.Volume) error {
	if m.disks[d.Name] != nil {
		return errors.New("there is one already")
	}
	if !nameForm.MatchString(d.Name) {
		return bad("disks", "the name %q is no DNS label", d.Name)
	}
	switch {
	case d.Bus == machinev1.SATA || d.Bus == machinev1.IDE:
		return fmt.Errorf("%w: a disk on %s; use the bus scsi or nvme, or power the machine off", ErrHotPlug, d.Bus)
	case d.CDROM:
		return fmt.Errorf("%w: a CD-ROM drive; power the machine off", ErrHotPlug)
	case d.NonPersistent:
		return fmt.Errorf("%w: a non-persistent disk; power the machine off", ErrHotPlug)
	}
	seen := map[string]string{}
	for _, other := range m.machine.Disks {
		if err := checkDisk(other, seen); err != nil {
			return err
		}
	}
	if err := checkDisk(d, seen); err != nil {
		return err
	}
	return checkVolume(d, v)
}

// plugController makes room for a disk: a root port for one on NVMe, which it returns, and a SCSI controller if there
// is none yet.
func (m *Machine) plugController(ctx context.Context, d machinev1.Disk) (port int, err error) {
	if d.Bus == machinev1.NVMe {
		return m.shape.takePort(diskID(d.Name))
	}
	if m.scsi[d.Controller] { // one stays when its last disk goes
		return 0, nil
	}
	id := scsiID(d.Controller)
	if port, err = m.shape.takePort(id); err != nil {
		return 0, err
	}
	err = m.do(ctx, "plugging controller", qmp.Command{Name: "device_add", Args: scsiController(d.Controller).behind(port)})
	if err != nil {
		delete(m.shape.Ports, id)
		return 0, err
	}
	m.scsi[d.Controller] = true
	return 0, nil
}

// insert opens a volume for a disk.
func (m *Machine) insert(ctx context.Context, d *disk, v vm.Volume) error {
	prefix := fmt.Sprintf("v%d", m.next)
	m.next++
	m.mu.Lock()
	m.chains[prefix] = d.Name
	m.mu.Unlock()
	var err error
	d.chain, err = m.graph.Open(ctx, prefix, v)
	return err
}

// closeChain closes the files of a disk.
func (m *Machine) closeChain(ctx context.Context, d *disk) error {
	if d.chain == nil {
		return nil
	}
	if err := m.graph.Close(ctx, d.chain); err != nil {
		return err
	}
	m.mu.Lock()
	delete(m.chains, d.chain.Prefix())
	m.mu.Unlock()
	d.chain = nil
	return nil
}

// dropDisk forgets a disk whose device is gone, once all its files are closed.
func (m *Machine) dropDisk(ctx context.Context, d *disk) error {
	if err := m.closeChain(ctx, d); err != nil {
		return err
	}
	delete(m.disks, d.Name)
	delete(m.shape.Ports, diskID(d.Name))
	for i, other := range m.machine.Disks {
		if other.Name == d.Name {
			m.machine.Disks = append(m.machine.Disks[:i:i], m.machine.Disks[i+1:]...)
			break
		}
	}
	return nil
}

// RemoveDisk takes a disk away and closes its files. A guest has a say for NVMe disks: ErrUnplug when it does
// not let go before ctx ends, or UnplugTimeout if that is earlier. Called again it goes on waiting.
// vm.ErrNoVolume if there is no such disk.
func (m *Machine) RemoveDisk(ctx context.Context, name string) error {
	return m.onDisk("removing", name, func(d *disk) error {
		if d.Bus == machinev1.SATA || d.Bus == machinev1.IDE {
			return fmt.Errorf("%w: a disk on %s; power the machine off", ErrHotPlug, d.Bus)
		}
		if err := m.unplug(ctx, diskID(name)); err != nil {
			return err
		}
		ctx, cancel := m.graph.WithPatience(ctx)
		defer cancel()
		return m.dropDisk(ctx, d)
	})
}

// unplug takes a device away and waits until the guest has let go of it.
func (m *Machine) unplug(ctx context.Context, id string) error {
	wait, cancel := context.WithTimeout(ctx, UnplugTimeout)
	defer cancel()
	err := m.qmp.Unplug(wait, id)
	if wait.Err() != nil && errors.Is(err, wait.Err()) {
		return fmt.Errorf("%w within %s: is it in use there?", ErrUnplug, UnplugTimeout)
	}
	return err
}

// onDisk does something to a disk while nothing else changes.
func (m *Machine) onDisk(doing, name string, f func(*disk) error) error {
	m.devices.Lock()
	defer m.devices.Unlock()
	d := m.disks[name]
	err := vm.ErrNoVolume
	if d != nil {
		err = f(d)
	}
	if err != nil {
		return fmt.Errorf("%s disk %q: %w", doing, name, err)
	}
	return nil
}

// onChain does something to what is in a disk.
func (m *Machine) onChain(doing, name string, f func(*block.Chain) error) error {
	return m.onDisk(doing, name, func(d *disk) error {
		switch {
		case d.chain == nil:
			return errors.New("there is no disc in the drive")
		case d.NonPersistent && doing != "limiting":
			return errors.New("the disk is non-persistent")
		}
		return f(d.chain)
	})
}

// ChangeDisc puts a disc into a CD-ROM drive, in place of one that is in it, whether or not the guest has locked
// the tray.
func (m *Machine) ChangeDisc(ctx context.Context, name string, v vm.Volume) error {
	return m.onDisk("changing the disc of", name, func(d *disk) error {
		if !d.CDROM {
			return bad("disks", "%q is no CD-ROM drive", name)
		}
		if err := checkVolume(d.Disk, v); err != nil {
			return err
		}
		ctx, cancel := m.graph.WithPatience(ctx)
		defer cancel()
		if err := m.eject(ctx, d); err != nil {
			return err
		}
		if err := m.insert(ctx, d, v); err != nil {
			return errors.Join(err, m.closeChain(ctx, d))
		}
		id := map[string]any{"id": diskID(name)}
		err := m.do(ctx, "inserting", qmp.Command{Name: "blockdev-insert-medium", Args: map[string]any{
			"id": diskID(name), "node-name": d.chain.Top(),
		}})
		if err != nil {
			return errors.Join(err, m.closeChain(ctx, d))
		}
		return m.do(ctx, "closing the tray", qmp.Command{Name: "blockdev-close-tray", Args: id})
	})
}

// EjectDisc takes the disc out of a CD-ROM drive. An empty drive is fine.
func (m *Machine) EjectDisc(ctx context.Context, name string) error {
	return m.onDisk("ejecting the disc of", name, func(d *disk) error {
		if !d.CDROM {
			return bad("disks", "%q is no CD-ROM drive", name)
		}
		ctx, cancel := m.graph.WithPatience(ctx)
		defer cancel()
		return m.eject(ctx, d)
	})
}

func (m *Machine) eject(ctx context.Context, d *disk) error {
	id := diskID(d.Name)
	err := m.do(
		ctx, "opening the tray",
		qmp.Command{Name: "blockdev-open-tray", Args: map[string]any{"id": id, "force": true}},
		qmp.Command{Name: "blockdev-remove-medium", Args: map[string]any{"id": id}},
	)
	if err != nil {
		return err
	}
	return m.closeChain(ctx, d)
}

// SnapshotDisk freezes the top layer of a disk and lets the guest write to overlay, as vm.Machine.SnapshotVolume.
func (m *Machine) SnapshotDisk(ctx context.Context, name string, frozen, overlay vm.Layer) error {
	return m.onChain("taking a snapshot of", name, func(c *block.Chain) error {
		return m.graph.Snapshot(ctx, c, frozen, overlay)
	})
}

// DiskDepth is how many layers a disk has.
func (m *Machine) DiskDepth(ctx context.Context, name string) (depth int, err error) {
	err = m.onChain("looking at", name, func(c *block.Chain) error {
		depth, err = m.graph.Depth(ctx, c)
		return err
	})
	return depth, err
}

// DiskSize is how large a disk is for the guest, in bytes.
func (m *Machine) DiskSize(ctx context.Context, name string) (size int64, err error) {
	err = m.onChain("looking at", name, func(c *block.Chain) error {
		size, err = m.graph.Size(ctx, c)
		return err
	})
	return size, err
}

// ResizeDisk makes a disk at least that size, in bytes. The guest is told.
func (m *Machine) ResizeDisk(ctx context.Context, name string, bytes int64) error {
	return m.onChain("resizing", name, func(c *block.Chain) error { return m.graph.Resize(ctx, c, bytes) })
}

// LimitDisk changes what a disk may do per second.
func (m *Machine) LimitDisk(ctx context.Context, name string, l vm.Limits) error {
	return m.onChain("limiting", name, func(*block.Chain) error {
		return m.do(ctx, "changing limits", block.Throttle(diskID(name), l))
	})
}

// diskOf is the disk that a block node is of.
func (m *Machine) diskOf(node string) string {
	prefix, _, _ := strings.Cut(node, ".")
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.chains[prefix]
}

// nameOf is the disk or network interface that a device is, "" for others.
func nameOf(device string) string {
	for _, prefix := range []string{diskID(""), nicID("")} {
		if name, ok := strings.CutPrefix(device, prefix); ok {
			return name
		}
	}
	return ""
}
