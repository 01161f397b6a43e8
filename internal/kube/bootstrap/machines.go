package bootstrap

import (
	"encoding/base64"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"atoll.dev/atoll/api/vmoperator"
	"atoll.dev/atoll/internal/datadir/pki"
)

// webhook is one webhook of the manager of virtual machines.
type webhook struct {
	// resource of v1alpha5, kind in lower case, which is part of the path.
	resource string
	kind     string
	// mutating and validating are the operations it is called at; empty is never.
	mutating   string
	validating string
}

// webhooks are what internal/controllers serves.
func webhooks() []webhook {
	return []webhook{
		{resource: "virtualmachines", kind: "virtualmachine", mutating: "CREATE, UPDATE", validating: "CREATE, UPDATE"},
	}
}

// machineManifests are what virtual machines need in the API server.
func machineManifests(cfg Config) []manifest {
	configurations := func(r string) schema.GroupVersionResource {
		return schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: r}
	}
	return []manifest{
		{resource: rbac("clusterroles"), text: vmControllerRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:vm-controller", "atoll:vm-controller", "User", pki.VMControllerUser)},
		// Who may edit a namespace may run virtual machines in it, of the classes and images that are there.
		{resource: rbac("clusterroles"), text: vmEditorRole},
		{resource: rbac("clusterroles"), text: vmAdminRole},
		{resource: rbac("clusterroles"), text: vmReaderRole},
		// Images that are for all namespaces are for everybody to see.
		{resource: rbac("clusterroles"), text: vmCatalogRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:vm-catalog", "atoll:vm-catalog", "Group", "system:authenticated")},
		{resource: core("configmaps"), text: capabilities},
		{resource: configurations("mutatingwebhookconfigurations"), text: webhookConfiguration(cfg, "MutatingWebhookConfiguration", "mutate", func(w webhook) string { return w.mutating })},
		{resource: configurations("validatingwebhookconfigurations"), text: webhookConfiguration(cfg, "ValidatingWebhookConfiguration", "validate", func(w webhook) string { return w.validating })},
	}
}

// webhookURL is an address that the API server calls.
func webhookURL(cfg Config, path string) string {
	return fmt.Sprintf("https://127.0.0.1:%d/%s", cfg.WebhookPort, path)
}

func webhookConfiguration(cfg Config, kind, verb string, operations func(webhook) string) string {
	var out strings.Builder
	fmt.Fprintf(&out, `
apiVersion: admissionregistration.k8s.io/v1
kind: %s
metadata:
  name: atoll-virtual-machines
webhooks:
`, kind)
	for _, w := range webhooks() {
		if operations(w) == "" {
			continue
		}
		path := strings.Join([]string{verb, strings.ReplaceAll(vmoperator.Group, ".", "-"), vmoperator.Version, w.kind}, "-")
		fmt.Fprintf(&out, `- name: %s.%s.atoll.dev
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  matchPolicy: Equivalent
  timeoutSeconds: 30
  clientConfig:
    url: %s
    caBundle: %s
  rules:
  - apiGroups: [%s]
    apiVersions: [%s]
    operations: [%s]
    resources: [%s]
`, verb, w.kind, webhookURL(cfg, path), base64.StdEncoding.EncodeToString(cfg.WebhookCA), vmoperator.Group, vmoperator.Version, operations(w), w.resource)
	}
	return out.String()
}

// setConversion has the API server convert between the versions of a kind through our webhook.
func setConversion(cfg Config, definition *unstructured.Unstructured) error {
	group, _, _ := unstructured.NestedString(definition.Object, "spec", "group")
	versions, _, _ := unstructured.NestedSlice(definition.Object, "spec", "versions")
	if definition.GetKind() != "CustomResourceDefinition" || group != vmoperator.Group || len(versions) < 2 {
		return nil
	}
	// Class instances are the same in all their versions, and have no conversion.
	if strings.HasPrefix(definition.GetName(), "virtualmachineclassinstances.") {
		return nil
	}
	return unstructured.SetNestedMap(definition.Object, map[string]any{
		"strategy": "Webhook",
		"webhook": map[string]any{
			"conversionReviewVersions": []any{"v1"},
			"clientConfig": map[string]any{
				"url":      webhookURL(cfg, "convert"),
				"caBundle": base64.StdEncoding.EncodeToString(cfg.WebhookCA),
			},
		},
	}, "spec", "conversion")
}

// capabilities tells clients of VMware's API what there is.
const capabilities = `
apiVersion: v1
kind: ConfigMap
metadata:
  name: wcp-cluster-capabilities
  namespace: kube-system
data:
  supports_VM_service_VM_snapshots: "true"
  supports_VM_service_mutable_networks: "false"
  supports_VM_service_ISO_deployment: "true"
  supports_VM_service_VM_groups: "true"
  supports_BYOK_encryption: "true"
  supports_multiple_vds_networks: "true"
  supports_foundation_load_balancer: "false"
`

const vmControllerRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:vm-controller
rules:
- apiGroups: [vmoperator.vmware.com]
  resources: ["*"]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [netoperator.vmware.com]
  resources: [networks, networks/status, networkinterfaces, networkinterfaces/status]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [pods/resize]
  verbs: [get, update, patch]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [persistentvolumes, nodes, namespaces, resourcequotas, services]
  verbs: [get, list, watch]
# Secrets are read by name: user data that a virtual machine names.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get]
- apiGroups: ["", events.k8s.io]
  resources: [events]
  verbs: [create, update, patch]
- apiGroups: [storage.k8s.io]
  resources: [storageclasses]
  verbs: [get, list, watch]
- apiGroups: [storage.k8s.io]
  resources: [volumeattachments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [encryption.vmware.com]
  resources: [encryptionclasses]
  verbs: [get, list, watch]
- apiGroups: [atoll.dev]
  resources: [datastores]
  verbs: [get, list, watch]
`

const vmEditorRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:vm-editor
  labels:
    rbac.authorization.k8s.io/aggregate-to-edit: "true"
    rbac.authorization.k8s.io/aggregate-to-admin: "true"
rules:
- apiGroups: [vmoperator.vmware.com]
  resources:
  - virtualmachines
  - virtualmachineservices
  - virtualmachinesetresourcepolicies
  - virtualmachinepublishrequests
  - virtualmachinegroups
  - virtualmachinegrouppublishrequests
  - virtualmachinesnapshots
  - virtualmachinereplicasets
  - virtualmachinereplicasets/scale
  - virtualmachinewebconsolerequests
  - webconsolerequests
  verbs: [create, update, patch, delete, deletecollection]
`

// vmAdminRole is for who owns a namespace.
const vmAdminRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:vm-admin
  labels:
    rbac.authorization.k8s.io/aggregate-to-admin: "true"
rules:
- apiGroups: [vmoperator.vmware.com]
  resources: [virtualmachineclasses]
  verbs: [create, update, patch, delete, deletecollection]
`

const vmReaderRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:vm-reader
  labels:
    rbac.authorization.k8s.io/aggregate-to-view: "true"
    rbac.authorization.k8s.io/aggregate-to-edit: "true"
    rbac.authorization.k8s.io/aggregate-to-admin: "true"
rules:
- apiGroups: [vmoperator.vmware.com]
  resources: ["*"]
  verbs: [get, list, watch]
- apiGroups: [netoperator.vmware.com]
  resources: [networks, networkinterfaces]
  verbs: [get, list, watch]
`

const vmCatalogRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:vm-catalog
rules:
- apiGroups: [vmoperator.vmware.com]
  resources: [clustervirtualmachineimages]
  verbs: [get, list, watch]
`
