package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// DefaultLibrary is the name of the library that items go to that name none: the ClusterContentLibrary of that name,
// and one ContentLibrary in each namespace.
const DefaultLibrary = "default"

// DefaultLibraryLabel marks the library of a namespace that virtual machines are published into when a request names
// none.
const DefaultLibraryLabel = "imageregistry.vmware.com/default"

// RegistryLibrary is the name of the libraries that are projects of the cluster's registry: one ContentLibrary in each
// namespace, whose project is that of the namespace, and a ClusterContentLibrary for the project library. Atoll's own.
const RegistryLibrary = "registry"

// ReadyCondition is the type of the condition of libraries and items that sums them up.
const ReadyCondition = "Ready"

// RegistryBacking makes a library of a project of the cluster's registry: the disks of virtual machines among the
// project's images and artifacts are the library's items, and what is published into the library is pushed there.
type RegistryBacking struct {
	// Project is that of the library's own namespace, which is the default; for a ClusterContentLibrary it is library.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Project string `json:"project,omitempty"`
}

// ContentLibrarySpec is what a library is to be.
//
// +kubebuilder:validation:XValidation:rule="has(self.registry) == has(oldSelf.registry)",message="registry cannot be added to a library or taken from it; make another library"
type ContentLibrarySpec struct {
	// UUID of the library. The object's uid when omitted.
	// +optional
	UUID types.UID `json:"uuid,omitempty"`
	// Writable: virtual machines may be published into it, and items imported.
	// +optional
	Writable bool `json:"writable,omitempty"`
	// AllowImport: requests to import may name it.
	// +optional
	AllowImport bool `json:"allowImport,omitempty"`
	// Registry, when set, makes it a library of what is in the cluster's registry. Atoll's own.
	// +optional
	Registry *RegistryBacking `json:"registry,omitempty"`
}

// LibraryType is what a library's items come from.
type LibraryType string

// LibraryLocal is a library whose items are its own, LibraryRegistry one whose items are in the registry (Atoll's own).
const (
	LibraryLocal    LibraryType = "Local"
	LibraryRegistry LibraryType = "Registry"
)

// Reasons of the condition Ready of a library that is a project of the registry.
const (
	LibraryProjectInvalid = "ProjectInvalid"
	LibraryProjectTaken   = "ProjectTaken"
	LibraryExternal       = "ExternalRegistry"
	LibraryProjectUnknown = "ProjectNotRead"
	LibraryItemsRefused   = "ItemsRefused"
)

// CompleteCondition is false, for the reason LibraryTooManyTags, on a library that leaves out tags of its project.
const (
	CompleteCondition  = "Complete"
	LibraryTooManyTags = "TooManyTags"
)

// ContentLibraryStatus is how a library is.
type ContentLibraryStatus struct {
	// +optional
	Name string `json:"name,omitempty"`
	// +optional
	Description string `json:"description,omitempty"`
	// +optional
	CreationTime string `json:"creationTime,omitempty"`
	// +optional
	LastModifiedTime string `json:"lastModifiedTime,omitempty"`
	// +optional
	Type LibraryType `json:"type,omitempty"`
	// +optional
	Version string `json:"version,omitempty"`
	// +optional
	Published bool `json:"published,omitempty"`
	// +optional
	ServerGUID string `json:"serverGUID,omitempty"`
	// Items is how many items the library has, and ReadyItems how many of them are ready. Atoll's own.
	// +optional
	Items int32 `json:"items"`
	// +optional
	ReadyItems int32 `json:"readyItems"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ContentLibrary is a library of a namespace.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,shortName=cl
// +kubebuilder:printcolumn:name="LibraryName",type=string,JSONPath=".status.name"
// +kubebuilder:printcolumn:name="Type",type=string,JSONPath=".status.type"
// +kubebuilder:printcolumn:name="Writable",type=boolean,JSONPath=".spec.writable"
// +kubebuilder:printcolumn:name="AllowImport",type=boolean,JSONPath=".spec.allowImport"
// +kubebuilder:printcolumn:name="Items",type=integer,JSONPath=".status.items"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type ContentLibrary struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec ContentLibrarySpec `json:"spec,omitempty"`
	// +optional
	Status ContentLibraryStatus `json:"status,omitempty"`
}

// ContentLibraryList is a list of libraries.
//
// +kubebuilder:object:root=true
type ContentLibraryList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ContentLibrary `json:"items"`
}

// ClusterContentLibrary is a library whose images all namespaces can use.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=ccl
// +kubebuilder:printcolumn:name="LibraryName",type=string,JSONPath=".status.name"
// +kubebuilder:printcolumn:name="Type",type=string,JSONPath=".status.type"
// +kubebuilder:printcolumn:name="Items",type=integer,JSONPath=".status.items"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type ClusterContentLibrary struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec ContentLibrarySpec `json:"spec,omitempty"`
	// +optional
	Status ContentLibraryStatus `json:"status,omitempty"`
}

// ClusterContentLibraryList is a list of libraries.
//
// +kubebuilder:object:root=true
type ClusterContentLibraryList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ClusterContentLibrary `json:"items"`
}
