package bootstrap

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
)

// imageManifests are what images of virtual machines need in the API server.
func imageManifests() []manifest {
	return []manifest{
		{resource: imageregistry.GroupVersion().WithResource("clustercontentlibraries"), once: true, text: fmt.Sprintf(`
apiVersion: imageregistry.vmware.com/v1alpha1
kind: ClusterContentLibrary
metadata:
  name: %s
  labels:
    %s: "true"
spec:
  writable: true
  allowImport: true
`, imageregistry.DefaultLibrary, imageregistry.DefaultLibraryLabel)},
		{resource: rbac("clusterroles"), text: imageControllerRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:image-controller", "atoll:image-controller", "User", pki.VMControllerUser)},
		{resource: rbac("clusterroles"), text: imageEditorRole},
		// Images that are for all namespaces are for everybody to see.
		{resource: rbac("clusterroles"), text: imageCatalogRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:image-catalog", "atoll:image-catalog", "Group", "system:authenticated")},
		{resource: policies("validatingadmissionpolicies"), text: fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: atoll-rollback
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
    - apiGroups: [""]
      apiVersions: [v1]
      operations: [CREATE, UPDATE]
      resources: [persistentvolumes]
  variables:
  - name: now
    expression: object.metadata.?annotations[?%[1]q].orValue("")
  - name: before
    expression: 'oldObject == null ? "" : oldObject.metadata.?annotations[?%[1]q].orValue("")'
  validations:
  - expression: variables.now == variables.before || request.userInfo.username == %[2]q
    message: the annotation %[1]s is set by the controllers of virtual machines only; set spec.currentSnapshotName of the VirtualMachine
    reason: Forbidden
`, imageregistry.RollbackAnnotation, pki.VMControllerUser)},
		{resource: policies("validatingadmissionpolicybindings"), text: policyBinding("atoll-rollback")},
		{resource: policies("validatingadmissionpolicies"), text: fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: atoll-image-from-volume
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
    - apiGroups: [imageregistry.vmware.com]
      apiVersions: ["*"]
      operations: [CREATE, UPDATE]
      resources: [contentlibraryitems, clustercontentlibraryitems]
  validations:
  - expression: >-
      !has(object.spec) || !has(object.spec.source) || !has(object.spec.source.volume) ||
      (oldObject != null && has(oldObject.spec) && has(oldObject.spec.source) && has(oldObject.spec.source.volume)) ||
      request.userInfo.username == %q || "system:masters" in request.userInfo.groups
    message: spec.source.volume is set by the controllers of virtual machines only; use a VirtualMachinePublishRequest
    reason: Forbidden
`, pki.VMControllerUser)},
		{resource: policies("validatingadmissionpolicybindings"), text: policyBinding("atoll-image-from-volume")},
	}
}

func policies(resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: resource}
}

// policyBinding puts a policy in force; paramRef are the lines that say which objects it is asked about, if any.
func policyBinding(name string, paramRef ...string) string {
	return fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: %[1]s
spec:
  policyName: %[1]s
%[2]s  validationActions: [Deny]
`, name, strings.Join(paramRef, ""))
}

const imageControllerRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:image-controller
rules:
- apiGroups: [""]
  resources: [namespaces]
  verbs: [get, list, watch]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraries, clustercontentlibraries, contentlibraryitems, clustercontentlibraryitems, contentlibraryitemimportrequests]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraries/status, clustercontentlibraries/status, contentlibraryitemimportrequests/status]
  verbs: [get, update, patch]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraryitems/finalizers, clustercontentlibraryitems/finalizers]
  verbs: [update]
- apiGroups: [vmoperator.vmware.com]
  resources: [virtualmachineimages, clustervirtualmachineimages]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [vmoperator.vmware.com]
  resources: [virtualmachineimages/status, clustervirtualmachineimages/status]
  verbs: [get, update, patch]
- apiGroups: [""]
  resources: [persistentvolumes]
  verbs: [get, list, watch, patch, update]
`

const imageEditorRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:image-editor
  labels:
    rbac.authorization.k8s.io/aggregate-to-edit: "true"
    rbac.authorization.k8s.io/aggregate-to-admin: "true"
rules:
- apiGroups: [content.atoll.dev]
  resources: [contentlibraryitems/upload]
  verbs: [get, update]
- apiGroups: [content.atoll.dev]
  resources: [contentlibraryitems/content]
  verbs: [get]
`

const imageCatalogRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:image-catalog
rules:
- apiGroups: [imageregistry.vmware.com]
  resources: [clustercontentlibraries, clustercontentlibraryitems]
  verbs: [get, list, watch]
`
