// Package machine makes the Machine of a VirtualMachine: what a host is told about it.
//
// It is pure: everything that has to be looked up is in Inputs. The controller calls Build at each look at a
// VirtualMachine, and Merge to find out what of it a running machine can be told. Names of disks are those of the
// volumes, "boot" for the boot disk and "cdrom-NAME" for a drive.
//
// What can go wrong: nothing here; what a host cannot do is in the Pending of its State, and of Merge.
package machine

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/utils/ptr"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/placement"
	"atoll.dev/atoll/internal/controllers/virtualmachine/size"
)

// SoftSecondsAnnotation of a VirtualMachine is how many seconds a guest has to power off before TrySoft cuts the
// power. The default is VM Operator's five minutes.
const SoftSecondsAnnotation = "atoll.dev/soft-power-off-seconds"

// CrashAnnotation of a VirtualMachine says what becomes of a guest whose kernel has crashed and that does not restart
// itself: CrashRestart, the default, or CrashKeep, for those who want to look at it.
const (
	CrashAnnotation = "atoll.dev/guest-crash"
	CrashRestart    = "Restart"
	CrashKeep       = "Keep"
)

const (
	defaultSoftSeconds = 300
	maxSoftSeconds     = 24 * 3600
	// BootDisk is the name of the boot disk.
	BootDisk    = "boot"
	cdromPrefix = "cdrom-"
	otherPrefix = "volume-"
)

// Inputs are what a Machine is made of.
type Inputs struct {
	VM   *vmopv1.VirtualMachine
	Size size.Size
	// Firmware is the image's wish.
	Firmware string
	// Disks in the order of booting, made by the functions below.
	Disks []machinev1.Disk
	// Awaiting are disks that are not in Disks yet.
	Awaiting []string
	NICs     []machinev1.NIC
	// SeedLabel is the label of the seed disk, empty for none.
	SeedLabel string
	Restore   *machinev1.MemoryState
}

// Build makes a Machine. Its Revision and Operations are zero, see Merge.
func Build(in Inputs) machinev1.Machine {
	vm := in.VM
	m := machinev1.Machine{
		Name: vm.Name, Namespace: vm.Namespace, UID: string(vm.UID),
		BIOSUUID: strings.ToLower(vm.Spec.BiosUUID), InstanceUUID: strings.ToLower(vm.Spec.InstanceUUID), GuestID: vm.Spec.GuestID,
		CPU:      machinev1.CPU{Count: in.Size.CPUs, Max: in.Size.MaxCPUs, CoresPerSocket: in.Size.CoresPerSocket, Model: in.Size.CPUModel, Nested: in.Size.Nested, Pinned: in.Size.Pinned},
		Memory:   machinev1.Memory{Bytes: in.Size.Memory, Max: in.Size.MaxMemory, HugePageBytes: in.Size.HugePageBytes},
		Firmware: firmware(in),
		Disks:    slices.Clone(in.Disks),
		Awaiting: in.Awaiting,
		NICs:     in.NICs,
		Hostname: Hostname(vm),
		Stop:     Stop(vm),
		Restore:  in.Restore,

		KeepCrashed: vm.Annotations[CrashAnnotation] == CrashKeep,
	}
	if m.Disks == nil {
		m.Disks = []machinev1.Disk{}
	}
	if n := vm.Spec.Network; n != nil {
		m.Domain = n.DomainName
	}
	if in.SeedLabel != "" {
		m.Seed = &machinev1.Seed{Label: in.SeedLabel}
	}
	m.BootOrder = bootOrder(vm, m)
	return m
}

// Hostname is the guest's.
func Hostname(vm *vmopv1.VirtualMachine) string {
	if n := vm.Spec.Network; n != nil && n.HostName != "" {
		return n.HostName
	}
	return vm.Name
}

// Stop is how the machine is powered off.
func Stop(vm *vmopv1.VirtualMachine) machinev1.Stop {
	stop := machinev1.Stop{Mode: Mode(vm.Spec.PowerOffMode)}
	if stop.Mode == machinev1.TrySoft {
		stop.TimeoutSeconds = defaultSoftSeconds
		if n, err := strconv.Atoi(vm.Annotations[SoftSecondsAnnotation]); err == nil && n > 0 {
			stop.TimeoutSeconds = min(n, maxSoftSeconds)
		}
	}
	return stop
}

// Mode is a mode of VM Operator in the contract's words.
func Mode(m vmopv1.VirtualMachinePowerOpMode) machinev1.StopMode {
	switch m {
	case vmopv1.VirtualMachinePowerOpModeHard:
		return machinev1.Hard
	case vmopv1.VirtualMachinePowerOpModeSoft:
		return machinev1.Soft
	}
	return machinev1.TrySoft
}

func firmware(in Inputs) machinev1.Firmware {
	f := machinev1.Firmware{Type: machinev1.BIOS, TPM: in.Size.TPM || in.VM.Spec.Crypto != nil}
	for _, wish := range []string{in.Firmware, in.Size.Firmware} {
		if wish != "" {
			if strings.EqualFold(wish, "efi") || strings.EqualFold(wish, "uefi") {
				f.Type = machinev1.EFI
			}
			break
		}
	}
	o := in.VM.Spec.BootOptions
	if o == nil {
		return f
	}
	switch o.Firmware {
	case vmopv1.VirtualMachineBootOptionsFirmwareTypeBIOS:
		f.Type = machinev1.BIOS
	case vmopv1.VirtualMachineBootOptionsFirmwareTypeEFI:
		f.Type = machinev1.EFI
	}
	f.SecureBoot = f.Type == machinev1.EFI && o.EFISecureBoot == vmopv1.VirtualMachineBootOptionsEFISecureBootEnabled
	if o.BootDelay != nil {
		f.BootDelayMillis = min(max(0, o.BootDelay.Milliseconds()), 3600*1000)
	}
	f.NetworkBoot = slices.ContainsFunc(o.BootOrder, func(d vmopv1.VirtualMachineBootOptionsBootableDevice) bool {
		return d.Type == vmopv1.VirtualMachineBootOptionsBootableNetworkDevice
	})
	return f
}

// bootOrder is what spec.bootOptions.bootOrder names, as far as the machine has it.
func bootOrder(vm *vmopv1.VirtualMachine, m machinev1.Machine) []string {
	if vm.Spec.BootOptions == nil {
		return nil
	}
	var out []string
	add := func(name string) {
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	for _, d := range vm.Spec.BootOptions.BootOrder {
		switch d.Type {
		case vmopv1.VirtualMachineBootOptionsBootableDiskDevice:
			for _, disk := range m.Disks {
				if !disk.CDROM && (d.Name == "" || disk.Name == VolumeDisk(d.Name) || disk.Name == d.Name) {
					add(disk.Name)
				}
			}
		case vmopv1.VirtualMachineBootOptionsBootableCDRomDevice:
			for _, disk := range m.Disks {
				if disk.CDROM && (d.Name == "" || disk.Name == CDROMDisk(d.Name)) {
					add(disk.Name)
				}
			}
		case vmopv1.VirtualMachineBootOptionsBootableNetworkDevice:
			for _, nic := range m.NICs {
				if d.Name == "" || nic.Name == d.Name {
					add(nic.Name)
				}
			}
		}
	}
	return out
}

// VolumeDisk is the name of the disk of a volume.
func VolumeDisk(volume string) string {
	if volume == BootDisk || strings.HasPrefix(volume, cdromPrefix) || strings.HasPrefix(volume, otherPrefix) || len(volume) > 63 {
		sum := fmt.Sprintf("%x", sha256.Sum256([]byte(volume)))[:8]
		return strings.TrimRight((otherPrefix + volume)[:min(len(otherPrefix+volume), 54)], "-.") + "-" + sum
	}
	return volume
}

// CDROMDisk is the name of the disk of a drive.
func CDROMDisk(name string) string { return cdromPrefix + name }

// Boot is the boot disk.
func Boot(volume, id string, at placement.Slot) machinev1.Disk {
	return place(machinev1.Disk{Name: BootDisk, Volume: volume, UUID: id}, at)
}

// Volume is the disk of spec.volumes[].
func Volume(v *vmopv1.VirtualMachineVolume, handle, id string) machinev1.Disk {
	d := machinev1.Disk{
		Name: VolumeDisk(v.Name), Volume: handle, UUID: id,
		Shared:        v.SharingMode == vmopv1.VolumeSharingModeMultiWriter,
		NonPersistent: v.DiskMode == vmopv1.VolumeDiskModeNonPersistent || v.DiskMode == vmopv1.VolumeDiskModeIndependentNonPersistent,
	}
	if v.PersistentVolumeClaim != nil {
		d.ReadOnly = v.PersistentVolumeClaim.ReadOnly
	}
	return place(d, placement.Slot{Type: v.ControllerType, Bus: ptr.Deref(v.ControllerBusNumber, 0), Unit: ptr.Deref(v.UnitNumber, 0)})
}

// CDROM is the drive of spec.hardware.cdrom[], without a disc when handle is empty.
func CDROM(vm *vmopv1.VirtualMachine, c *vmopv1.VirtualMachineCdromSpec, handle string) machinev1.Disk {
	d := machinev1.Disk{Name: CDROMDisk(c.Name), Volume: handle, CDROM: true, ReadOnly: true, UUID: DiskUUID(string(vm.UID), CDROMDisk(c.Name))}
	return place(d, placement.Slot{Type: c.ControllerType, Bus: ptr.Deref(c.ControllerBusNumber, 0), Unit: ptr.Deref(c.UnitNumber, 0)})
}

func place(d machinev1.Disk, at placement.Slot) machinev1.Disk {
	d.Controller, d.Unit = int(at.Bus), int(at.Unit)
	switch at.Type {
	case vmopv1.VirtualControllerTypeNVME:
		d.Bus = machinev1.NVMe
	case vmopv1.VirtualControllerTypeSATA:
		d.Bus = machinev1.SATA
	case vmopv1.VirtualControllerTypeIDE:
		d.Bus = machinev1.IDE
	default:
		d.Bus = machinev1.SCSI
	}
	return d
}

// DiskUUID is the same for the same parts: the UUID of a disk, by what it is made of.
func DiskUUID(parts ...string) string {
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte("atoll.dev/disk/"+strings.Join(parts, "/"))).String()
}

// MAC is the address of an interface that names none: always the same for the same machine and interface.
func MAC(vm *vmopv1.VirtualMachine, nic string) string {
	sum := sha256.Sum256([]byte("atoll.dev/mac/" + string(vm.UID) + "/" + nic))
	return fmt.Sprintf("02:%02x:%02x:%02x:%02x:%02x", sum[0], sum[1], sum[2], sum[3], sum[4])
}

// Merge is what a running machine is to be told: what is wanted, but for what can only change while it is powered off,
// which is named in words. Changed tells that the result differs from what the machine was told last.
func Merge(running, wanted machinev1.Machine) (merged machinev1.Machine, pending []string, changed bool) {
	merged = wanted
	merged.Operations, merged.Revision, merged.Restore, merged.Seed = running.Operations, running.Revision, running.Restore, running.Seed
	merged.CPU.Max, merged.Memory.Max = running.CPU.Max, running.Memory.Max
	keep := func(what string, same bool) bool {
		if !same {
			pending = append(pending, what)
		}
		return !same
	}
	switch {
	case wanted.CPU.Count < running.CPU.Count:
		keep(fmt.Sprintf("%d processors instead of %d, which cannot be taken away while the machine runs", wanted.CPU.Count, running.CPU.Count), false)
		merged.CPU.Count = running.CPU.Count
	case wanted.CPU.Count > running.CPU.Max:
		keep(fmt.Sprintf("%d processors, which is more than the %d that can be added while the machine runs", wanted.CPU.Count, running.CPU.Max), false)
		merged.CPU.Count = running.CPU.Count
	}
	switch {
	case wanted.Memory.Bytes < running.Memory.Bytes:
		keep("less memory, which cannot be taken away while the machine runs", false)
		merged.Memory.Bytes = running.Memory.Bytes
	case wanted.Memory.Bytes > running.Memory.Max:
		keep("more memory than can be added while the machine runs", false)
		merged.Memory.Bytes = running.Memory.Bytes
	}
	merged.Memory.HugePageBytes = running.Memory.HugePageBytes
	if merged.CPU.CoresPerSocket = running.CPU.CoresPerSocket; keep("other processor options", wanted.CPU.CoresPerSocket == running.CPU.CoresPerSocket &&
		wanted.CPU.Nested == running.CPU.Nested && wanted.CPU.Pinned == running.CPU.Pinned && wanted.CPU.Model == running.CPU.Model) {
		merged.CPU.Nested, merged.CPU.Pinned, merged.CPU.Model = running.CPU.Nested, running.CPU.Pinned, running.CPU.Model
	}
	if keep("other firmware options", wanted.Firmware == running.Firmware) {
		merged.Firmware = running.Firmware
	}
	// One that waits for disks has not booted, and its order is of those that it has.
	if len(running.Awaiting) == 0 && keep("another order of booting", slices.Equal(wanted.BootOrder, running.BootOrder)) {
		merged.BootOrder = running.BootOrder
	}
	if keep("another UUID", wanted.BIOSUUID == running.BIOSUUID) {
		merged.BIOSUUID = running.BIOSUUID
	}
	merged.BootOrder = slices.DeleteFunc(slices.Clone(merged.BootOrder), func(name string) bool {
		return !slices.ContainsFunc(merged.Disks, func(d machinev1.Disk) bool { return d.Name == name }) &&
			!slices.ContainsFunc(merged.NICs, func(n machinev1.NIC) bool { return n.Name == name })
	})
	if len(merged.BootOrder) == 0 {
		merged.BootOrder = nil
	}
	if changed = !same(merged, running); changed {
		merged.Revision = running.Revision + 1
	}
	return merged, pending, changed
}

// same compares what is written down of two machines, where a list that is missing and one that is empty are the same.
func same(a, b machinev1.Machine) bool {
	x, errA := json.Marshal(a)
	y, errB := json.Marshal(b)
	return errA == nil && errB == nil && bytes.Equal(x, y)
}
