// Package qemu starts QEMU processes: the inherited files, the privileges, and for micro-VMs the command
// line (Start). That is the fixed device layout that a template and its clones share; package vm knows what
// happens on QMP afterwards. Package hardware has a command line of its own (Spawn).
//
// A QEMU started here has an unprivileged user, no capabilities, QEMU's own seccomp filter, and
// gets everything it uses as an inherited file, so that it needs access to no path of the host but
// its own binary and firmware. For volumes in Ceph it loads its driver and uses the network of the host.
package qemu

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Descriptor numbers in the QEMU process. They are constant, so that the command line of all
// clones of a template is the same text.
const (
	fdQMP     = 3 + iota // monitor socket
	fdControl            // guest channel socket
	fdConsole            // serial console socket
	fdTap                // tap device
	fdRAM                // guest memory
	fdState              // device state of the template, to load
	fdScratch            // scratch disk image
	fdKernel             // kernel image
	fdInitrd             // initramfs
	fdCount
)

// Names in the device layout that QMP commands refer to.
const (
	ImageSlots    = 4                        // read-only virtio-blk disks whose backing can be swapped; each takes 0.4 MiB
	ScratchSerial = "scratch"                // virtio serial of the scratch disk
	ControlPort   = "atoll.ctl"              // name of the virtio-serial port
	SCSIBus       = "scsi.0"                 // bus of the overflow disks
	IncomingURI   = "fd:" + incomingFDNumber // argument of migrate-incoming in a clone

	incomingFDNumber = "8"

	// PlaceholderBytes is the size the guest sees of every image slot; an image must not be larger.
	PlaceholderBytes = 64 << 30
)

// SlotSerial is the virtio serial of image slot i, by which the guest finds it.
func SlotSerial(i int) string { return "img" + strconv.Itoa(i) }

// SlotDevice is the QOM path of the block device of slot i.
func SlotDevice(i int) string {
	return "/machine/peripheral/i" + strconv.Itoa(i) + "/virtio-backend"
}

// SlotEmptyNode is the block node that an unused slot i is backed by.
func SlotEmptyNode(i int) string { return "n" + strconv.Itoa(i) }

// Config describes one QEMU process. Files stay owned by the caller.
type Config struct {
	Binary   string // path of qemu-system-x86_64
	Firmware string // path or QEMU's own name of the firmware, "" for its default
	Accel    string // "tcg" or "kvm"

	MemoryMiB    int // guest memory at start
	MaxMemoryMiB int // with hot-added memory; not above MemoryMiB means no memory slots
	MemorySlots  int // how many times memory can be added
	CPUs         int // vCPUs at start
	MaxCPUs      int // with hot-added ones

	Kernel  *os.File // boots this kernel; nil for a clone
	Initrd  *os.File
	Cmdline string

	State  *os.File // waits for migrate-incoming of this file instead of booting
	Paused bool     // does not run before QMP cont

	RAM      *os.File // memory file of MemoryMiB; nil: private anonymous memory
	ShareRAM bool     // guest writes go to RAM; false: copy on write

	QMP, Control, Console *os.File // connected sockets
	Tap                   *os.File // tap with virtio-net headers; nil: no network device
	Scratch               *os.File // scratch image, opened for writing; nil: reads as zeroes
	ScratchBytes          int64    // size of the placeholder when Scratch is nil; 0: no scratch disk
}

// validate refuses what would make a command line that means something else.
func (c *Config) validate() error {
	switch {
	case c.Binary == "":
		return errors.New("no qemu binary")
	case c.Accel != "tcg" && c.Accel != "kvm":
		return fmt.Errorf("unknown accelerator %q", c.Accel)
	case c.MemoryMiB < 32 || c.CPUs < 1 || c.MaxCPUs < c.CPUs:
		return fmt.Errorf("%d MiB and %d of %d vCPUs make no machine", c.MemoryMiB, c.CPUs, c.MaxCPUs)
	case c.QMP == nil || c.Control == nil || c.Console == nil:
		return errors.New("monitor, control or console socket is missing")
	case strings.ContainsAny(c.Firmware, ",\n"):
		return fmt.Errorf("firmware path %q has a comma", c.Firmware)
	case c.Kernel != nil && c.State != nil:
		return errors.New("both a kernel to boot and a state to load")
	}
	return nil
}

// files is what the process inherits, by descriptor number.
func (c *Config) files() []*os.File {
	files := make([]*os.File, fdCount)
	files[fdQMP], files[fdControl], files[fdConsole] = c.QMP, c.Control, c.Console
	files[fdTap], files[fdRAM], files[fdState] = c.Tap, c.RAM, c.State
	files[fdScratch], files[fdKernel], files[fdInitrd] = c.Scratch, c.Kernel, c.Initrd
	return files
}

// args is the command line. Device order, ids and addresses are part of the template: both ends of
// a clone or migration must have the same.
func (c *Config) args() []string {
	a := []string{
		c.Binary,
		"-name", "atoll,process=atoll-vm",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "q35,memory-backend=ram,usb=off,vmport=off,smbus=off,sata=off,i8042=off," +
			"graphics=off,dump-guest-core=off",
	}
	a = append(a, c.accelArgs()...)
	a = append(a, c.memoryArgs()...)
	a = append(a, "-smp", fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=1,cores=%d,threads=1", c.CPUs, c.MaxCPUs, c.MaxCPUs))
	if c.Firmware != "" {
		a = append(a, "-bios", c.Firmware)
	}
	if c.Kernel != nil {
		a = append(a, "-kernel", selfFD(fdKernel), "-append", c.Cmdline)
		if c.Initrd != nil {
			a = append(a, "-initrd", selfFD(fdInitrd))
		}
	}
	if c.State != nil {
		a = append(a, "-incoming", "defer")
	}
	if c.Paused {
		a = append(a, "-S")
	}
	a = append(a,
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fdQMP),
		"-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=con,fd=%d", fdConsole),
		"-device", "isa-serial,chardev=con",
		"-device", "virtio-serial-pci,id=vs,disable-legacy=on,bus=pcie.0,addr=0x2,max_ports=2",
		"-chardev", fmt.Sprintf("socket,id=ctl,fd=%d", fdControl),
		"-device", "virtserialport,bus=vs.0,nr=1,chardev=ctl,name="+ControlPort,
	)
	if c.Tap != nil {
		a = append(a,
			"-netdev", fmt.Sprintf("tap,id=net,fd=%d", fdTap),
			"-device", "virtio-net-pci,netdev=net,mac=02:00:00:00:00:01,romfile=,disable-legacy=on,bus=pcie.0,addr=0x3"+NoControlQueue,
		)
	}
	return append(a, c.diskArgs()...)
}

// NoControlQueue leaves out the control queue of the network device and all that needs it. A driver
// spins while such a command is carried out, which was half of what a guest did to be set up. All it could
// ask for is a receive filter, and the tap carries nothing but the pod's own frames.
const NoControlQueue = ",ctrl_vq=off,ctrl_rx=off,ctrl_rx_extra=off,ctrl_vlan=off,ctrl_mac_addr=off," +
	"ctrl_guest_offloads=off,guest_announce=off,mq=off"

// accelArgs chooses accelerator and processor. Nested virtualisation is off: it is attack surface
// that no pod needs. la57 is off because a fifth page table level only costs; under emulation also
// erms and fsrm, with which the guest copies and clears memory byte by byte instead of eight at a time,
// and smap, which ends a block of translated code at every access to user memory. (Emulation is no
// security boundary of QEMU's to begin with.)
func (c *Config) accelArgs() []string {
	if c.Accel == "kvm" {
		return []string{"-accel", "kvm", "-cpu", "host," + NotNested + ",la57=off"}
	}
	return []string{"-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", TranslatedMiB), "-cpu", "max," + NotNested + "," + EmulatedCPU}
}

// TranslatedMiB is how much translated code an emulating QEMU keeps.
const TranslatedMiB = 128

// Options of a -cpu, see Config.accelArgs.
const (
	NotNested   = "vmx=off,svm=off"
	EmulatedCPU = "la57=off,erms=off,fsrm=off,smap=off"
)

func (c *Config) memoryArgs() []string {
	size := fmt.Sprintf("size=%dM", c.MemoryMiB)
	backend := "memory-backend-ram,id=ram," + size
	if c.RAM != nil {
		share := "off"
		if c.ShareRAM {
			share = "on"
		}
		backend = fmt.Sprintf("memory-backend-file,id=ram,%s,mem-path=%s,share=%s,reserve=off",
			size, selfFD(fdRAM), share)
	}
	if c.MaxMemoryMiB > c.MemoryMiB && c.MemorySlots > 0 {
		size += fmt.Sprintf(",slots=%d,maxmem=%dM", c.MemorySlots, c.MaxMemoryMiB)
	}
	return []string{"-object", backend, "-m", size}
}

// diskArgs puts all image slots as functions of one PCI slot, the scratch disk, and the SCSI
// controller for everything that needs more.
func (c *Config) diskArgs() []string {
	var a []string
	switch {
	case c.Scratch != nil:
		// The scratch disk dies with the machine, so a guest's flush needs not reach the platter.
		a = append(a,
			"-add-fd", fmt.Sprintf("fd=%d,set=1", fdScratch),
			"-blockdev", `{"driver":"file","node-name":"s","filename":"/dev/fdset/1","locking":"off","discard":"unmap","cache":{"no-flush":true}}`)
	case c.ScratchBytes > 0:
		a = append(a, "-blockdev",
			fmt.Sprintf(`{"driver":"null-co","node-name":"s","size":%d,"read-zeroes":true}`, c.ScratchBytes))
	}
	if len(a) > 0 {
		a = append(a, "-device",
			"virtio-blk-pci,id=scratch,drive=s,serial="+ScratchSerial+",num-queues=1,disable-legacy=on,bus=pcie.0,addr=0x4")
	}
	a = append(a, "-device", "virtio-scsi-pci,id=scsi,num_queues=1,disable-legacy=on,bus=pcie.0,addr=0x5")
	for i := range ImageSlots {
		a = append(a,
			"-blockdev", fmt.Sprintf(`{"driver":"null-co","node-name":%q,"size":%d,"read-only":true,"read-zeroes":true}`,
				SlotEmptyNode(i), PlaceholderBytes),
			"-device", fmt.Sprintf("virtio-blk-pci,id=i%d,drive=%s,serial=%s,num-queues=1,disable-legacy=on,bus=pcie.0,addr=0x6.%d,multifunction=on",
				i, SlotEmptyNode(i), SlotSerial(i), i))
	}
	return a
}

func selfFD(n int) string { return "/proc/self/fd/" + strconv.Itoa(n) }
