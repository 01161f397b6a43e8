// Package contentv1alpha1 names the subresources of library items that the API server serves beside the objects: their
// bytes, which are no objects.
//
//	PUT /apis/content.atoll.dev/v1alpha1/namespaces/NAMESPACE/contentlibraryitems/NAME/upload
//	GET .../upload      how much of it is here (Uploaded)
//	GET .../content     the image: ?format=qcow2|raw|vmdk|ova&disk=0; without a format the file as it came
//
// and the same without namespaces/NAMESPACE for clustercontentlibraryitems. A PUT has the header
// "Content-Range: bytes FIRST-LAST/TOTAL" and goes on where the last one ended, else it is answered with 409 and
// where to go on. Who may do it is said by RBAC: the verbs get and update on contentlibraryitems/upload and
// contentlibraryitems/content (and those of the cluster) of the group. The package holds names only.
package contentv1alpha1

import "path"

// The group and its version.
const (
	Group   = "content.atoll.dev"
	Version = "v1alpha1"
)

// The resources and their subresources.
const (
	Items        = "contentlibraryitems"
	ClusterItems = "clustercontentlibraryitems"
	Upload       = "upload"
	Content      = "content"
)

// Parameters of content.
const (
	FormatParameter = "format"
	DiskParameter   = "disk"
)

// Uploaded is how much of an upload is here.
type Uploaded struct {
	Received int64 `json:"received"`
	Total    int64 `json:"total"`
	// Complete: nothing more is wanted.
	Complete bool `json:"complete,omitempty"`
}

// Path of a subresource; without a namespace it is one of an item of the cluster.
func Path(namespace, name, subresource string) string {
	if namespace == "" {
		return path.Join("/apis", Group, Version, ClusterItems, name, subresource)
	}
	return path.Join("/apis", Group, Version, "namespaces", namespace, Items, name, subresource)
}
