package machinev1

// Machine is what a virtual machine is to be.
type Machine struct {
	// Name, Namespace and UID are those of the VirtualMachine.
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	UID       string `json:"uid"`
	// Revision grows with every change of a Machine that is applied while it runs; State.Applied echoes it.
	Revision int64 `json:"revision,omitempty"`

	// BIOSUUID is the DMI product UUID, InstanceUUID is for the management only. Both are in the usual form.
	BIOSUUID     string `json:"biosUUID"`
	InstanceUUID string `json:"instanceUUID,omitempty"`
	// GuestID is a hint of what system it runs, in VMware's names.
	GuestID string `json:"guestID,omitempty"`

	CPU      CPU      `json:"cpu"`
	Memory   Memory   `json:"memory"`
	Firmware Firmware `json:"firmware"`
	// BootOrder are names of disks and network interfaces, first to last. Empty is the order of Disks.
	BootOrder []string `json:"bootOrder,omitempty"`
	Disks     []Disk   `json:"disks"`
	// Awaiting are names of disks that are not in Disks yet, since their volumes are still being attached to the
	// host. A machine is not started before the list is empty, so that it boots with all its disks; the rest comes
	// by an Apply. It is of no meaning to a machine that runs.
	Awaiting []string `json:"awaiting,omitempty"`
	NICs     []NIC    `json:"nics,omitempty"`
	Seed     *Seed    `json:"seed,omitempty"`
	// Hostname of the guest, Domain its domain; the shim writes them into the seed's network configuration.
	Hostname string `json:"hostname,omitempty"`
	Domain   string `json:"domain,omitempty"`

	// Stop says how the machine ends when its pod is deleted.
	Stop Stop `json:"stop"`
	// KeepCrashed leaves a guest whose kernel has crashed as it is. Else the machine ends, unless it goes on by itself.
	KeepCrashed bool `json:"keepCrashed,omitempty"`
	// Restore is the memory that the machine goes on from, instead of booting.
	Restore *MemoryState `json:"restore,omitempty"`
	// Operations are done once each, in order. The controller removes one when State says that it is finished.
	Operations []Operation `json:"operations,omitempty"`
}

// CPU is the processors of a machine. More can be added while it runs, up to Max.
type CPU struct {
	Count int `json:"count"`
	Max   int `json:"max,omitempty"` // default Count
	// CoresPerSocket, default Count in one socket.
	CoresPerSocket int `json:"coresPerSocket,omitempty"`
	// Model is one of QEMU's, or "host", all that the host has. Empty is a baseline that many hosts have, chosen by the
	// host at each power-on; under TCG all that QEMU emulates.
	Model string `json:"model,omitempty"`
	// Nested makes hardware virtualisation available in the guest.
	Nested bool `json:"nested,omitempty"`
	// Pinned gives each processor one of the host's.
	Pinned bool `json:"pinned,omitempty"`
}

// Memory of a machine, in bytes. More can be added while it runs, up to Max.
type Memory struct {
	Bytes int64 `json:"bytes"`
	Max   int64 `json:"max,omitempty"` // default Bytes
	// HugePageBytes is 2 MiB, 1 GiB, or 0 for none.
	HugePageBytes int64 `json:"hugePageBytes,omitempty"`
}

// FirmwareType is what starts the machine.
type FirmwareType string

// The firmware types.
const (
	BIOS FirmwareType = "bios"
	EFI  FirmwareType = "efi"
)

// Firmware of a machine. Its variables and the state of its TPM are kept on the host for the life of the
// VirtualMachine.
type Firmware struct {
	Type       FirmwareType `json:"type"`
	SecureBoot bool         `json:"secureBoot,omitempty"` // EFI only
	TPM        bool         `json:"tpm,omitempty"`
	// BootDelayMillis waits before the boot, with a menu; EnterSetup opens the firmware's setup once.
	BootDelayMillis int64 `json:"bootDelayMillis,omitempty"`
	EnterSetup      bool  `json:"enterSetup,omitempty"`
	NetworkBoot     bool  `json:"networkBoot,omitempty"`
}

// Bus is what a disk is connected to.
type Bus string

// The buses.
const (
	SCSI Bus = "scsi" // virtio-scsi
	NVMe Bus = "nvme"
	SATA Bus = "sata"
	IDE  Bus = "ide"
)

// Disk is one disk or CD-ROM of a machine. Disks can be added and taken away while it runs, but on IDE and SATA.
type Disk struct {
	// Name is unique in the machine, 1 to 63 characters of a DNS label.
	Name string `json:"name"`
	// Volume is the CSI volume handle, which the agent opens. Empty is a CD-ROM drive without a disc.
	Volume string `json:"volume,omitempty"`
	Bus    Bus    `json:"bus"`
	// Controller and Unit are the place on the bus; both must be unique.
	Controller int  `json:"controller"`
	Unit       int  `json:"unit"`
	CDROM      bool `json:"cdrom,omitempty"`
	ReadOnly   bool `json:"readOnly,omitempty"`
	// Shared: other machines may have it open for writing at the same time.
	Shared bool `json:"shared,omitempty"`
	// NonPersistent: what the guest writes is gone when the machine is powered off.
	NonPersistent bool `json:"nonPersistent,omitempty"`
	// UUID names the disk to the guest: serial number, and the WWN is made of it.
	UUID string `json:"uuid"`
}

// NIC is one network interface of a machine.
type NIC struct {
	Name string `json:"name"` // eth0
	// Model is a QEMU device: virtio-net-pci, e1000e, e1000, vmxnet3, pcnet.
	Model string `json:"model"`
	MAC   string `json:"mac"`
	// Pod: the interface is the pod's own, with the pod's address. Else it is on Bridge, a bridge of the host, in VLAN
	// (0 is untagged).
	Pod    bool   `json:"pod,omitempty"`
	Bridge string `json:"bridge,omitempty"`
	VLAN   int    `json:"vlan,omitempty"`
	// GuestDevice is the name the interface is to have in the guest.
	GuestDevice string `json:"guestDevice,omitempty"`
	// Addresses with prefix length. Of the pod's own interface the shim knows them.
	Addresses   []string `json:"addresses,omitempty"`
	Gateway4    string   `json:"gateway4,omitempty"`
	Gateway6    string   `json:"gateway6,omitempty"`
	DHCP4       bool     `json:"dhcp4,omitempty"`
	DHCP6       bool     `json:"dhcp6,omitempty"`
	MTU         int      `json:"mtu,omitempty"`
	Nameservers []string `json:"nameservers,omitempty"`
	Search      []string `json:"search,omitempty"`
	Routes      []Route  `json:"routes,omitempty"`
}

// Route is a static route of a guest.
type Route struct {
	To     string `json:"to"`
	Via    string `json:"via"`
	Metric int    `json:"metric,omitempty"`
}

// Seed is a read-only ISO 9660 disk that the shim makes of the files below SeedDir.
type Seed struct {
	// Label of the file system: cidata for cloud-init's NoCloud, OVF-ENV, or any other.
	Label string `json:"label"`
}

// StopMode is how a machine is powered off.
type StopMode string

// The stop modes.
const (
	Hard    StopMode = "Hard"    // as if the power was cut
	Soft    StopMode = "Soft"    // the guest is asked, and nothing else is done
	TrySoft StopMode = "TrySoft" // the guest is asked, and after the timeout the power is cut
)

// Stop is how the machine ends. TimeoutSeconds is for TrySoft; the pod's grace period is longer than that.
type Stop struct {
	Mode           StopMode `json:"mode"`
	TimeoutSeconds int      `json:"timeoutSeconds,omitempty"`
}

// MemoryState is where the memory of a machine is kept: in a volume that is attached for this alone.
type MemoryState struct {
	// Volume is the CSI volume handle of a raw block volume.
	Volume string `json:"volume"`
}

// OperationKind is what is done to a running machine.
type OperationKind string

// The operations.
const (
	// Reset restarts the guest: Mode Hard like a reset button, Soft and TrySoft by asking the guest.
	Reset OperationKind = "Reset"
	// Suspend saves the memory into Memory and ends the machine.
	Suspend OperationKind = "Suspend"
	// Snapshot makes snapshots of all persistent disks at one moment, with the memory into Memory if that is set.
	Snapshot OperationKind = "Snapshot"
	// EjectDisc and the like are changes of Disks, not operations.
)

// Operation is one thing to do once.
type Operation struct {
	ID   string        `json:"id"`
	Kind OperationKind `json:"kind"`
	Mode StopMode      `json:"mode,omitempty"` // of Reset and Suspend; one without is Hard
	// Memory is the volume for the memory, of Suspend and Snapshot.
	Memory *MemoryState `json:"memory,omitempty"`
	// Quiesce has the guest agent freeze the file systems, for at most QuiesceSeconds.
	Quiesce        bool `json:"quiesce,omitempty"`
	QuiesceSeconds int  `json:"quiesceSeconds,omitempty"`
	// Snapshots are the ids that the snapshots of disks get, by the names of the disks.
	Snapshots map[string]string `json:"snapshots,omitempty"`
}
