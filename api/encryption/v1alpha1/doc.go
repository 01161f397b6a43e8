// Package v1alpha1 is the API group encryption.vmware.com, version v1alpha1: the kind EncryptionClass.
//
// Group, version, names and spec are those of VMware's, so that manifests and clients made for vSphere work
// unchanged; no Go module that has the types can be fetched, which is why they are written here. The status
// is empty there and Atoll's own here. It holds types and generated code only; the server role applies
// crds.yaml at start.
//
// +kubebuilder:object:generate=true
// +groupName=encryption.vmware.com
package v1alpha1

//go:generate ./generate.sh
