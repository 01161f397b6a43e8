package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NetworkInterfaceType is a model of interface.
type NetworkInterfaceType string

// NetworkInterfaceTypeVMXNet3 is the only one there is; the guest sees a virtio device.
const NetworkInterfaceTypeVMXNet3 NetworkInterfaceType = "vmxnet3"

// ConditionReady of a NetworkInterface: a virtual machine is connected by it.
const ConditionReady = "Ready"

// IPConfig is an address of an interface.
type IPConfig struct {
	IP string `json:"ip"`
	// +optional
	IPFamily corev1.IPFamily `json:"ipFamily,omitempty"`
	// +optional
	Gateway string `json:"gateway,omitempty"`
	// +optional
	SubnetMask string `json:"subnetMask,omitempty"`
}

// NetworkInterfaceSpec is what a NetworkInterface is to be.
type NetworkInterfaceSpec struct {
	// NetworkName is the Network of the same namespace that it is on.
	// +optional
	NetworkName string `json:"networkName,omitempty"`
	// +optional
	Type NetworkInterfaceType `json:"type,omitempty"`
	// ExternalID names it in another system. It is kept, and nothing reads it.
	// +optional
	ExternalID string `json:"externalID,omitempty"`
}

// NetworkInterfaceStatus is how a NetworkInterface is.
type NetworkInterfaceStatus struct {
	// +optional
	Conditions []NetworkCondition `json:"conditions,omitempty"`
	// +optional
	IPConfigs []IPConfig `json:"ipConfigs,omitempty"`
	// +optional
	MacAddress string `json:"macAddress,omitempty"`
	// +optional
	ExternalID string `json:"externalID,omitempty"`
	// NetworkID is the bridge of the host, with its VLAN.
	// +optional
	NetworkID string `json:"networkID,omitempty"`
}

// NetworkInterface is an interface of a virtual machine. The controller of VirtualMachines makes and deletes it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=netif
// +kubebuilder:printcolumn:name="Network",type="string",JSONPath=".spec.networkName"
// +kubebuilder:printcolumn:name="MAC",type="string",JSONPath=".status.macAddress"
// +kubebuilder:printcolumn:name="IP",type="string",JSONPath=".status.ipConfigs[0].ip"
type NetworkInterface struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   NetworkInterfaceSpec   `json:"spec,omitempty"`
	Status NetworkInterfaceStatus `json:"status,omitempty"`
}

// NetworkInterfaceList is a list of NetworkInterfaces.
//
// +kubebuilder:object:root=true
type NetworkInterfaceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []NetworkInterface `json:"items"`
}
