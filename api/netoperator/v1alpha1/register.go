package v1alpha1

import (
	_ "embed"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Group and Version of this API.
const (
	Group   = "netoperator.vmware.com"
	Version = "v1alpha1"
)

// GroupVersion is group and version as the libraries want them.
var GroupVersion = schema.GroupVersion{Group: Group, Version: Version}

// AddToScheme adds the kinds of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &Network{}, &NetworkList{}, &NetworkInterface{}, &NetworkInterfaceList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}

// CRDs are the CustomResourceDefinitions of this package as YAML documents.
//
//go:embed crds.yaml
var CRDs []byte
