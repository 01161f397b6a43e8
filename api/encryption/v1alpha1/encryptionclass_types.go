package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What refers to an EncryptionClass.
const (
	// ClaimAnnotation on a PersistentVolumeClaim names a class of the claim's namespace.
	ClaimAnnotation = "csi.vsphere.encryption-class"
	// DefaultLabel with the value "true" makes a class that of all claims of its namespace that are to be
	// encrypted and name none.
	DefaultLabel = "encryption.vmware.com/default"
)

// EncryptionClass says which key encrypts the volumes of a namespace that refer to it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,shortName=encclass
// +kubebuilder:printcolumn:name="KeyProvider",type=string,JSONPath=".spec.keyProvider"
// +kubebuilder:printcolumn:name="KeyID",type=string,JSONPath=".spec.keyID"
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].status"
// +kubebuilder:printcolumn:name="KeysCurrent",type=string,JSONPath=".status.conditions[?(@.type=='KeysCurrent')].status"
// +kubebuilder:printcolumn:name="Volumes",type=integer,JSONPath=".status.volumes"
// +kubebuilder:printcolumn:name="Current",type=integer,JSONPath=".status.current"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type EncryptionClass struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec EncryptionClassSpec `json:"spec,omitempty"`
	// +optional
	Status EncryptionClassStatus `json:"status,omitempty"`
}

// EncryptionClassList is a list of classes.
//
// +kubebuilder:object:root=true
type EncryptionClassList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []EncryptionClass `json:"items"`
}

// EncryptionClassSpec names a key. When it changes, the keys of all volumes and snapshots of the class are
// wrapped with the new one.
type EncryptionClassSpec struct {
	// KeyProvider is the name of a key provider: of a Secret in the namespace atoll-keys.
	KeyProvider string `json:"keyProvider"`
	// KeyID is the name of a key of the provider: of an entry of the Secret. When omitted, the provider
	// chooses: the entry whose name sorts last.
	// +optional
	KeyID string `json:"keyID,omitempty"`
}

// Types of conditions of an EncryptionClass.
const (
	// ClassReady: the key can be used.
	ClassReady = "Ready"
	// ClassKeysCurrent: the keys of all volumes and snapshots of the class are wrapped with the key that it
	// names; older ones are not needed any more. Unknown while some cannot be looked at.
	ClassKeysCurrent = "KeysCurrent"
)

// EncryptionClassStatus is what the agents say.
type EncryptionClassStatus struct {
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// KeyProvider and KeyID are the key that wraps now.
	// +optional
	KeyProvider string `json:"keyProvider,omitempty"`
	// +optional
	KeyID string `json:"keyID,omitempty"`
	// Volumes is how many volumes and snapshots are of this class, and Current how many of them have their
	// keys wrapped with the key that wraps now.
	// +optional
	Volumes int32 `json:"volumes"`
	// +optional
	Current int32 `json:"current"`
	// Hosts are the counts of each host.
	// +optional
	// +listType=map
	// +listMapKey=node
	// +kubebuilder:validation:MaxItems=1000
	Hosts []EncryptionClassHost `json:"hosts,omitempty"`
}

// EncryptionClassHost is what one host's agent has found on its datastores.
type EncryptionClassHost struct {
	// Node is the host. What is on datastores of all hosts is in the entry with the empty name.
	Node string `json:"node"`
	// +optional
	Volumes int32 `json:"volumes"`
	// +optional
	Current int32 `json:"current"`
	// ObservedGeneration is the generation of the class that the counts are for.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// KeyProvider, KeyID and Fingerprint are the key that the host wraps with.
	// +optional
	KeyProvider string `json:"keyProvider,omitempty"`
	// +optional
	KeyID string `json:"keyID,omitempty"`
	// +optional
	Fingerprint string `json:"fingerprint,omitempty"`
	// KeyProblem says why the key cannot be used, and VolumeProblem why a volume keeps an older one.
	// +optional
	KeyProblem string `json:"keyProblem,omitempty"`
	// +optional
	VolumeProblem string `json:"volumeProblem,omitempty"`
	// Unseen says why there may be volumes that are not counted: a datastore is down, or a record is damaged.
	// +optional
	Unseen string `json:"unseen,omitempty"`
}
