package v1alpha1

import (
	_ "embed"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Group and Version of this API.
const (
	Group   = "imageregistry.vmware.com"
	Version = "v1alpha1"
)

// GroupVersion is group and version as the libraries want them.
func GroupVersion() schema.GroupVersion { return schema.GroupVersion{Group: Group, Version: Version} }

// Items and ClusterItems are the resources of the two kinds of items.
func Items() schema.GroupVersionResource {
	return GroupVersion().WithResource("contentlibraryitems")
}

// ClusterItems is the resource of kind ClusterContentLibraryItem.
func ClusterItems() schema.GroupVersionResource {
	return GroupVersion().WithResource("clustercontentlibraryitems")
}

// AddToScheme adds the kinds of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion(),
		&ContentLibrary{}, &ContentLibraryList{}, &ClusterContentLibrary{}, &ClusterContentLibraryList{},
		&ContentLibraryItem{}, &ContentLibraryItemList{}, &ClusterContentLibraryItem{}, &ClusterContentLibraryItemList{},
		&ContentLibraryItemImportRequest{}, &ContentLibraryItemImportRequestList{})
	metav1.AddToGroupVersion(s, GroupVersion())
	return nil
}

// CRDs are the CustomResourceDefinitions of this package as YAML documents.
//
//go:embed crds.yaml
var CRDs []byte
