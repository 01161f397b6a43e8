// Package v1alpha1 is the API group atoll.dev, version v1alpha1: the kinds that Atoll adds to Kubernetes.
//
// It holds types and generated code only. The API server knows them as CustomResourceDefinitions (crds.yaml,
// also generated), which the server role applies at start. Fields may still change; conversion comes with
// the next version.
//
// +kubebuilder:object:generate=true
// +groupName=atoll.dev
package v1alpha1

//go:generate ./generate.sh
