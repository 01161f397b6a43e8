package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// NetworkType says what a Network is made of.
type NetworkType string

// The network types.
const (
	// NetworkTypePod is the network of the cluster's pods. An interface on it has the address of the machine's pod.
	NetworkTypePod NetworkType = "pod"
	// NetworkTypeBridge is a bridge of the hosts, see spec.bridge.
	NetworkTypeBridge NetworkType = "bridge"
	// NetworkTypeVSphereDistributed is what VMware calls the networks of its distributed switch. Here it is the
	// same as bridge when spec.bridge is set, else the same as pod.
	NetworkTypeVSphereDistributed NetworkType = "vsphere-distributed"
)

// NetworkProviderReference names an object that says more about a network. It is kept, and nothing reads it.
type NetworkProviderReference struct {
	APIGroup   string `json:"apiGroup"`
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	Namespace  string `json:"namespace,omitempty"`
	APIVersion string `json:"apiVersion,omitempty"`
}

// Bridge is a bridge of the hosts. The administrator of the hosts makes it, with the same name on each that is to run
// virtual machines with an interface on it.
type Bridge struct {
	// Name of the bridge.
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9_.-]{1,15}$`
	Name string `json:"name"`
	// VLAN is the tag of frames of this network on the bridge, 0 for none.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=4094
	// +optional
	VLAN int32 `json:"vlan,omitempty"`
}

// IPPoolReference names a pool of addresses. It is kept, and nothing reads it.
type IPPoolReference struct {
	Name       string `json:"name"`
	APIVersion string `json:"apiVersion,omitempty"`
}

// NetworkSpec is what a Network is to be.
type NetworkSpec struct {
	// Type of the network: pod, bridge or vsphere-distributed.
	// +kubebuilder:validation:Enum=pod;bridge;vsphere-distributed
	// +kubebuilder:default=pod
	Type NetworkType `json:"type"`
	// Bridge of the hosts that the network is on.
	// +optional
	Bridge *Bridge `json:"bridge,omitempty"`
	// DNS are the name servers of machines on this network that name none themselves, NTP the time servers.
	// +optional
	DNS []string `json:"dns,omitempty"`
	// +optional
	DNSSearchDomains []string `json:"dnsSearchDomains,omitempty"`
	// +optional
	NTP []string `json:"ntp,omitempty"`
	// +optional
	ProviderRef *NetworkProviderReference `json:"providerRef,omitempty"`
	// +optional
	IPPools []IPPoolReference `json:"ipPools,omitempty"`
}

// NetworkCondition is one thing to know about a network or an interface.
type NetworkCondition struct {
	Type   string                 `json:"type"`
	Status metav1.ConditionStatus `json:"status"`
	// +optional
	Reason string `json:"reason,omitempty"`
	// +optional
	Message string `json:"message,omitempty"`
	// +optional
	LastTransitionTime metav1.Time `json:"lastTransitionTime,omitempty"`
}

// NetworkStatus is how a Network is.
type NetworkStatus struct {
	// +optional
	Conditions []NetworkCondition `json:"conditions,omitempty"`
}

// Network is a network that virtual machines of its namespace can be connected to.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Type",type="string",JSONPath=".spec.type"
// +kubebuilder:printcolumn:name="Bridge",type="string",JSONPath=".spec.bridge.name"
// +kubebuilder:printcolumn:name="VLAN",type="integer",JSONPath=".spec.bridge.vlan"
// +kubebuilder:printcolumn:name="Age",type="date",JSONPath=".metadata.creationTimestamp"
type Network struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   NetworkSpec   `json:"spec,omitempty"`
	Status NetworkStatus `json:"status,omitempty"`
}

// NetworkList is a list of Networks.
//
// +kubebuilder:object:root=true
type NetworkList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Network `json:"items"`
}
