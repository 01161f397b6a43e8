package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ItemType is what an item is.
type ItemType string

// The types of items, as VMware writes them here. An image has them in capitals.
const (
	ItemOVF ItemType = "Ovf"
	ItemISO ItemType = "Iso"
)

// Reasons of the condition Ready of an item. Atoll's own.
const (
	ItemReady        = "Ready"
	ItemWaiting      = "WaitingForHost"
	ItemUploading    = "WaitingForUpload"
	ItemTransferring = "Transferring"
	ItemVerifying    = "Verifying"
	ItemUnpacking    = "Unpacking"
	ItemPushing      = "Pushing"
	ItemRetrying     = "Retrying"
	ItemChecksum     = "ChecksumMismatch"
	ItemSourceBad    = "SourceInvalid"
	ItemContentBad   = "ContentInvalid"
	ItemPushRefused  = "PushRefused"
)

// Checksum is what a file must have.
type Checksum struct {
	// +optional
	// +kubebuilder:validation:Enum=SHA256;SHA512
	// +kubebuilder:default=SHA256
	Algorithm string `json:"algorithm,omitempty"`
	// Value is the checksum in hexadecimal.
	Value string `json:"value"`
}

// ItemSource says where the content of an item comes from: exactly one of its fields. Atoll's own.
//
// +kubebuilder:validation:XValidation:rule="[has(self.http), has(self.oci), has(self.upload), has(self.volume)].filter(x, x).size() == 1",message="exactly one of http, oci, upload and volume must be set"
type ItemSource struct {
	// +optional
	HTTP *HTTPSource `json:"http,omitempty"`
	// +optional
	OCI *OCISource `json:"oci,omitempty"`
	// +optional
	Upload *UploadSource `json:"upload,omitempty"`
	// +optional
	Volume *VolumeSource `json:"volume,omitempty"`
}

// HTTPSource is a file on a web server.
type HTTPSource struct {
	// +kubebuilder:validation:MaxLength=4096
	URL string `json:"url"`
	// +optional
	Checksum *Checksum `json:"checksum,omitempty"`
	// SSLCertificate are certificates in PEM: of authorities, or the server's own. When omitted, the authorities
	// that the host trusts are used.
	// +optional
	SSLCertificate string `json:"sslCertificate,omitempty"`
}

// OCISource is an image whose layers have the disk below /disk (KubeVirt's containerDisk), or an artifact that has it
// as a blob.
type OCISource struct {
	// Reference is registry/repository:tag or registry/repository@digest.
	// +kubebuilder:validation:MaxLength=1024
	Reference string `json:"reference"`
	// +optional
	SSLCertificate string `json:"sslCertificate,omitempty"`
	// PlainHTTP talks to the registry without TLS.
	// +optional
	PlainHTTP bool `json:"plainHTTP,omitempty"`
}

// UploadSource is a file that somebody sends: atoll image import does.
type UploadSource struct {
	// FileName is the name of the file, whose ending tells what a raw disk without a partition table is (.raw, .img).
	// +optional
	FileName string `json:"fileName,omitempty"`
	// +optional
	Checksum *Checksum `json:"checksum,omitempty"`
}

// VolumeSource is a snapshot of a volume. Only the controllers of virtual machines may name one.
type VolumeSource struct {
	// Snapshot is the CSI handle of the snapshot, datastore/id.
	Snapshot string `json:"snapshot"`
}

// PushTarget is where a disk goes in the project of the item's namespace.
type PushTarget struct {
	// +kubebuilder:validation:MaxLength=255
	Repository string `json:"repository"`
	// +kubebuilder:validation:MaxLength=128
	Tag string `json:"tag"`
}

// OSInfo is what system a disk has, in VMware's words.
type OSInfo struct {
	// +optional
	ID string `json:"id,omitempty"`
	// +optional
	Type string `json:"type,omitempty"`
	// +optional
	Version string `json:"version,omitempty"`
}

// ContentLibraryItemSpec is what an item is to be.
//
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.source) || has(self.source) && self.source == oldSelf.source",message="source cannot change; delete the item and make a new one"
// +kubebuilder:validation:XValidation:rule="has(self.push) == has(oldSelf.push) && (!has(self.push) || self.push == oldSelf.push)",message="push cannot change; use a VirtualMachinePublishRequest"
// +kubebuilder:validation:XValidation:rule="!has(self.push) || has(self.source) && has(self.source.volume)",message="push is for what a VirtualMachinePublishRequest publishes"
type ContentLibraryItemSpec struct {
	// UUID of the item. The object's uid when omitted.
	// +optional
	UUID types.UID `json:"uuid,omitempty"`
	// Library is the name of the library the item belongs to. Atoll's own, as everything below.
	// +optional
	// +kubebuilder:default=default
	Library string `json:"library,omitempty"`
	// Name is the display name of the image; the object's name when omitted.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name,omitempty"`
	// +optional
	Description string `json:"description,omitempty"`
	// +optional
	Source *ItemSource `json:"source,omitempty"`
	// Push sends the disk to the cluster's registry before the item is ready. A VirtualMachinePublishRequest sets it.
	// +optional
	Push *PushTarget `json:"push,omitempty"`
	// OS is what system the disk has; an OVF says it by itself.
	// +optional
	OS OSInfo `json:"os,omitempty"`
	// Firmware is what starts the machine; an OVF says it by itself.
	// +optional
	// +kubebuilder:validation:Enum=bios;efi
	Firmware string `json:"firmware,omitempty"`
}

// NameAndKindRef names an object.
type NameAndKindRef struct {
	// +optional
	Kind string `json:"kind,omitempty"`
	// +optional
	Name string `json:"name,omitempty"`
}

// FileInfo is a file of an item.
type FileInfo struct {
	// +optional
	Name string `json:"name,omitempty"`
	// +optional
	SizeInBytes resource.Quantity `json:"sizeInBytes,omitempty"`
	// +optional
	Cached bool `json:"cached,omitempty"`
}

// ItemDisk is a disk of an item. Atoll's own.
type ItemDisk struct {
	Name string `json:"name"`
	// Format of the file: qcow2, raw, iso, vmdk, vhd, vhdx.
	Format string `json:"format"`
	// Capacity is the size of the disk, which is the least that a claim for a copy must ask for.
	Capacity resource.Quantity `json:"capacity"`
	// ControllerType is SCSI, SATA, IDE, NVME or empty.
	// +optional
	ControllerType string `json:"controllerType,omitempty"`
	// +optional
	ControllerBusNumber int32 `json:"controllerBusNumber,omitempty"`
	// +optional
	UnitNumber int32 `json:"unitNumber,omitempty"`
}

// ItemProperty is a property that an OVF has.
type ItemProperty struct {
	Key string `json:"key"`
	// +optional
	Type string `json:"type,omitempty"`
	// +optional
	Default *string `json:"default,omitempty"`
	// +optional
	UserConfigurable bool `json:"userConfigurable,omitempty"`
}

// ItemHardware is what an OVF says about the machine. Atoll's own.
type ItemHardware struct {
	// +optional
	CPUs int32 `json:"cpus,omitempty"`
	// +optional
	Memory resource.Quantity `json:"memory,omitempty"`
	// +optional
	Firmware string `json:"firmware,omitempty"`
	// +optional
	SecureBoot bool `json:"secureBoot,omitempty"`
	// +optional
	Version int32 `json:"version,omitempty"`
	// +optional
	OS OSInfo `json:"os,omitempty"`
	// +optional
	Product ItemProduct `json:"product,omitempty"`
	// +optional
	Properties []ItemProperty `json:"properties,omitempty"`
}

// ItemProduct is what an OVF says about the software.
type ItemProduct struct {
	// +optional
	Product string `json:"product,omitempty"`
	// +optional
	Vendor string `json:"vendor,omitempty"`
	// +optional
	Version string `json:"version,omitempty"`
	// +optional
	FullVersion string `json:"fullVersion,omitempty"`
}

// ItemProgress is how far the import is. Atoll's own.
type ItemProgress struct {
	// Phase is Transferring, Verifying, Unpacking or Pushing.
	Phase string `json:"phase"`
	// +optional
	BytesDone int64 `json:"bytesDone"`
	// BytesTotal is 0 when it is not known.
	// +optional
	BytesTotal int64 `json:"bytesTotal"`
	// +optional
	Percent int32 `json:"percent"`
}

// ContentLibraryItemStatus is how an item is.
type ContentLibraryItemStatus struct {
	// +optional
	ContentLibraryRef *NameAndKindRef `json:"contentLibraryRef,omitempty"`
	// +optional
	Name string `json:"name,omitempty"`
	// +optional
	Description *string `json:"description,omitempty"`
	// +optional
	MetadataVersion string `json:"metadataVersion,omitempty"`
	// ContentVersion is the SHA256 checksum of the file.
	// +optional
	ContentVersion string `json:"contentVersion,omitempty"`
	// +optional
	Type ItemType `json:"type,omitempty"`
	// +optional
	SizeInBytes resource.Quantity `json:"sizeInBytes,omitempty"`
	// Cached: all files are here.
	// +optional
	Cached bool `json:"cached,omitempty"`
	// +optional
	FileInfo []FileInfo `json:"fileInfo,omitempty"`
	// +optional
	Ready bool `json:"ready,omitempty"`
	// +optional
	CreationTime string `json:"creationTime,omitempty"`
	// +optional
	LastModifiedTime string `json:"lastModifiedTime,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// Host is the node that has the content, or gets it. Atoll's own, as everything below.
	// +optional
	Host string `json:"host,omitempty"`
	// +optional
	Progress *ItemProgress `json:"progress,omitempty"`
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Disks []ItemDisk `json:"disks,omitempty"`
	// +optional
	Hardware *ItemHardware `json:"hardware,omitempty"`
	// Digest is that of the manifest in the registry, of an item that was pushed there.
	// +optional
	Digest string `json:"digest,omitempty"`
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
}

// ContentLibraryItem is an item of a namespace's library.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,shortName=clitem
// +kubebuilder:printcolumn:name="Library",type=string,JSONPath=".spec.library"
// +kubebuilder:printcolumn:name="DisplayName",type=string,JSONPath=".status.name"
// +kubebuilder:printcolumn:name="Type",type=string,JSONPath=".status.type"
// +kubebuilder:printcolumn:name="Size",type=string,JSONPath=".status.sizeInBytes"
// +kubebuilder:printcolumn:name="Ready",type=boolean,JSONPath=".status.ready"
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].reason"
// +kubebuilder:printcolumn:name="Percent",type=integer,JSONPath=".status.progress.percent"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type ContentLibraryItem struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec ContentLibraryItemSpec `json:"spec,omitempty"`
	// +optional
	Status ContentLibraryItemStatus `json:"status,omitempty"`
}

// ContentLibraryItemList is a list of items.
//
// +kubebuilder:object:root=true
type ContentLibraryItemList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ContentLibraryItem `json:"items"`
}

// ClusterContentLibraryItem is an item that all namespaces can use.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=cclitem
// +kubebuilder:printcolumn:name="Library",type=string,JSONPath=".spec.library"
// +kubebuilder:printcolumn:name="DisplayName",type=string,JSONPath=".status.name"
// +kubebuilder:printcolumn:name="Type",type=string,JSONPath=".status.type"
// +kubebuilder:printcolumn:name="Size",type=string,JSONPath=".status.sizeInBytes"
// +kubebuilder:printcolumn:name="Ready",type=boolean,JSONPath=".status.ready"
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].reason"
// +kubebuilder:printcolumn:name="Percent",type=integer,JSONPath=".status.progress.percent"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type ClusterContentLibraryItem struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec ContentLibraryItemSpec `json:"spec,omitempty"`
	// +optional
	Status ContentLibraryItemStatus `json:"status,omitempty"`
}

// ClusterContentLibraryItemList is a list of items.
//
// +kubebuilder:object:root=true
type ClusterContentLibraryItemList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ClusterContentLibraryItem `json:"items"`
}
