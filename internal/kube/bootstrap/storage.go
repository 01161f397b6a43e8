package bootstrap

import (
	"bytes"
	"fmt"

	"k8s.io/apimachinery/pkg/runtime/schema"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
	"atoll.dev/atoll/api/vmoperator"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/keys"
	"atoll.dev/atoll/internal/kube/snapshots"
)

// storageDriver is the name of the CSI driver (internal/storage/csi).
const storageDriver = "csi.atoll.dev"

// DefaultClass is the name of the default StorageClass and VolumeSnapshotClass.
const DefaultClass = "atoll"

// definitions are the CustomResourceDefinitions.
func definitions() []manifest {
	crds := schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
	var out []manifest
	for _, file := range [][]byte{atoll.CRDs, encryption.CRDs, imageregistry.CRDs, snapshots.CRDs, vmoperator.CRDs, netop.CRDs} {
		for doc := range bytes.SplitSeq(file, []byte("---\n")) {
			if len(bytes.TrimSpace(doc)) > 0 {
				out = append(out, manifest{resource: crds, text: "\n" + string(doc)})
			}
		}
	}
	return out
}

// storageManifests are the CSI driver, the default classes and the default datastore.
func storageManifests(cfg Config) []manifest {
	storage := func(r string) schema.GroupVersionResource {
		return schema.GroupVersionResource{Group: "storage.k8s.io", Version: "v1", Resource: r}
	}
	snapshotClasses := schema.GroupVersionResource{Group: "snapshot.storage.k8s.io", Version: "v1", Resource: "volumesnapshotclasses"}
	return []manifest{
		{resource: storage("csidrivers"), replace: true, text: fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata:
  name: %s
spec:
  attachRequired: false
  podInfoOnMount: true
  fsGroupPolicy: File
  storageCapacity: true
  requiresRepublish: false
  seLinuxMount: false
  volumeLifecycleModes: [Persistent]
`, storageDriver)},
		{resource: storage("storageclasses"), once: true, text: fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: %s
  annotations:
    storageclass.kubernetes.io/is-default-class: "true"
provisioner: %s
volumeBindingMode: WaitForFirstConsumer
allowVolumeExpansion: true
reclaimPolicy: Delete
`, DefaultClass, storageDriver)},
		{resource: snapshotClasses, once: true, text: fmt.Sprintf(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotClass
metadata:
  name: %s
  annotations:
    snapshot.storage.kubernetes.io/is-default-class: "true"
driver: %s
deletionPolicy: Delete
`, DefaultClass, storageDriver)},
		{resource: atoll.Datastores(), once: true, text: fmt.Sprintf(`
apiVersion: atoll.dev/v1alpha1
kind: Datastore
metadata:
  name: default
spec:
  directory:
    path: %q
    node: %q
`, cfg.DatastorePath, cfg.NodeName)},
	}
}

// storageAccessManifests are the rights of storage components and of people who use them.
func storageAccessManifests() []manifest {
	return []manifest{
		{resource: core("namespaces"), text: fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata:
  name: %s
`, keys.Namespace)},
		{resource: rbac("roles"), text: fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: atoll:storage-agent
  namespace: %s
rules:
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
`, keys.Namespace)},
		{resource: rbac("rolebindings"), text: roleBinding(keys.Namespace, "atoll:storage-agent", pki.StorageGroup)},
		{resource: rbac("clusterroles"), text: storageAgentRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:storage-agent", "atoll:storage-agent", "Group", pki.StorageGroup)},
		{resource: rbac("roles"), text: storageCapacityRole},
		{resource: rbac("rolebindings"), text: roleBinding("kube-system", "atoll:storage-agent", pki.StorageGroup)},
		{resource: rbac("clusterroles"), text: snapshotControllerRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:snapshot-controller", "atoll:snapshot-controller", "User", pki.SnapshotControllerUser)},
		// Who may edit a namespace may take snapshots and choose keys in it; everybody who may look at it sees
		// both, and the datastores.
		{resource: rbac("clusterroles"), text: storageEditorRole},
		{resource: rbac("clusterroles"), text: storageReaderRole},
	}
}

func roleBinding(namespace, role, group string) string {
	return fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: %[2]q
  namespace: %[1]s
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: %[2]q
subjects:
- apiGroup: rbac.authorization.k8s.io
  kind: Group
  name: %[3]q
`, namespace, role, group)
}

// What an agent's storage components may do: what the deployments of the sidecars give them, without
// secrets, and the datastores.
const storageAgentRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:storage-agent
rules:
- apiGroups: [""]
  resources: [persistentvolumes]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, update, patch]
- apiGroups: [""]
  resources: [persistentvolumeclaims/status]
  verbs: [update, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get]
- apiGroups: [""]
  resources: [nodes]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, update, patch]
- apiGroups: [storage.k8s.io]
  resources: [storageclasses, volumeattributesclasses, csinodes]
  verbs: [get, list, watch]
- apiGroups: [storage.k8s.io]
  resources: [volumeattachments]
  verbs: [get, list, watch, patch]
- apiGroups: [storage.k8s.io]
  resources: [volumeattachments/status]
  verbs: [patch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotclasses]
  verbs: [get, list, watch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshots]
  verbs: [get, list, watch, update]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents]
  verbs: [get, list, watch, update, patch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents/status]
  verbs: [update, patch]
- apiGroups: [atoll.dev]
  resources: [datastores]
  verbs: [get, list, watch, update, patch]
- apiGroups: [vmoperator.vmware.com]
  resources: [virtualmachines]
  verbs: [list]
- apiGroups: [atoll.dev]
  resources: [datastores/status]
  verbs: [update, patch]
- apiGroups: [encryption.vmware.com]
  resources: [encryptionclasses]
  verbs: [get, list, watch]
- apiGroups: [encryption.vmware.com]
  resources: [encryptionclasses/status]
  verbs: [update, patch]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraryitems, clustercontentlibraryitems]
  verbs: [get, list, watch]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraryitems/status, clustercontentlibraryitems/status]
  verbs: [update, patch]
- apiGroups: [vmoperator.vmware.com]
  resources: [virtualmachineimages, clustervirtualmachineimages]
  verbs: [get]
`

const storageCapacityRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: atoll:storage-agent
  namespace: kube-system
rules:
- apiGroups: [storage.k8s.io]
  resources: [csistoragecapacities]
  verbs: [get, list, watch, create, update, patch, delete]
`

const snapshotControllerRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:snapshot-controller
rules:
- apiGroups: [""]
  resources: [persistentvolumes]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, update]
- apiGroups: [""]
  resources: [events]
  verbs: [create, update, patch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotclasses]
  verbs: [get, list, watch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents]
  verbs: [create, get, list, watch, update, delete, patch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents/status]
  verbs: [patch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshots]
  verbs: [get, list, watch, update, patch, delete]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshots/status]
  verbs: [update, patch]
`

const storageEditorRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:storage-editor
  labels:
    rbac.authorization.k8s.io/aggregate-to-edit: "true"
    rbac.authorization.k8s.io/aggregate-to-admin: "true"
rules:
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshots]
  verbs: [create, update, patch, delete, deletecollection]
- apiGroups: [encryption.vmware.com]
  resources: [encryptionclasses]
  verbs: [create, update, patch, delete, deletecollection]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraries, contentlibraryitems, contentlibraryitemimportrequests]
  verbs: [create, update, patch, delete, deletecollection]
`

const storageReaderRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:storage-reader
  labels:
    rbac.authorization.k8s.io/aggregate-to-view: "true"
    rbac.authorization.k8s.io/aggregate-to-edit: "true"
    rbac.authorization.k8s.io/aggregate-to-admin: "true"
rules:
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshots]
  verbs: [get, list, watch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotclasses]
  verbs: [get, list, watch]
- apiGroups: [atoll.dev]
  resources: [datastores]
  verbs: [get, list, watch]
- apiGroups: [encryption.vmware.com]
  resources: [encryptionclasses]
  verbs: [get, list, watch]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraries, contentlibraryitems, contentlibraryitemimportrequests, clustercontentlibraries, clustercontentlibraryitems]
  verbs: [get, list, watch]
`
