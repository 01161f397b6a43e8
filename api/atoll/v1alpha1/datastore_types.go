package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Datastore is a place where volumes are kept: a directory of a host, or a pool of a Ceph cluster.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,categories=atoll
// +kubebuilder:printcolumn:name="Type",type=string,JSONPath=".status.type"
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].status"
// +kubebuilder:printcolumn:name="Capacity",type=string,JSONPath=".status.capacity"
// +kubebuilder:printcolumn:name="Free",type=string,JSONPath=".status.free"
// +kubebuilder:printcolumn:name="Provisioned",type=string,JSONPath=".status.provisioned"
// +kubebuilder:printcolumn:name="Volumes",type=integer,JSONPath=".status.volumeCount"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type Datastore struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec DatastoreSpec `json:"spec"`
	// +optional
	Status DatastoreStatus `json:"status,omitempty"`
}

// DatastoreList is a list of datastores.
//
// +kubebuilder:object:root=true
type DatastoreList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Datastore `json:"items"`
}

// DatastoreSpec says where the volumes are. Exactly one kind of place must be given, and it cannot change.
//
// +kubebuilder:validation:XValidation:rule="has(self.directory) != has(self.rbd)",message="give exactly one of directory and rbd"
// +kubebuilder:validation:XValidation:rule="has(self.directory) == has(oldSelf.directory)",message="the kind of a datastore cannot change"
type DatastoreSpec struct {
	// Directory is a directory of a host.
	// +optional
	Directory *DirectoryDatastore `json:"directory,omitempty"`
	// RBD is a pool of a Ceph cluster.
	// +optional
	RBD *RBDDatastore `json:"rbd,omitempty"`
	// WarnPercent is the fill level in percent from which on a condition warns.
	// +optional
	// +kubebuilder:default=80
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	WarnPercent int32 `json:"warnPercent,omitempty"`
	// RefusePercent is the fill level in percent from which on nothing is created, grown or snapshotted.
	// +optional
	// +kubebuilder:default=95
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	RefusePercent int32 `json:"refusePercent,omitempty"`
	// OvercommitPercent bounds the sizes of all volumes together, in percent of the capacity. 0 is no bound:
	// thin volumes may promise any amount.
	// +optional
	// +kubebuilder:validation:Minimum=0
	OvercommitPercent int32 `json:"overcommitPercent,omitempty"`
}

// DirectoryDatastore is a directory.
//
// +kubebuilder:validation:XValidation:rule="self.path == oldSelf.path",message="the path of a datastore cannot change"
type DirectoryDatastore struct {
	// Path is absolute. The directory is made if it is missing, but not its parent.
	// +kubebuilder:validation:Pattern=`^/.+`
	// +kubebuilder:validation:MaxLength=1024
	Path string `json:"path"`
	// Node is the host the directory is on. Empty means every host; with shared, that it is the same
	// directory on all of them.
	// +optional
	Node string `json:"node,omitempty"`
	// Shared says that the administrator has mounted one file system at this path on several hosts.
	// +optional
	Shared bool `json:"shared,omitempty"`
}

// RBDDatastore is a pool of a Ceph cluster, reached by QEMU's own driver.
type RBDDatastore struct {
	// +kubebuilder:validation:MinLength=1
	Pool string `json:"pool"`
	// +optional
	Namespace string `json:"namespace,omitempty"`
	// ConfigFile is a ceph.conf on the hosts; empty is Ceph's default.
	// +optional
	ConfigFile string `json:"configFile,omitempty"`
	// User is the Ceph user without "client."; its keyring is where the ceph.conf says.
	// +optional
	User string `json:"user,omitempty"`
}

// Types of conditions of a Datastore.
const (
	// DatastoreReady: it can be reached and is in order.
	DatastoreReady = "Ready"
	// DatastoreSpace: there is room. False with reason NearlyFull or Full.
	DatastoreSpace = "SpaceAvailable"
)

// DatastoreStatus is what the agents say.
type DatastoreStatus struct {
	// Type is directory or rbd.
	// +optional
	Type string `json:"type,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// ID is what the datastore is marked with, so that nothing else is taken for it.
	// +optional
	ID string `json:"id,omitempty"`
	// Capacity and Free are of the file system or pool.
	// +optional
	Capacity resource.Quantity `json:"capacity,omitempty"`
	// +optional
	Free resource.Quantity `json:"free,omitempty"`
	// Used is what volumes and snapshots take.
	// +optional
	Used resource.Quantity `json:"used,omitempty"`
	// Provisioned is the sum of the sizes of all volumes.
	// +optional
	Provisioned resource.Quantity `json:"provisioned,omitempty"`
	// +optional
	VolumeCount int32 `json:"volumeCount,omitempty"`
	// +optional
	SnapshotCount int32 `json:"snapshotCount,omitempty"`
	// Volumes are the volumes on it, the first 500 by name.
	// +optional
	// +listType=map
	// +listMapKey=id
	// +kubebuilder:validation:MaxItems=500
	Volumes []DatastoreVolume `json:"volumes,omitempty"`
}

// DatastoreVolume is one volume in the status of a Datastore.
type DatastoreVolume struct {
	ID string `json:"id"`
	// Claim is the PersistentVolumeClaim it was made for, namespace/name.
	// +optional
	Claim string            `json:"claim,omitempty"`
	Size  resource.Quantity `json:"size"`
	// HeldBy says who has it open: node/use.
	// +optional
	// +listType=atomic
	HeldBy []string `json:"heldBy,omitempty"`
}
