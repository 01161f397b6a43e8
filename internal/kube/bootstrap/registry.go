package bootstrap

import (
	"fmt"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
)

// RegistryOperator is the service account of kube-system that `atoll registry` acts as for who has a client certificate,
// which the registry does not take, and may make tokens for it.
const RegistryOperator = "atoll-registry-operator"

// registryManifests are what the registry and its users may do. Rights in it are those on repositories.registry.atoll.dev,
// which no API serves: the registry asks for them.
func registryManifests() []manifest {
	return []manifest{
		{resource: rbac("clusterroles"), text: registryRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:registry", "atoll:registry", "User", pki.RegistryUser)},
		{resource: rbac("clusterroles"), text: registryNodeRole()},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:registry-node", "atoll:registry-node", "Group", "system:nodes")},
		{resource: rbac("clusterroles"), text: registryControllerRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:registry-controller", "atoll:registry-controller", "User", pki.VMControllerUser)},
		{resource: core("serviceaccounts"), text: fmt.Sprintf(`
apiVersion: v1
kind: ServiceAccount
metadata:
  name: %s
  namespace: kube-system
automountServiceAccountToken: false
`, RegistryOperator)},
		// Hosts read images of virtual machines as this one.
		{resource: core("serviceaccounts"), text: `
apiVersion: v1
kind: ServiceAccount
metadata:
  name: atoll-registry-reader
  namespace: kube-system
automountServiceAccountToken: false
`},
		{resource: rbac("clusterrolebindings"), text: `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: atoll:registry-reader
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: atoll:registry-puller
subjects:
- kind: ServiceAccount
  name: atoll-registry-reader
  namespace: kube-system
`},
		// Hosts push the disks of virtual machines that are published as this one, which may do nothing else.
		{resource: core("serviceaccounts"), text: `
apiVersion: v1
kind: ServiceAccount
metadata:
  name: atoll-registry-publisher
  namespace: kube-system
automountServiceAccountToken: false
`},
		{resource: rbac("clusterroles"), text: registryPublisherRole},
		{resource: rbac("clusterrolebindings"), text: `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: atoll:registry-publisher
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: atoll:registry-publisher
subjects:
- kind: ServiceAccount
  name: atoll-registry-publisher
  namespace: kube-system
`},
		{resource: rbac("roles"), text: `
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: atoll:registry-reader-token
  namespace: kube-system
rules:
- apiGroups: [""]
  resources: [serviceaccounts/token]
  resourceNames: [atoll-registry-reader, atoll-registry-publisher]
  verbs: [create]
`},
		{resource: rbac("rolebindings"), text: fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: atoll:registry-reader-token
  namespace: kube-system
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: atoll:registry-reader-token
subjects:
- apiGroup: rbac.authorization.k8s.io
  kind: Group
  name: %q
`, pki.StorageGroup)},
		{resource: rbac("clusterroles"), text: registryOperatorRole},
		{resource: rbac("clusterrolebindings"), text: fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: atoll:registry-operator
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: atoll:registry-operator
subjects:
- kind: ServiceAccount
  name: %s
  namespace: kube-system
`, RegistryOperator)},
	}
}

const registryRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:registry
rules:
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
- apiGroups: [authorization.k8s.io]
  resources: [subjectaccessreviews]
  verbs: [create]
- apiGroups: [""]
  resources: [namespaces]
  verbs: [get, list, watch]
- apiGroups: [atoll.dev]
  resources: [supervisornamespaces, robotaccounts, registryconfigurations]
  verbs: [get, list, watch]
`

// registryNodeRole lets kubelets make tokens of the pods' service accounts for the registry, and hosts see how to reach it.
func registryNodeRole() string {
	return fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:registry-node
rules:
- apiGroups: [""]
  resources: [%q]
  verbs: [request-serviceaccounts-token-audience]
- apiGroups: [atoll.dev]
  resources: [registryconfigurations]
  verbs: [get, list, watch]
`, atoll.RegistryAudience)
}

const registryControllerRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:registry-controller
rules:
- apiGroups: [atoll.dev]
  resources: [robotaccounts]
  verbs: [get, list, watch]
- apiGroups: [atoll.dev]
  resources: [robotaccounts/status]
  verbs: [get, update, patch]
- apiGroups: [atoll.dev]
  resources: [robotaccounts/finalizers]
  verbs: [update]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [rolebindings]
  verbs: [get, create]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [clusterroles]
  resourceNames: ["atoll:registry-puller"]
  verbs: [bind]
`

const registryPublisherRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:registry-publisher
rules:
- apiGroups: [registry.atoll.dev]
  resources: [repositories]
  verbs: [get, update]
`

const registryOperatorRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:registry-operator
rules:
- apiGroups: [registry.atoll.dev]
  resources: [repositories]
  verbs: [get, list, update, delete]
`
