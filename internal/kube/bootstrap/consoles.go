package bootstrap

import (
	"fmt"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
)

// kindManifests are what the kinds around VirtualMachine need, and their consoles.
func kindManifests() []manifest {
	apiServices := schema.GroupVersionResource{Group: "apiregistration.k8s.io", Version: "v1", Resource: "apiservices"}
	return []manifest{
		{resource: rbac("clusterroles"), text: vmKindsRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:vm-kinds", "atoll:vm-kinds", "User", pki.VMControllerUser)},
		// Who may change a virtual machine may use its consoles.
		{resource: rbac("clusterroles"), text: fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:vm-console
  labels:
    rbac.authorization.k8s.io/aggregate-to-edit: "true"
    rbac.authorization.k8s.io/aggregate-to-admin: "true"
rules:
- apiGroups: [%s]
  resources: [%[2]s/%[3]s, %[2]s/%[4]s]
  verbs: [get]
`, subresources.Group, subresources.Resource, subresources.Console, subresources.VNC)},
		// A web console is for whoever has a ticket, and a browser has nothing else.
		{resource: rbac("clusterroles"), text: fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:web-console
rules:
- nonResourceURLs: [%s, %s]
  verbs: [get, head]
`, subresources.WebConsolePage, subresources.WebConsoleStream)},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:web-console", "atoll:web-console", "Group", "system:unauthenticated")},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:web-console-users", "atoll:web-console", "Group", "system:authenticated")},
		// Served by the API server itself, so there is no service.
		{resource: apiServices, text: fmt.Sprintf(`
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata:
  name: %[2]s.%[1]s
spec:
  group: %[1]s
  version: %[2]s
  groupPriorityMinimum: 100
  versionPriority: 100
`, subresources.Group, subresources.Version)},
	}
}

// vmKindsRole is what the controllers of the kinds around VirtualMachine need beside those of VirtualMachines.
const vmKindsRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:vm-kinds
rules:
- apiGroups: [""]
  resources: [services, endpoints]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [endpoints/restricted]
  verbs: [create]
- apiGroups: [""]
  resources: [services/status]
  verbs: [update, patch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices/restricted]
  verbs: [create]
- apiGroups: [""]
  resources: [persistentvolumes]
  verbs: [patch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshots]
  verbs: [get, list, watch, create, delete]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents]
  verbs: [get, list, watch, create, delete]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraries]
  verbs: [get, list, watch]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraryitems]
  verbs: [get, list, watch, create, delete]
`

// setSelector gives replica sets what autoscalers look for: the selector as text, which the type does not have. Its
// controller writes it.
func setSelector(definition *unstructured.Unstructured) error {
	if definition.GetKind() != "CustomResourceDefinition" || definition.GetName() != "virtualmachinereplicasets.vmoperator.vmware.com" {
		return nil
	}
	versions, _, err := unstructured.NestedSlice(definition.Object, "spec", "versions")
	if err != nil {
		return err
	}
	for _, v := range versions {
		version, ok := v.(map[string]any)
		if !ok {
			return fmt.Errorf("a version is a %T", v)
		}
		if err := unstructured.SetNestedField(version, "string", "schema", "openAPIV3Schema", "properties", "status", "properties", "selector", "type"); err != nil {
			return err
		}
		if err := unstructured.SetNestedField(version, ".status.selector", "subresources", "scale", "labelSelectorPath"); err != nil {
			return err
		}
	}
	return unstructured.SetNestedSlice(definition.Object, versions, "spec", "versions")
}
