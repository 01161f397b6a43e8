// Package v1alpha1 is the API group netoperator.vmware.com, version v1alpha1: networks that virtual machines can be
// connected to, and their interfaces.
//
// VMware's module with these types is not public, so the types are written anew with the names of its fields as far as
// they are known; spec.bridge of a Network is our own. It holds types and generated code only. The API server knows
// them as CustomResourceDefinitions (crds.yaml, also generated), which the server role applies at start.
//
// +kubebuilder:object:generate=true
// +groupName=netoperator.vmware.com
package v1alpha1

//go:generate ./generate.sh
