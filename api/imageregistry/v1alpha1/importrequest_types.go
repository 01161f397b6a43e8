package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Types of conditions of a ContentLibraryItemImportRequest.
const (
	ImportSourceValid = "SourceValid"
	ImportTargetValid = "TargetValid"
	ImportItemCreated = "ContentLibraryItemCreated"
	ImportUploaded    = "TemplateUploaded"
	ImportItemReady   = "ContentLibraryItemReady"
	ImportComplete    = "Complete"
)

// Reasons of these conditions.
const (
	ImportSourceURLInvalid          = "SourceURLInvalid"
	ImportSourceURLSchemeInvalid    = "SourceURLSchemeInvalid"
	ImportSourceURLHostInvalid      = "SourceURLHostInvalid"
	ImportSourceChecksumInvalid     = "SourceChecksumInvalid"
	ImportTargetLibraryInvalid      = "TargetLibraryInvalid"
	ImportTargetLibraryNotReady     = "TargetLibraryNotReady"
	ImportTargetItemInvalid         = "TargetItemInvalid"
	ImportTargetItemCreationFailure = "TargetItemCreationFailure"
	ImportTargetItemUnavailable     = "TargetItemUnavailable"
	ImportTargetItemNotReady        = "TargetItemNotReady"
	ImportUploadInProgress          = "UploadInProgress"
	ImportUploadFailure             = "UploadFailure"
)

// ContentLibraryItemImportRequestSource is where the file is.
type ContentLibraryItemImportRequestSource struct {
	// URL of a file: one of the formats of docs/vm-images.md, perhaps compressed.
	// +kubebuilder:validation:MaxLength=4096
	URL string `json:"url"`
	// PEM is the certificate of the server, or of who issued it, in PEM.
	// +optional
	PEM string `json:"pem,omitempty"`
	// SSLCertificate is the same by its newer name.
	// +optional
	SSLCertificate string `json:"sslCertificate,omitempty"`
	// +optional
	Checksum *Checksum `json:"checksum,omitempty"`
}

// ContentLibraryItemImportRequestTargetItem is the item to make.
type ContentLibraryItemImportRequestTargetItem struct {
	// +optional
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name,omitempty"`
	// ItemName is the same by its other name.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	ItemName string `json:"itemName,omitempty"`
	// +optional
	Description string `json:"description,omitempty"`
	// Type is taken from the file, whatever this says.
	// +optional
	Type ItemType `json:"type,omitempty"`
}

// LocalObjectRef names an object in the same namespace.
type LocalObjectRef struct {
	// +optional
	APIVersion string `json:"apiVersion,omitempty"`
	// +optional
	Kind string `json:"kind,omitempty"`
	Name string `json:"name"`
}

// ContentLibraryItemImportRequestTarget is where the item goes.
type ContentLibraryItemImportRequestTarget struct {
	// +optional
	Item ContentLibraryItemImportRequestTargetItem `json:"item,omitempty"`
	// Library is a ContentLibrary of the namespace.
	Library LocalObjectRef `json:"library"`
}

// ContentLibraryItemImportRequestSpec says what to import.
type ContentLibraryItemImportRequestSpec struct {
	Source ContentLibraryItemImportRequestSource `json:"source"`
	Target ContentLibraryItemImportRequestTarget `json:"target"`
	// TTLSecondsAfterFinished is how long the request stays when it is complete. For good when omitted.
	// +optional
	// +kubebuilder:validation:Minimum=0
	TTLSecondsAfterFinished *int64 `json:"ttlSecondsAfterFinished,omitempty"`
}

// FileTransferStatus is how far a file is.
type FileTransferStatus struct {
	Name string `json:"name"`
	// Status is one of Waiting, Transferring, Validating, Ready and Error.
	Status string `json:"transferStatus"`
	// +optional
	BytesTransferred *int64 `json:"bytesTransferred,omitempty"`
	// +optional
	Size *int64 `json:"size,omitempty"`
	// +optional
	ErrorMessage string `json:"errorMessage,omitempty"`
}

// ContentLibraryItemFileUploadStatus is how far the files are.
type ContentLibraryItemFileUploadStatus struct {
	// +optional
	SessionUUID types.UID `json:"sessionUUID,omitempty"`
	// +optional
	FileUploads []FileTransferStatus `json:"fileUploads,omitempty"`
}

// ContentLibraryItemImportRequestStatus is how far an import is.
type ContentLibraryItemImportRequestStatus struct {
	// +optional
	ItemRef *LocalObjectRef `json:"itemRef,omitempty"`
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// +optional
	FileUploadStatus *ContentLibraryItemFileUploadStatus `json:"fileUploadStatus,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ContentLibraryItemImportRequest imports a file into a library, once.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,shortName=clitemimport
// +kubebuilder:printcolumn:name="Library",type=string,JSONPath=".spec.target.library.name"
// +kubebuilder:printcolumn:name="Item",type=string,JSONPath=".status.itemRef.name"
// +kubebuilder:printcolumn:name="Complete",type=string,JSONPath=".status.conditions[?(@.type=='Complete')].status"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type ContentLibraryItemImportRequest struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec ContentLibraryItemImportRequestSpec `json:"spec,omitempty"`
	// +optional
	Status ContentLibraryItemImportRequestStatus `json:"status,omitempty"`
}

// ContentLibraryItemImportRequestList is a list of requests.
//
// +kubebuilder:object:root=true
type ContentLibraryItemImportRequestList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ContentLibraryItemImportRequest `json:"items"`
}
