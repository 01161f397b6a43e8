package bootstrap

import (
	"fmt"

	"atoll.dev/atoll/internal/datadir/pki"
)

// networkManifests are the rights of the part of agents that enforces network policies, and what keeps the host's own
// ports from load balancers. What the proxy answers at a host's address never gets to the host's programs, and whoever
// may change a Service may change its ports while it has that address; so that is the API server's to refuse. The ports
// are those that the controller of VirtualMachineServices keeps (package vmservice).
func networkManifests(cfg Config) []manifest {
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
		{resource: policies("validatingadmissionpolicies"), text: fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: atoll-host-ports
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
    - apiGroups: [""]
      apiVersions: [v1]
      operations: [CREATE, UPDATE]
      resources: [services, services/status]
  variables:
  - name: same
    expression: >-
      oldObject != null && oldObject.spec.?ports.orValue([]) == object.spec.?ports.orValue([]) &&
      oldObject.?status.loadBalancer.ingress.orValue([]) == object.?status.loadBalancer.ingress.orValue([])
  validations:
  - expression: >-
      variables.same || !object.?status.loadBalancer.ingress.orValue([]).exists(i, i.?ip.orValue("") == %[1]q) ||
      !object.spec.?ports.orValue([]).exists(p, p.port == %[2]d || p.port < 1024 && p.port != 80 ||
      p.port in [2379, 2380, 6443, 9443] || p.port >= 10240 && p.port <= 10260 || p.port >= 30000 && p.port <= 32767)
    messageExpression: >-
      "spec.ports: Service " + object.metadata.name + " has the address %[1]s of the host, where ports below 1024 but 80, %[2]d, 2379, 2380, 6443, 9443, 10240-10260 and 30000-32767 belong to the host; use another port, or change the VirtualMachineService, which then gets an address of its own"
    reason: Forbidden
`, cfg.NodeIP.String(), cfg.Portal)},
		{resource: policies("validatingadmissionpolicybindings"), text: policyBinding("atoll-host-ports")},
	}
}
