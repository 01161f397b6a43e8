// Package fields says what each field of the VM Operator API does here: it is honoured as VMware documents it, mapped to
// something that serves the same end, or accepted without an effect.
//
// The table is what the documentation is made of, and what the controllers look into to name fields without effect
// in a condition; a test holds it against the Go types, so that none is forgotten. A path ends at the first field whose
// fields all have the same effect. It does no I/O and cannot fail.
package fields

import (
	"fmt"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
)

// Effect is what a field does.
type Effect string

// The effects.
const (
	Honoured Effect = "honoured"
	Mapped   Effect = "mapped"
	None     Effect = "accepted without effect"
)

// Field is one field, or several with a common path.
type Field struct {
	// Path in the style of spec.network.interfaces[].name.
	Path   string
	Effect Effect
	// Note says to what it is mapped, or why it has no effect.
	Note string
	// Set tells whether a VirtualMachine sets it, in fields without effect.
	set func(*vmopv1.VirtualMachineSpec) bool
}

// Kind is the fields of one kind.
type Kind struct {
	Name   string
	Fields []Field
}

// Kinds are the kinds that this package's table has, in the order of the documentation.
func Kinds() []Kind {
	return append([]Kind{
		{Name: "VirtualMachine", Fields: VirtualMachine()},
		{Name: "VirtualMachineClass, VirtualMachineClassInstance", Fields: VirtualMachineClass()},
		{Name: "VirtualMachineSetResourcePolicy", Fields: VirtualMachineSetResourcePolicy()},
	}, others()...)
}

// WithoutEffect are the fields that a VirtualMachine sets in vain, each with the reason.
func WithoutEffect(vm *vmopv1.VirtualMachine) []string {
	var out []string
	for _, f := range VirtualMachine() {
		if f.set != nil && f.set(&vm.Spec) {
			out = append(out, fmt.Sprintf("%s (%s)", f.Path, f.Note))
		}
	}
	return out
}

// VirtualMachine is the table of VirtualMachine.spec, v1alpha5.
func VirtualMachine() []Field {
	return slices.Concat(identity(), power(), boot(), volumes(), hardware(), network(), bootstrap(), probes())
}

func identity() []Field {
	return []Field{
		{Path: "spec.image", Effect: Honoured, Note: "the boot disk is a copy-on-write layer over the image"},
		{Path: "spec.imageName", Effect: Honoured, Note: "object name or display name; fills spec.image"},
		{Path: "spec.className", Effect: Honoured, Note: "another class resizes the machine, while it runs where the guest can"},
		{Path: "spec.class", Effect: Honoured, Note: "a VirtualMachineClassInstance"},
		{Path: "spec.affinity", Effect: Mapped, Note: "affinity and anti-affinity of the machine's pod; terms select labels of VirtualMachines"},
		{Path: "spec.crypto.encryptionClassName", Effect: Mapped, Note: "LUKS encryption of the boot disk with the keys of the EncryptionClass"},
		// The API server sets true when it is empty, so that nobody need have asked for it.
		{Path: "spec.crypto.useDefaultKeyProvider", Effect: None, Note: "there is no default key provider: name spec.crypto.encryptionClassName"},
		{Path: "spec.crypto.vTPMMode", Effect: Mapped, Note: "spec.crypto gives the machine a TPM of its own (swtpm); Clone is as New"},
		{Path: "spec.storageClass", Effect: Honoured, Note: "of the boot disk, discs and saved memory; the default StorageClass when empty"},
		{Path: "spec.biosUUID", Effect: Honoured, Note: "the UUID in the DMI tables of the guest"},
		{Path: "spec.instanceUUID", Effect: Honoured, Note: "kept; the guest does not see it"},
		{Path: "spec.guestID", Effect: Mapped, Note: "a hint of the guest's system"},
		{Path: "spec.minHardwareVersion", Effect: Mapped, Note: "reported, and never lowered; the hardware is the same for all versions"},
		{Path: "spec.reserved.resourcePolicyName", Effect: Honoured, Note: "the policy must exist"},
		{Path: "spec.groupName", Effect: Honoured, Note: "see VirtualMachineGroup; a new machine without a powerState waits, powered off, for its turn in a group that has one"},
		{Path: "spec.policies", Effect: None, Note: "there are no compute policies", set: func(s *vmopv1.VirtualMachineSpec) bool { return len(s.Policies) > 0 }},
	}
}

func power() []Field {
	return []Field{
		{Path: "spec.powerState", Effect: Honoured, Note: "a machine that is powered on is a pod of its name"},
		{Path: "spec.powerOffMode", Effect: Honoured, Note: "TrySoft waits five minutes, or the seconds in annotation atoll.dev/soft-power-off-seconds"},
		{Path: "spec.suspendMode", Effect: Mapped, Note: "the memory is saved to a volume in all modes; before that, Soft and TrySoft have the guest agent write out the file systems, and without an answer Soft fails"},
		{Path: "spec.nextRestartTime", Effect: Honoured, Note: "only now"},
		{Path: "spec.restartMode", Effect: Honoured},
		{Path: "spec.currentSnapshotName", Effect: Honoured, Note: "goes back to the snapshot"},
	}
}

func boot() []Field {
	return []Field{
		{Path: "spec.bootOptions.firmware", Effect: Honoured, Note: "SeaBIOS or OVMF"},
		{Path: "spec.bootOptions.bootDelay", Effect: Honoured, Note: "with a boot menu"},
		{Path: "spec.bootOptions.bootOrder", Effect: Honoured, Note: "a disk without a name is the boot disk; a network is booted from with PXE"},
		{Path: "spec.bootOptions.bootRetry", Effect: None, Note: "firmware tries again for as long as there is nothing to boot", set: func(s *vmopv1.VirtualMachineSpec) bool {
			return s.BootOptions != nil && s.BootOptions.BootRetry == vmopv1.VirtualMachineBootOptionsBootRetryEnabled
		}},
		{Path: "spec.bootOptions.bootRetryDelay", Effect: None, Note: "see bootRetry", set: func(s *vmopv1.VirtualMachineSpec) bool {
			return s.BootOptions != nil && s.BootOptions.BootRetryDelay != nil
		}},
		{Path: "spec.bootOptions.efiSecureBoot", Effect: Honoured, Note: "with firmware efi"},
		{Path: "spec.bootOptions.networkBootProtocol", Effect: None, Note: "firmware tries IPv4, then IPv6", set: func(s *vmopv1.VirtualMachineSpec) bool {
			return s.BootOptions != nil && s.BootOptions.NetworkBootProtocol == vmopv1.VirtualMachineBootOptionsNetworkBootProtocolIP6
		}},
		{Path: "spec.advanced.bootDiskCapacity", Effect: Honoured, Note: "grows while the machine runs, never shrinks"},
		{Path: "spec.advanced.defaultVolumeProvisioningMode", Effect: None, Note: "volumes are always thin", set: func(s *vmopv1.VirtualMachineSpec) bool {
			return s.Advanced != nil && s.Advanced.DefaultVolumeProvisioningMode != "" && s.Advanced.DefaultVolumeProvisioningMode != vmopv1.VolumeProvisioningModeThin
		}},
		{Path: "spec.advanced.changeBlockTracking", Effect: None, Note: "changed blocks are not tracked yet", set: func(s *vmopv1.VirtualMachineSpec) bool {
			return s.Advanced != nil && s.Advanced.ChangeBlockTracking != nil && *s.Advanced.ChangeBlockTracking
		}},
		// The API server sets Online when it is empty, so that nobody need have asked for it.
		{Path: "spec.promoteDisksMode", Effect: None, Note: "a boot disk stays a layer over its image", set: func(s *vmopv1.VirtualMachineSpec) bool {
			return s.PromoteDisksMode == vmopv1.VirtualMachinePromoteDisksModeOffline
		}},
	}
}

func volumes() []Field {
	anyVolume := func(is func(*vmopv1.VirtualMachineVolume) bool) func(*vmopv1.VirtualMachineSpec) bool {
		return func(s *vmopv1.VirtualMachineSpec) bool {
			return slices.ContainsFunc(s.Volumes, func(v vmopv1.VirtualMachineVolume) bool { return is(&v) })
		}
	}
	return []Field{
		{Path: "spec.volumes[].name", Effect: Honoured},
		{Path: "spec.volumes[].persistentVolumeClaim.claimName", Effect: Honoured, Note: "attached and detached while the machine runs; the claim is of any volumeMode"},
		{Path: "spec.volumes[].persistentVolumeClaim.readOnly", Effect: Honoured},
		{Path: "spec.volumes[].persistentVolumeClaim.instanceVolumeClaim", Effect: Mapped, Note: "the claim is made, and deleted with the machine"},
		{Path: "spec.volumes[].removable", Effect: None, Note: "every volume can be removed", set: anyVolume(func(v *vmopv1.VirtualMachineVolume) bool { return v.Removable != nil && !*v.Removable })},
		{Path: "spec.volumes[].applicationType", Effect: Mapped, Note: "sets diskMode and sharingMode"},
		{Path: "spec.volumes[].controllerBusNumber", Effect: Honoured},
		{Path: "spec.volumes[].controllerType", Effect: Honoured, Note: "SCSI and NVMe disks are attached while the machine runs, SATA and IDE at the next start"},
		{Path: "spec.volumes[].diskMode", Effect: Mapped, Note: "the non-persistent modes forget what was written when the machine is powered off; the independent ones are not in snapshots"},
		{Path: "spec.volumes[].sharingMode", Effect: Honoured, Note: "MultiWriter needs a ReadWriteMany claim"},
		{Path: "spec.volumes[].unitNumber", Effect: Honoured},
	}
}

func hardware() []Field {
	shared := func(s *vmopv1.VirtualMachineSpec) bool {
		if s.Hardware == nil {
			return false
		}
		is := func(m vmopv1.VirtualControllerSharingMode) bool {
			return m != "" && m != vmopv1.VirtualControllerSharingModeNone
		}
		return slices.ContainsFunc(s.Hardware.SCSIControllers, func(c vmopv1.SCSIControllerSpec) bool { return is(c.SharingMode) }) ||
			slices.ContainsFunc(s.Hardware.NVMEControllers, func(c vmopv1.NVMEControllerSpec) bool { return is(c.SharingMode) })
	}
	return []Field{
		{Path: "spec.hardware.cdrom[].name", Effect: Honoured},
		{Path: "spec.hardware.cdrom[].image", Effect: Honoured, Note: "an image of type ISO, by the name of its object; another is put in while the machine runs"},
		{Path: "spec.hardware.cdrom[].controllerBusNumber", Effect: Honoured},
		{Path: "spec.hardware.cdrom[].controllerType", Effect: Honoured, Note: "SATA when empty"},
		{Path: "spec.hardware.cdrom[].unitNumber", Effect: Honoured},
		{Path: "spec.hardware.cdrom[].connected", Effect: Honoured},
		{Path: "spec.hardware.cdrom[].allowGuestControl", Effect: None, Note: "the guest can always eject the disc", set: func(s *vmopv1.VirtualMachineSpec) bool {
			return s.Hardware != nil && slices.ContainsFunc(s.Hardware.Cdrom, func(c vmopv1.VirtualMachineCdromSpec) bool {
				return c.AllowGuestControl != nil && !*c.AllowGuestControl
			})
		}},
		{Path: "spec.hardware.ideControllers", Effect: Honoured},
		{Path: "spec.hardware.nvmeControllers[].busNumber", Effect: Honoured},
		{Path: "spec.hardware.nvmeControllers[].sharingMode", Effect: None, Note: "controllers are not shared; use sharingMode of a volume", set: shared},
		{Path: "spec.hardware.sataControllers", Effect: Honoured},
		{Path: "spec.hardware.scsiControllers[].busNumber", Effect: Honoured},
		{Path: "spec.hardware.scsiControllers[].sharingMode", Effect: None, Note: "see nvmeControllers"},
		{Path: "spec.hardware.scsiControllers[].type", Effect: Mapped, Note: "all types are virtio-scsi"},
	}
}

func network() []Field {
	return []Field{
		{Path: "spec.network.hostName", Effect: Honoured},
		{Path: "spec.network.domainName", Effect: Honoured},
		{Path: "spec.network.disabled", Effect: Honoured, Note: "no interface"},
		{Path: "spec.network.nameservers", Effect: Honoured},
		{Path: "spec.network.searchDomains", Effect: Honoured},
		{Path: "spec.network.interfaces[].name", Effect: Honoured},
		{Path: "spec.network.interfaces[].network", Effect: Honoured, Note: "a Network of netoperator.vmware.com; without one, the pod network"},
		{Path: "spec.network.interfaces[].guestDeviceName", Effect: Honoured, Note: "by bootstrap"},
		{Path: "spec.network.interfaces[].macAddr", Effect: Honoured},
		{Path: "spec.network.interfaces[].addresses", Effect: Mapped, Note: "on a bridge; the pod network assigns its own"},
		{Path: "spec.network.interfaces[].dhcp4", Effect: Honoured},
		{Path: "spec.network.interfaces[].dhcp6", Effect: Honoured, Note: "on a bridge"},
		{Path: "spec.network.interfaces[].gateway4", Effect: Mapped, Note: "see addresses"},
		{Path: "spec.network.interfaces[].gateway6", Effect: Mapped, Note: "see addresses"},
		{Path: "spec.network.interfaces[].mtu", Effect: Honoured},
		{Path: "spec.network.interfaces[].nameservers", Effect: Honoured},
		{Path: "spec.network.interfaces[].routes", Effect: Honoured},
		{Path: "spec.network.interfaces[].searchDomains", Effect: Honoured},
	}
}

func probes() []Field {
	return []Field{
		{Path: "spec.readinessProbe.tcpSocket", Effect: Mapped, Note: "the pod's readiness probe; it goes to the machine's own address, and another host is refused"},
		{Path: "spec.readinessProbe.guestHeartbeat", Effect: Mapped, Note: "the guest agent answers; thresholdStatus makes no difference"},
		{Path: "spec.readinessProbe.guestInfo", Effect: Mapped, Note: "asked through the guest agent"},
		{Path: "spec.readinessProbe.timeoutSeconds", Effect: Honoured},
		{Path: "spec.readinessProbe.periodSeconds", Effect: Honoured},
	}
}

// VirtualMachineClass is the table of VirtualMachineClass.spec, which is that of VirtualMachineClassInstance, too.
func VirtualMachineClass() []Field {
	return []Field{
		{Path: "spec.controllerName", Effect: None, Note: "there is one controller"},
		{Path: "spec.description", Effect: Honoured, Note: "for people"},
		{Path: "spec.hardware.cpus", Effect: Honoured},
		{Path: "spec.hardware.memory", Effect: Honoured},
		{Path: "spec.hardware.devices", Effect: None, Note: "no devices of the host are passed on"},
		{Path: "spec.hardware.instanceStorage", Effect: None, Note: "name volumes in the VirtualMachine"},
		{Path: "spec.policies.resources.requests.cpu", Effect: Mapped, Note: "the CPU request of the pod; more than spec.hardware.cpus is read as MHz, 2000 for one CPU"},
		{Path: "spec.policies.resources.requests.memory", Effect: Mapped, Note: "reported; the pod always requests all memory of the machine"},
		{Path: "spec.policies.resources.limits.cpu", Effect: Mapped, Note: "the CPU limit of the pod, read like the request"},
		{Path: "spec.policies.resources.limits.memory", Effect: None, Note: "the limit is the memory of the machine"},
		{Path: "spec.configSpec", Effect: Mapped, Note: "numCPUs, memoryMB, numCoresPerSocket, firmware, nestedHVEnabled, cpuHotAddEnabled, memoryHotAddEnabled, latencySensitivity, cpuAllocation, memoryAllocation, VirtualTPM, 1 GiB pages, and in extraConfig the key atoll.dev/cpu-model: host, or a model of QEMU's; without it a baseline that machines can be moved with"},
		{Path: "spec.reservedProfileID", Effect: None, Note: "there are no reservation profiles"},
		{Path: "spec.reservedSlots", Effect: None, Note: "there are no reservation profiles"},
	}
}

// VirtualMachineSetResourcePolicy is the table of VirtualMachineSetResourcePolicy.spec.
func VirtualMachineSetResourcePolicy() []Field {
	return []Field{
		{Path: "spec.folder", Effect: None, Note: "there are no folders"},
		{Path: "spec.resourcePool.name", Effect: Mapped, Note: "reported with an id of its own"},
		{Path: "spec.resourcePool.reservations", Effect: None, Note: "use the namespace's ResourceQuota"},
		{Path: "spec.resourcePool.limits", Effect: None, Note: "use the namespace's ResourceQuota"},
		{Path: "spec.clusterModuleGroups", Effect: Mapped, Note: "reported with ids of their own; machines of one group (annotation vsphere-cluster-module-group) prefer different nodes"},
	}
}
