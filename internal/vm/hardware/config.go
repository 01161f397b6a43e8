package hardware

import (
	"errors"
	"os"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
)

// Errors to tell apart with errors.Is, besides those of package vm.
var (
	// ErrConfig: the Machine asks for what cannot be. The message names the field and the way out.
	ErrConfig = errors.New("machine is not possible")
	// ErrHotPlug: this change needs the machine powered off and on again.
	ErrHotPlug = errors.New("cannot be changed while the machine runs")
	// ErrUnplug: the guest does not let go of a device. Trying again goes on waiting.
	ErrUnplug = errors.New("the guest did not release the device")
	// ErrUnmigratable: the memory of this machine cannot be saved; the message names the device.
	ErrUnmigratable = errors.New("memory of the machine cannot be saved")
	// ErrMemoryImage: what the machine is to go on from is no saved memory, or one of another machine.
	ErrMemoryImage = errors.New("saved memory is not usable")
	// ErrFirmware: the firmware of the machine is not installed.
	ErrFirmware = errors.New("firmware is missing")
)

// Config is a virtual machine and what it is made of. All files stay open and owned by the caller, who may
// close them once Start has returned.
type Config struct {
	// Machine says what there is. Its Restore, Stop, Operations and Seed are the caller's matter.
	Machine machinev1.Machine
	// QEMU is the path of qemu-system-x86_64, default vm.DefaultQEMU.
	QEMU  string
	Accel vm.Accel // default vm.TCG
	// UID and GID are whom QEMU runs as: one pair per machine, never 0.
	UID, GID uint32

	// Disks are the volumes of Machine.Disks by name; a CD-ROM drive without one is empty. Serial of a
	// vm.Volume is not used, the disk's UUID is.
	Disks map[string]vm.Volume
	// Taps are the taps of Machine.NICs by name, made with virtio-net headers.
	Taps map[string]*os.File
	// Seed is an ISO image, open for reading only, for a CD-ROM drive of its own. nil: no such drive.
	Seed *os.File
	// Firmware is where EFI comes from, see FindFirmware. Not used with BIOS.
	Firmware Firmware
	// NVRAM holds the variables of EFI, made by CreateNVRAM, open for reading and writing.
	NVRAM *os.File
	// TPM is a socket of package swtpm. nil: no TPM.
	TPM *os.File
	// Incoming is what SaveMemory has written, from its current offset on. Machine and Disks must be the ones
	// from that moment; what was added to the machine before is in the file. nil: the machine boots.
	Incoming *os.File
	// Paused: stand still until Resume.
	Paused bool
	// TempDir is where unnamed files with the changes of non-persistent disks are made.
	TempDir string
	// HostCPUs are the host's processors for Machine.CPU.Pinned. Default: those this process may run on.
	HostCPUs []int
	// OnEvent, which may be nil, is called for every event in order. It must not block or call the machine.
	OnEvent func(Event)
}

// EventKind is what happened to a machine.
type EventKind string

// The kinds of events.
const (
	EventReset    EventKind = "reset"    // the guest was restarted
	EventShutdown EventKind = "shutdown" // the machine is about to end
	EventPanic    EventKind = "panic"    // the guest's kernel crashed; it may go on, to dump or to restart
	EventStopped  EventKind = "stopped"  // stands still
	EventResumed  EventKind = "resumed"
	EventIOError  EventKind = "ioerror" // a request of a disk failed, and the guest was told
	EventFull     EventKind = "full"    // the machine stands still until a disk can be written to; see Stalled
	EventGoneOn   EventKind = "goneon"  // it has stood still for a disk, and goes on
	EventTray     EventKind = "tray"    // the guest opened or closed a CD-ROM drive
	EventSuspend  EventKind = "suspend" // the guest sleeps (ACPI S3)
	EventWakeup   EventKind = "wakeup"  // the guest woke up
	EventUnplug   EventKind = "unplug"  // a device is gone
	EventRefused  EventKind = "refused" // the guest refused to release a device
)

// ReasonDump is the Reason of an EventPanic whose guest goes on to dump its memory. There may be another event when it has.
const ReasonDump = "dump"

// Event is something that happened to a machine.
type Event struct {
	Kind EventKind
	// Guest tells whether the guest did it by itself, of EventReset and EventShutdown.
	Guest bool
	// Reason is QEMU's word for it: "guest-shutdown", "host-qmp-system-reset".
	Reason string
	// Device is the name of the disk or network interface, if it is about one.
	Device string
}

// SaveOptions says how the memory of a machine is saved.
type SaveOptions struct {
	// AtPause is called while the guest stands still, at the moment that the saved memory is of. It is where
	// disks are snapshotted. An error gives up saving. May be nil.
	AtPause func() error
	// Progress, which may be nil, is called now and then with how much is done, 0 to 100.
	Progress func(percent int)
	// End: the machine stays stopped afterwards, to be ended by PowerOff. Else it goes on.
	End bool
}
