// Package vm runs micro-VMs: QEMU machines cloned from a booted template.
//
// A template is a machine that was booted once, stopped where its init waits at the barrier, and
// saved: guest memory in one sealed memory file, device state in another. A clone maps the memory
// copy-on-write and loads the state, which is an order of magnitude faster than booting and shares
// all untouched pages. Both files can be handed to another process, which then clones with
// OpenTemplate. Boot starts a machine without a template.
//
// The order of calls on a Machine:
//
//	BuildTemplate / OpenTemplate -> Clone (or Boot)
//	    -> { Pause, Resume, AttachImage, DetachImage, HotAddDisk, RemoveDisk, AddMemory, SetCPUs,
//	         AddVolume, SnapshotVolume, ResizeVolume, LimitVolume, RemoveVolume }*
//	    -> Kill, or the guest ends; then Done is closed and Exit says how
//	    -> Close
//
// The package is not a container runtime: it speaks no guest protocol beyond the barrier, creates
// no network interface except throw-away taps, places nothing in a cgroup, and formats no disk. The
// shim and the pool call it. A guest is hostile: it can take over its QEMU, which is unprivileged,
// filtered, and holds only the files of this one machine; all it sends here is bounded.
//
// What can go wrong: see the sentinel errors. A QEMU that dies at any time shows as Done, and every
// call in flight fails with ErrExited. QEMU dies with the process that cloned it.
//
// Clones of one template share random state, clock and identity until their init is told
// otherwise; doing so before anything else runs is the caller's duty.
package vm

import (
	"fmt"
	"os"
	"time"

	"atoll.dev/atoll/internal/vm/initramfs"
	"atoll.dev/atoll/internal/vm/qemu"
)

// Accel is how QEMU runs guest code.
type Accel string

// The two accelerators.
const (
	TCG Accel = "tcg" // emulation: works everywhere, slow, not a security boundary by QEMU's policy
	KVM Accel = "kvm" // hardware virtualisation
)

// Device names as the guest sees them.
const (
	ImageSlots    = qemu.ImageSlots       // how many images can be attached at a time
	SlotBytes     = qemu.PlaceholderBytes // size of each slot, as the guest sees it
	ScratchSerial = qemu.ScratchSerial    // virtio serial of the scratch disk
	ControlPort   = qemu.ControlPort      // name of the virtio-serial port behind Channel
)

// SlotSerial is the virtio serial of image slot i, 0 <= i < ImageSlots.
func SlotSerial(i int) string { return qemu.SlotSerial(i) }

// Defaults for zero fields of Config.
const (
	DefaultQEMU         = "/usr/bin/qemu-system-x86_64"
	DefaultFirmware     = "qboot.rom"
	DefaultMemoryMiB    = 128
	DefaultScratchBytes = 16 << 30
	DefaultBootTimeout  = 3 * time.Minute // the guest gives up before
)

// Config is the machine that a template is made from. Only Kernel, Initramfs and UID are required.
type Config struct {
	QEMU         string            // path of qemu-system-x86_64
	Firmware     string            // path, or a name in QEMU's data directories
	Accel        Accel             // default TCG
	Kernel       string            // path of a PVH ELF vmlinux or a bzImage
	Initramfs    []initramfs.Entry // must have an /init that keeps the barrier handshake
	Cmdline      string            // added to the kernel command line
	MemoryMiB    int               // guest memory at start
	ReservedMiB  int               // of it, what the kernel takes more than our own would
	MaxMemoryMiB int               // limit with AddMemory; default: no memory can be added
	CPUs         int               // vCPUs at start, default 1
	MaxCPUs      int               // limit of SetCPUs, default CPUs
	ScratchBytes int64             // exact size of every clone's scratch disk; negative: no disk
	UID, GID     uint32            // whom the template's QEMU runs as; never 0
	BootTimeout  time.Duration     // for reaching the barrier

	// What init may use before the template is saved, see BuildTemplate.
	Scratch *os.File // writable image of exactly ScratchBytes; nil: a disk that reads as zeroes
	Image   *os.File // of exactly SlotBytes, in slot 0 until init is at the barrier; nil: none
}

// CloneConfig is what one clone has for itself. All files stay open and owned by the caller.
type CloneConfig struct {
	UID, GID uint32   // whom QEMU runs as; one pair per machine, never 0
	Tap      *os.File // tap made with virtio-net headers; nil: a tap that leads nowhere
	Scratch  *os.File // writable image of exactly ScratchBytes; nil: a disk that reads as zeroes
	Paused   bool     // stay stopped at the barrier until Resume
}

// withDefaults fills zero fields and refuses what cannot work.
func (c Config) withDefaults() (Config, error) {
	c.QEMU = orDefault(c.QEMU, DefaultQEMU)
	c.Firmware = orDefault(c.Firmware, DefaultFirmware)
	c.Accel = orDefault(c.Accel, TCG)
	c.MemoryMiB = orDefault(c.MemoryMiB, DefaultMemoryMiB)
	c.MaxMemoryMiB = max(c.MaxMemoryMiB, c.MemoryMiB)
	c.CPUs = orDefault(c.CPUs, 1)
	c.MaxCPUs = max(c.MaxCPUs, c.CPUs)
	c.ScratchBytes = orDefault(c.ScratchBytes, DefaultScratchBytes)
	c.BootTimeout = orDefault(c.BootTimeout, DefaultBootTimeout)
	switch {
	case c.Accel != TCG && c.Accel != KVM:
		return c, fmt.Errorf("unknown accelerator %q", c.Accel)
	case c.Kernel == "":
		return c, fmt.Errorf("%w: no kernel given", ErrKernel)
	case len(c.Initramfs) == 0:
		return c, fmt.Errorf("%w: empty initramfs", ErrKernel)
	case c.ReservedMiB < 0 || c.MemoryMiB-c.ReservedMiB < 64:
		return c, fmt.Errorf("%d MiB of guest memory are too little", c.MemoryMiB-c.ReservedMiB)
	case c.ScratchBytes > 0 && c.ScratchBytes%512 != 0:
		return c, fmt.Errorf("scratch size %d is not a multiple of 512", c.ScratchBytes)
	}
	return c, checkUser(c.UID, c.GID)
}

func checkUser(uid, gid uint32) error {
	if uid == 0 || gid == 0 {
		return fmt.Errorf("qemu must not run as uid %d gid %d", uid, gid)
	}
	return nil
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}
