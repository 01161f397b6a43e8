// Package attach is what the agent and the shim daemons say to each other about persistent volumes: one JSON
// request and one answer per connection over unix sockets that only the administrator's processes may use.
//
// A shim asks the agent how to open a volume (MethodOpen at AgentSocket) each time a micro-VM is about to get
// it: layers may have been added since the last time, and the keys of an encrypted one are nowhere on disk. A
// shim that has volumes answers at a socket of its own, which the agent finds by the record of the volume
// (Records): what it takes, snapshot, growth, limits. The storage daemons of runc pods are driven by the agent
// itself and do not appear here.
//
// The package holds types, the wire and the records, and starts nothing by itself. internal/shim/disks and
// internal/storage/csi/node use it. What can go wrong: the other side is not there, does not know the volume
// (ErrNotFound), or says what went wrong (Error). Sizes are bounded on both sides.
package attach

import (
	"path/filepath"

	"atoll.dev/atoll/internal/datadir/handover"
)

// Methods of the agent.
const (
	// MethodOpen takes an OpenRequest and answers Opened.
	MethodOpen = "open"
	// MethodClose takes an OpenRequest and answers nothing: the shim of a virtual machine has closed the volume. It
	// is for volumes that are not published for the pod; of others the kubelet says when.
	MethodClose = "close"
	// MethodSnapshots takes a SnapshotsRequest and answers nothing. While it is answered, the shim is called with
	// MethodSnapshot for each volume. Idempotent.
	MethodSnapshots = "snapshots"
)

// Methods of a shim.
const (
	MethodStats    = "stats"    // VolumeRequest to Stats
	MethodStatus   = "status"   // VolumeRequest to Status
	MethodSnapshot = "snapshot" // SnapshotRequest; idempotent
	MethodResize   = "resize"   // ResizeRequest; makes the disk as large, idempotent
	MethodGrow     = "grow"     // ResizeRequest; makes the file system as large as the disk, idempotent
	MethodLimit    = "limit"    // LimitRequest
)

// Machine is what a Record has in the place of a volume for the shim of a virtual machine itself: by it the agent
// finds the shim's socket (Records), at which it also answers the methods of package machinev1.
func Machine(pod string) string { return "machine:" + pod }

// AgentSocket is the agent's socket in a run directory.
func AgentSocket(runDir string) string { return filepath.Join(runDir, "volumes.sock") }

// OpenRequest asks how to open a volume for a pod.
type OpenRequest struct {
	Volume string `json:"volume"` // CSI volume handle
	Pod    string `json:"pod"`    // uid
	// Machine is set by the shim of a virtual machine.
	Machine *MachineUse `json:"machine,omitempty"`
}

// MachineUse is what a virtual machine wants of a volume. Whether it may is found out from the machine's pod, see
// package internal/kube/machines.
type MachineUse struct {
	Namespace string `json:"namespace"` // of the pod
	Name      string `json:"name"`      // of the pod
	ReadOnly  bool   `json:"readOnly,omitempty"`
	// Shared: others may have it open for writing at the same time.
	Shared bool `json:"shared,omitempty"`
	// Memory: the volume is for the memory of the machine. It is opened as a file, Opened.File.
	Memory bool `json:"memory,omitempty"`
}

// SnapshotsRequest asks for snapshots of volumes that the pod has open.
type SnapshotsRequest struct {
	Pod string `json:"pod"` // uid
	// Snapshots are the engine's ids that the snapshots get, by the handles of the volumes.
	Snapshots map[string]string `json:"snapshots"`
}

// Opened is how to open a volume. It is never written to disk or logged.
type Opened struct {
	Disk handover.Disk `json:"disk"`
	// Keys are the LUKS passphrases by the names in the layers.
	Keys map[string][]byte `json:"keys,omitempty"`
	// File is the path of the volume as one file, of MachineUse.Memory; then nothing else is set.
	File string `json:"file,omitempty"`
	// Ceph is set when layers are in Ceph.
	Ceph   *handover.Ceph `json:"ceph,omitempty"`
	Limits Limits         `json:"limits"`
}

// Limits is what a volume may do per second; zero is no limit.
type Limits struct {
	IOPS       int64 `json:"iops,omitempty"`
	ReadIOPS   int64 `json:"readIOPS,omitempty"`
	WriteIOPS  int64 `json:"writeIOPS,omitempty"`
	Bytes      int64 `json:"bytes,omitempty"`
	ReadBytes  int64 `json:"readBytes,omitempty"`
	WriteBytes int64 `json:"writeBytes,omitempty"`
}

// VolumeRequest names a volume.
type VolumeRequest struct {
	Volume string `json:"volume"`
}

// Stats is what is in a volume, as its guest says. Only Capacity is known of a block volume.
type Stats struct {
	Bytes           int64 `json:"bytes"`
	Capacity        int64 `json:"capacity"`
	Available       int64 `json:"available"`
	Inodes          int64 `json:"inodes"`
	InodesUsed      int64 `json:"inodesUsed"`
	InodesAvailable int64 `json:"inodesAvailable"`
	// Stalled: the micro-VM stands still since the datastore is full.
	Stalled bool `json:"stalled,omitempty"`
}

// Status is how a volume is open.
type Status struct {
	Layers []string `json:"layers"` // ids, lowest first
	Size   int64    `json:"size"`
}

// SnapshotRequest puts a new layer on top of a volume.
type SnapshotRequest struct {
	Volume  string         `json:"volume"`
	Overlay handover.Layer `json:"overlay"`
	Key     []byte         `json:"key,omitempty"` // LUKS passphrase of the overlay
	Ceph    *handover.Ceph `json:"ceph,omitempty"`
}

// ResizeRequest says how large a volume is to be.
type ResizeRequest struct {
	Volume string `json:"volume"`
	Bytes  int64  `json:"bytes"`
}

// LimitRequest says what a volume may do per second.
type LimitRequest struct {
	Volume string `json:"volume"`
	Limits Limits `json:"limits"`
}
