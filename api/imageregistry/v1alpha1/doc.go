// Package v1alpha1 is the API group imageregistry.vmware.com, version v1alpha1: content libraries, their items, and
// requests to import one.
//
// Group, version, names and fields are those of VMware's, as far as they are public, so that manifests and clients
// made for vSphere work; no Go module that has the types can be fetched, which is why they are written here. What
// Atoll adds says so: above all spec.source of an item, since there is no vCenter to have the items. It holds types
// and generated code only; the server role applies crds.yaml at start.
//
// +kubebuilder:object:generate=true
// +groupName=imageregistry.vmware.com
package v1alpha1

//go:generate ./generate.sh
