package bootstrap

import "atoll.dev/atoll/internal/datadir/pki"

// networkManifests are the rights of the part of agents that enforces network policies.
func networkManifests() []manifest {
	return []manifest{
		{resource: rbac("clusterroles"), text: `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:network-policy-agent
rules:
- apiGroups: [""]
  resources: [pods, namespaces]
  verbs: [list, watch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
`},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:network-policy-agent", "atoll:network-policy-agent", "Group", pki.NetworkPolicyGroup)},
	}
}
