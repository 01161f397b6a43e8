package bootstrap

import (
	"encoding/base64"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
)

// namespaceManifests are the roles that people have in namespaces, and what SupervisorNamespaces need.
func namespaceManifests(cfg Config) []manifest {
	configurations := func(r string) schema.GroupVersionResource {
		return schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: r}
	}
	return []manifest{
		{resource: rbac("clusterroles"), text: aggregatedRole("atoll:view", "rbac.authorization.k8s.io/aggregate-to-view", "atoll.dev/aggregate-to-view")},
		{resource: rbac("clusterroles"), text: aggregatedRole("atoll:edit", "rbac.authorization.k8s.io/aggregate-to-edit", "atoll.dev/aggregate-to-edit")},
		{resource: rbac("clusterroles"), text: aggregatedRole("atoll:owner", "rbac.authorization.k8s.io/aggregate-to-edit", "atoll.dev/aggregate-to-edit", "atoll.dev/aggregate-to-owner")},
		{resource: rbac("clusterroles"), text: registryReaderRole},
		{resource: rbac("clusterroles"), text: registryEditorRole},
		{resource: rbac("clusterroles"), text: podEditorRole},
		// Pods pull with the service accounts of their namespace.
		{resource: rbac("clusterroles"), text: registryPullerRole},
		// What people may do whom an administrator offers templates; the webhooks bound it.
		{resource: rbac("clusterroles"), text: selfServiceRole},
		{resource: rbac("clusterroles"), text: namespaceControllerRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:namespace-controller", "atoll:namespace-controller", "User", pki.NamespaceControllerUser)},
		{resource: configurations("mutatingwebhookconfigurations"), text: namespaceWebhooks(cfg, "MutatingWebhookConfiguration", "mutate")},
		{resource: configurations("validatingwebhookconfigurations"), text: namespaceWebhooks(cfg, "ValidatingWebhookConfiguration", "validate")},
	}
}

// aggregatedRole consists of all ClusterRoles that have one of the labels.
func aggregatedRole(name string, labels ...string) string {
	var out strings.Builder
	fmt.Fprintf(&out, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: %s
aggregationRule:
  clusterRoleSelectors:
`, name)
	for _, l := range labels {
		fmt.Fprintf(&out, "  - matchLabels: {%s: \"true\"}\n", l)
	}
	return out.String()
}

// namespaceWebhook is one webhook of internal/controllers/supervisornamespace/admission.
type namespaceWebhook struct {
	verb, kind, group, version, resource, operations string
	// condition is who it is asked for, in CEL; selector a label that the object must have.
	condition, selector string
}

func allNamespaceWebhooks() []namespaceWebhook {
	return []namespaceWebhook{
		{verb: "mutate", kind: "supervisornamespace", group: atoll.GroupVersion().Group, version: atoll.GroupVersion().Version, resource: "supervisornamespaces", operations: "CREATE, UPDATE"},
		{verb: "validate", kind: "supervisornamespace", group: atoll.GroupVersion().Group, version: atoll.GroupVersion().Version, resource: "supervisornamespaces", operations: "CREATE, UPDATE"},
		{verb: "validate", kind: "supervisornamespacetemplate", group: atoll.GroupVersion().Group, version: atoll.GroupVersion().Version, resource: "supervisornamespacetemplates", operations: "CREATE, UPDATE, DELETE"},
		// Namespaces that people make; what the system and its administrators make by certificates is not asked for.
		{
			verb: "mutate", kind: "namespace", version: "v1", resource: "namespaces", operations: "CREATE",
			condition: fmt.Sprintf("request.userInfo.username.startsWith('%s')", atoll.SubjectPrefix),
		},
		{
			verb: "validate", kind: "namespace", version: "v1", resource: "namespaces", operations: "DELETE", selector: atoll.SupervisorNamespaceLabel,
			condition: fmt.Sprintf("request.userInfo.username != '%s'", pki.NamespaceControllerUser),
		},
	}
}

func namespaceWebhooks(cfg Config, kind, verb string) string {
	var out strings.Builder
	fmt.Fprintf(&out, `
apiVersion: admissionregistration.k8s.io/v1
kind: %s
metadata:
  name: atoll-supervisor-namespaces
webhooks:
`, kind)
	for _, w := range allNamespaceWebhooks() {
		if w.verb != verb {
			continue
		}
		path := strings.Join([]string{verb, strings.ReplaceAll(w.group, ".", "-"), w.version, w.kind}, "-")
		fmt.Fprintf(&out, `- name: %s.%s.atoll.dev
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 30
  clientConfig:
    url: %s
    caBundle: %s
  rules:
  - apiGroups: [%q]
    apiVersions: [%s]
    operations: [%s]
    resources: [%s]
`, verb, w.kind, webhookURL(cfg, path), base64.StdEncoding.EncodeToString(cfg.WebhookCA), w.group, w.version, w.operations, w.resource)
		if w.condition != "" {
			fmt.Fprintf(&out, "  matchConditions:\n  - name: who\n    expression: %q\n", w.condition)
		}
		if w.selector != "" {
			fmt.Fprintf(&out, "  objectSelector:\n    matchExpressions:\n    - {key: %s, operator: Exists}\n", w.selector)
		}
	}
	return out.String()
}

const registryReaderRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:registry-reader
  labels:
    atoll.dev/aggregate-to-view: "true"
    atoll.dev/aggregate-to-edit: "true"
rules:
- apiGroups: [registry.atoll.dev]
  resources: [repositories]
  verbs: [get, list]
`

const registryEditorRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:registry-editor
  labels:
    atoll.dev/aggregate-to-edit: "true"
rules:
- apiGroups: [registry.atoll.dev]
  resources: [repositories]
  verbs: [update, delete]
- apiGroups: [atoll.dev]
  resources: [robotaccounts]
  verbs: [get, list, watch, create, update, patch, delete]
`

// podEditorRole is for kubectl debug and resizing in place, which upstream's edit does not have; what they ask for is held to
// the bounds and quotas of the namespace.
const podEditorRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:pod-editor
  labels:
    atoll.dev/aggregate-to-edit: "true"
rules:
- apiGroups: [""]
  resources: [pods/ephemeralcontainers, pods/resize]
  verbs: [get, update, patch]
`

const registryPullerRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:registry-puller
rules:
- apiGroups: [registry.atoll.dev]
  resources: [repositories]
  verbs: [get]
`

const selfServiceRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:self-service
rules:
- apiGroups: [atoll.dev]
  resources: [supervisornamespaces]
  verbs: [create]
- apiGroups: [atoll.dev]
  resources: [supervisornamespacetemplates]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [namespaces]
  verbs: [create]
`

// namespaceControllerRole holds what the controller gives to owners as well, since nobody can give what they do not have.
const namespaceControllerRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:namespace-controller
rules:
- apiGroups: [atoll.dev]
  resources: [supervisornamespaces, supervisornamespacetemplates]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [atoll.dev]
  resources: [supervisornamespaces/status, supervisornamespacetemplates/status]
  verbs: [get, update, patch]
- apiGroups: [atoll.dev]
  resources: [supervisornamespaces/finalizers]
  verbs: [update]
- apiGroups: [atoll.dev]
  resources: [users, groups, identityproviders]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [namespaces, resourcequotas, limitranges]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [rolebindings, clusterroles, clusterrolebindings]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [clusterroles]
  resourceNames: ["atoll:owner", "atoll:edit", "atoll:view", "atoll:registry-puller", "atoll:self-service"]
  verbs: [bind]
- apiGroups: [vmoperator.vmware.com]
  resources: [virtualmachineclasses]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# What is in a namespace that is to be deleted.
- apiGroups: [""]
  resources: [persistentvolumeclaims, services]
  verbs: [list]
- apiGroups: [apps]
  resources: [deployments, statefulsets, daemonsets]
  verbs: [list]
- apiGroups: [batch]
  resources: [jobs, cronjobs]
  verbs: [list]
- apiGroups: [vmoperator.vmware.com]
  resources: [virtualmachines, virtualmachinereplicasets, virtualmachinesnapshots]
  verbs: [list]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshots]
  verbs: [list]
- apiGroups: [imageregistry.vmware.com]
  resources: [contentlibraryitems]
  verbs: [list]
- apiGroups: [authorization.k8s.io]
  resources: [subjectaccessreviews]
  verbs: [create]
`
