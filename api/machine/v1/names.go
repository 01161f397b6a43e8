package machinev1

// Names that the controller, the agent, the shim and users share.
const (
	// Annotation of a pod is its Machine as JSON.
	Annotation = "atoll.dev/machine"
	// StateAnnotation of a pod is its State as JSON.
	StateAnnotation = "atoll.dev/machine-state"
	// AddressAnnotation of a pod is a key under which the host keeps the pod's address for the next pod with
	// the same key. The CNI plugin reads it. It is "vm-" and the uid of the VirtualMachine.
	AddressAnnotation = "atoll.dev/address-key"
	// NameLabel of a pod is the name of its VirtualMachine, UIDLabel its uid.
	NameLabel = "vmoperator.vmware.com/vm-name"
	UIDLabel  = "atoll.dev/vm-uid"

	// RuntimeClass and runtime handler of the pods of virtual machines.
	RuntimeClass = "atoll-vm"
	// Container is the name of the pod's only container. Its output is the serial console, exec goes to the
	// guest agent.
	Container = "vm"
	// Image of the container. It is part of Atoll and never pulled; there is nothing in it.
	Image = "atoll.dev/vm:latest"

	// BootVolume is the name of the pod's volume with the boot disk, a block device for the container at
	// BootDevice. Other disks come through attachments of their own.
	BootVolume = "boot"
	BootDevice = "/dev/boot"
	// SeedVolume is the name of the pod's volume with the files of the seed disk, mounted at SeedDir: a Secret
	// whose keys are file names, "__" in a key standing for a slash.
	SeedVolume = "seed"
	SeedDir    = "/seed"
)

// Placeholders in seed files are replaced by the shim, which alone knows the addresses of the pod. In a
// file, "@@ATOLL_IP4@@" becomes the first IPv4 address of the first network interface without its prefix length.
const (
	PlaceholderIP4   = "@@ATOLL_IP4@@"
	PlaceholderCIDR4 = "@@ATOLL_CIDR4@@" // the same with its prefix length
	// PlaceholderNetmask4 is that prefix length in dotted form.
	PlaceholderNetmask4 = "@@ATOLL_NETMASK4@@"
	PlaceholderGateway  = "@@ATOLL_GATEWAY4@@"
	PlaceholderMAC      = "@@ATOLL_MAC@@"
	PlaceholderDNS      = "@@ATOLL_DNS@@"    // name servers, separated by ", "
	PlaceholderSearch   = "@@ATOLL_SEARCH@@" // search domains, separated by ", "
	// PlaceholderNetplan becomes the whole network configuration (netplan, version 2) as one line of JSON, which
	// is YAML, too.
	PlaceholderNetplan = "@@ATOLL_NETPLAN@@"
)

// Commands that kubectl exec and the probes of a pod can run besides those of the guest itself. The shim
// answers them.
const (
	// CommandHeartbeat succeeds when the guest agent answers.
	CommandHeartbeat = "/atoll/heartbeat"
	// CommandGuestInfo takes pairs of a key and a regular expression and succeeds when the guest has set each key
	// to a value that matches.
	CommandGuestInfo = "/atoll/guestinfo"
	// CommandStream opens a console, as MethodStream does, over the standard streams of an exec; its argument is a
	// StreamKind. So consoles are reached through the API server, with its permissions (pods/exec).
	CommandStream = "/atoll/stream"
)

// Methods of the shim's control socket, called in the way of package internal/datadir/attach.
const (
	MethodApply = "machine.apply" // Machine to State; returns when the change has begun
	MethodState = "machine.state" // StateRequest to State; waits until it differs from what the caller has
	// MethodStream takes a StreamRequest; after an empty answer the connection carries the stream's bytes.
	MethodStream = "machine.stream"
)

// StateRequest asks for the state. It is answered at once when Seen is not the current revision, else when
// the state changes or after WaitMillis.
type StateRequest struct {
	Seen       int64 `json:"seen,omitempty"`
	WaitMillis int64 `json:"waitMillis,omitempty"`
}

// StreamKind is what a stream is of.
type StreamKind string

// The streams.
const (
	StreamVNC    StreamKind = "vnc"    // the RFB protocol
	StreamSerial StreamKind = "serial" // the first serial port; what it printed last comes first
)

// StreamRequest opens a console.
type StreamRequest struct {
	Kind StreamKind `json:"kind"`
}
