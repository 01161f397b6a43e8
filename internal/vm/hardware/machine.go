package hardware

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/guestagent"
)

// Machine is a running virtual machine. Its methods may be called from several goroutines.
type Machine struct{}

var errUnbuilt = errors.New("the virtual machine engine is not in this build")

// Start starts a machine and returns when QEMU runs it: its guest is in the firmware, or goes on from the
// saved memory.
func Start(ctx context.Context, cfg Config) (*Machine, error) { return nil, errUnbuilt }

// PID is the process id of QEMU.
func (m *Machine) PID() int { return 0 }

// Done is closed when QEMU has ended and is reaped.
func (m *Machine) Done() <-chan struct{} { return nil }

// Exit says how the machine ended. Only valid after Done.
func (m *Machine) Exit() vm.Exit { return vm.Exit{} }

// Kill ends QEMU at once; Done follows. What QEMU has not written yet of qcow2's structure is lost, as with a
// power cut of the host.
func (m *Machine) Kill() error { return nil }

// PowerOff is a power cut for the guest: QEMU writes what it has and ends. When ctx ends first, QEMU is
// killed. It returns when the machine has ended.
func (m *Machine) PowerOff(ctx context.Context) error { return errUnbuilt }

// Close kills the machine if it runs, waits for its end and releases what it holds here.
func (m *Machine) Close() error { return nil }

// Pause stops the vCPUs. The guest does not notice, except by the clock.
func (m *Machine) Pause(ctx context.Context) error { return errUnbuilt }

// Resume lets the vCPUs run.
func (m *Machine) Resume(ctx context.Context) error { return errUnbuilt }

// Reset restarts the guest like a reset button.
func (m *Machine) Reset(ctx context.Context) error { return errUnbuilt }

// PowerDown presses the power button (ACPI). The guest may do anything, also nothing.
func (m *Machine) PowerDown(ctx context.Context) error { return errUnbuilt }

// Accelerator is how guest code runs.
func (m *Machine) Accelerator() vm.Accel { return "" }

// Stalled tells whether the machine stands still since a disk's file system on the host is full. It goes on
// by itself once there is room.
func (m *Machine) Stalled() bool { return false }

// Size is what a machine has now.
type Size struct {
	CPUs   int
	Memory int64 // bytes
}

// Size is what the machine has now.
func (m *Machine) Size() Size { return Size{} }

// AddMemory plugs at least that many bytes, rounded up to vm.MemoryGranule, and returns what it plugged. The
// guest must bring it into use. vm.ErrLimit beyond Machine.Memory.Max.
func (m *Machine) AddMemory(ctx context.Context, bytes int64) (int64, error) { return 0, errUnbuilt }

// SetCPUs plugs vCPUs until the machine has n, and returns how many it has. They cannot be taken away: a
// smaller n changes nothing. vm.ErrLimit beyond Machine.CPU.Max.
func (m *Machine) SetCPUs(ctx context.Context, n int) (int, error) { return 0, errUnbuilt }

// AddDisk adds a disk. ErrHotPlug on buses where that cannot be. After an error, RemoveDisk tells whether QEMU
// has closed all files: it has if it returns vm.ErrNoVolume.
func (m *Machine) AddDisk(ctx context.Context, d machinev1.Disk, v vm.Volume) error {
	return errUnbuilt
}

// RemoveDisk takes a disk away and closes its files. A guest has a say for NVMe disks: ErrUnplug when it does
// not let go before ctx ends, or UnplugTimeout if that is earlier. Called again it goes on waiting.
// vm.ErrNoVolume if there is no such disk.
func (m *Machine) RemoveDisk(ctx context.Context, name string) error { return errUnbuilt }

// ChangeDisc puts a disc into a CD-ROM drive, in place of one that is in it, whether or not the guest has locked
// the tray.
func (m *Machine) ChangeDisc(ctx context.Context, name string, v vm.Volume) error { return errUnbuilt }

// EjectDisc takes the disc out of a CD-ROM drive. An empty drive is fine.
func (m *Machine) EjectDisc(ctx context.Context, name string) error { return errUnbuilt }

// SnapshotDisk freezes the top layer of a disk and lets the guest write to overlay, as vm.Machine.SnapshotVolume.
func (m *Machine) SnapshotDisk(ctx context.Context, name string, frozen, overlay vm.Layer) error {
	return errUnbuilt
}

// DiskDepth is how many layers a disk has.
func (m *Machine) DiskDepth(ctx context.Context, name string) (int, error) { return 0, errUnbuilt }

// ResizeDisk makes a disk at least that size, in bytes. The guest is told.
func (m *Machine) ResizeDisk(ctx context.Context, name string, bytes int64) error { return errUnbuilt }

// LimitDisk changes what a disk may do per second.
func (m *Machine) LimitDisk(ctx context.Context, name string, l vm.Limits) error { return errUnbuilt }

// AddNIC adds a network interface. ErrHotPlug for models that are not PCI Express.
func (m *Machine) AddNIC(ctx context.Context, n machinev1.NIC, tap *os.File) error { return errUnbuilt }

// RemoveNIC takes a network interface away, if the guest lets go of it: ErrUnplug as with RemoveDisk.
func (m *Machine) RemoveNIC(ctx context.Context, name string) error { return errUnbuilt }

// Saved is what SaveMemory did.
type Saved struct {
	Bytes int64         // written to the file
	Pause time.Duration // how long the guest stood still; with SaveOptions.End, until it was saved
}

// SaveMemory writes the memory and the state of all devices to file, from its current offset on, while the
// guest runs, but for a moment at the end. When ctx ends it gives up, and the machine goes on as if nothing
// had been. ErrUnmigratable if the machine has a device whose state cannot be saved.
func (m *Machine) SaveMemory(ctx context.Context, file *os.File, o SaveOptions) (Saved, error) {
	return Saved{}, errUnbuilt
}

// VNC opens the display: a connection that speaks RFB, without authentication. There may be several.
func (m *Machine) VNC(ctx context.Context) (net.Conn, error) { return nil, errUnbuilt }

// Serial opens the first serial port. What the guest printed last comes first. A reader that is too slow
// loses output, the guest never waits.
func (m *Machine) Serial() io.ReadWriteCloser { return nil }

// Console returns the last output of the first serial port, at most 64 KiB. The guest wrote it.
func (m *Machine) Console() []byte { return nil }

// Agent is the guest agent's client. It is one for the whole life of the machine.
func (m *Machine) Agent() *guestagent.Client { return nil }
