// Package vmoperator holds the CustomResourceDefinitions of VMware's VM Operator API, group vmoperator.vmware.com.
//
// The Go types and the conversions between versions are those of github.com/vmware-tanzu/vm-operator/api; this package
// adds only what the API server must be told. All versions from v1alpha2 to v1alpha5 are served, and v1alpha5 is
// stored. Descriptions are left out: with them the definitions would take many times the memory in the API server.
// The server role applies them at start, with the address of the conversion webhook filled in.
package vmoperator

import _ "embed"

//go:generate ./generate.sh

// Group of the API, and the version that is stored.
const (
	Group   = "vmoperator.vmware.com"
	Version = "v1alpha5"
)

// CRDs are the CustomResourceDefinitions as YAML documents.
//
//go:embed crds.yaml
var CRDs []byte
