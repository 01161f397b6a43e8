package bootstrap

import (
	"fmt"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
)

// peopleManifests are what local users, groups and identity providers need. The first administrator is made by
// `atoll up`, which shows the password; the group is there from the start and its members may do everything.
func peopleManifests() []manifest {
	return []manifest{
		{resource: policies("validatingadmissionpolicies"), text: externalAddresses},
		{resource: policies("validatingadmissionpolicybindings"), text: policyBinding("atoll-external-addresses")},
		{resource: core("namespaces"), text: fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata:
  name: %s
`, atoll.IdentityNamespace)},
		{resource: rbac("clusterroles"), text: identityRole},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:identity", "atoll:identity", "User", pki.IdentityUser)},
		// Hashes of passwords, sessions and secrets of identity providers are for nobody else.
		{resource: rbac("roles"), text: fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: atoll:identity
  namespace: %s
rules:
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get]
`, atoll.IdentityNamespace)},
		{resource: rbac("rolebindings"), text: fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: "atoll:identity"
  namespace: %s
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: "atoll:identity"
subjects:
- apiGroup: rbac.authorization.k8s.io
  kind: User
  name: %q
`, atoll.IdentityNamespace, pki.IdentityUser)},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:administrators", "cluster-admin", "Group", atoll.LocalSubject(atoll.AdministratorsGroup))},
		{resource: atoll.Groups(), once: true, text: fmt.Sprintf(`
apiVersion: atoll.dev/v1alpha1
kind: Group
metadata:
  name: %s
spec:
  members: [%s]
`, atoll.AdministratorsGroup, atoll.FirstAdministrator)},
	}
}

// externalAddresses keeps the addresses of hosts to those who may change hosts: whoever has port 443 of one gets the
// passwords of people.
const externalAddresses = `
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: atoll-external-addresses
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
    - apiGroups: [""]
      apiVersions: [v1]
      operations: [CREATE, UPDATE]
      resources: [services]
  variables:
  - name: wanted
    expression: object.spec.?externalIPs.orValue([])
  - name: had
    expression: 'oldObject == null ? [] : oldObject.spec.?externalIPs.orValue([])'
  validations:
  - expression: variables.wanted.all(a, a in variables.had) || authorizer.group("").resource("nodes").check("update").allowed()
    message: spec.externalIPs takes addresses over, so only administrators may set it; use a Service of type NodePort
    reason: Forbidden
`

// identityRole is what internal/identity needs: to know people, to note their logins, and to tell which namespaces
// they may enter.
const identityRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:identity
rules:
- apiGroups: [atoll.dev]
  resources: [users, groups, identityproviders]
  verbs: [get, list, watch]
- apiGroups: [atoll.dev]
  resources: [users, users/status, identityproviders/status]
  verbs: [patch]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [rolebindings]
  verbs: [list]
- apiGroups: [""]
  resources: [namespaces]
  verbs: [list]
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
- apiGroups: [authorization.k8s.io]
  resources: [subjectaccessreviews]
  verbs: [create]
`
