package bootstrap

import (
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"atoll.dev/atoll/internal/kube/admission/podruntime"
)

// What a micro-VM costs beside its containers: QEMU, the guest kernel and init,
// and the shim. The scheduler adds it to the pod's requests and the kubelet to
// the limits of the pod's cgroup.
//
// Memory is what an idle pod takes under emulation, which needs more than KVM:
// 58 to 60 MiB of the host with 24 to 300 pods at once, QEMU, shim, page tables and
// the pages of the template that the guest has written among them; and some room.
// What QEMU had before the pod came stays charged to the pool's cgroup, so that in
// the pod's most of this is left for what comes later: translated code, up to 128 MiB
// under emulation, and guest memory that was used once.
//
// CPU is next to nothing when the guest is idle, and so small that 500 pods fit
// a host of two processors.
const (
	overheadMemory = "64Mi"
	overheadCPU    = "2m"
)

// What a virtual machine costs beside its guest's memory, which is the container's request: QEMU with the
// memory of its display and, under emulation, of translated code, page tables, and the shim.
const (
	machineOverheadMemory = "192Mi"
	machineOverheadCPU    = "10m"
)

// manifest is one object as YAML.
type manifest struct {
	resource schema.GroupVersionResource
	text     string
	// once: only made when it is missing.
	once bool
	// replace: deleted and made anew when it cannot become like this.
	replace bool
}

// manifests are all bootstrap objects, namespaces first.
func manifests(cfg Config) []manifest {
	return slices.Concat(systemManifests(cfg), accessManifests(cfg), definitions(), storageManifests(cfg), storageAccessManifests(), networkManifests(cfg), machineManifests(cfg), kindManifests(), imageManifests(), publishManifests(), namespaceManifests(cfg), peopleManifests(), registryManifests())
}

func rbac(resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: resource}
}

func core(resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Version: "v1", Resource: resource}
}

// systemManifests are the namespaces, runtime classes and the cluster's DNS.
func systemManifests(cfg Config) []manifest {
	classes := schema.GroupVersionResource{Group: "node.k8s.io", Version: "v1", Resource: "runtimeclasses"}
	endpoints := schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}
	return []manifest{
		{resource: core("namespaces"), text: fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata:
  name: kube-system
  labels:
    %s: %q
`, podruntime.HostAccessLabel, podruntime.HostAccessAllowed)},
		{resource: classes, text: fmt.Sprintf(`
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: %[1]s
handler: %[1]s
overhead:
  podFixed:
    memory: %[2]s
    cpu: %[3]s
`, podruntime.ClassMicroVM, overheadMemory, overheadCPU)},
		{resource: classes, text: fmt.Sprintf(`
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: %[1]s
handler: %[1]s
overhead:
  podFixed:
    memory: %[2]s
    cpu: %[3]s
`, podruntime.ClassMachine, machineOverheadMemory, machineOverheadCPU)},
		{resource: classes, text: fmt.Sprintf(`
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: %[1]s
handler: %[1]s
`, podruntime.ClassHost)},
		{resource: core("services"), text: fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata:
  name: kube-dns
  namespace: kube-system
  labels:
    k8s-app: kube-dns
    kubernetes.io/name: CoreDNS
spec:
  clusterIP: %s
  ports:
  - {name: dns, port: 53, protocol: UDP, targetPort: %[2]d}
  - {name: dns-tcp, port: 53, protocol: TCP, targetPort: %[2]d}
`, cfg.DNSServiceIP, cfg.DNSPort)},
		{resource: endpoints, text: fmt.Sprintf(`
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kube-dns-atoll
  namespace: kube-system
  labels:
    kubernetes.io/service-name: kube-dns
    endpointslice.kubernetes.io/managed-by: atoll
addressType: IPv4
ports:
- {name: dns, port: %[1]d, protocol: UDP}
- {name: dns-tcp, port: %[1]d, protocol: TCP}
endpoints:
- addresses: [%[2]q]
  nodeName: %[3]s
  conditions: {ready: true}
`, cfg.DNSPort, cfg.DNSEndpoint.String(), cfg.NodeName)},
	}
}

// accessManifests are what components and users may do, and the metrics API.
func accessManifests(cfg Config) []manifest {
	apiServices := schema.GroupVersionResource{Group: "apiregistration.k8s.io", Version: "v1", Resource: "apiservices"}
	return []manifest{
		{resource: rbac("clusterroles"), text: `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:coredns
rules:
- apiGroups: [""]
  resources: [services, namespaces]
  verbs: [list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
`},
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:coredns", "atoll:coredns", "User", "system:coredns")},
		// The API server reads logs, runs exec and scrapes metrics at kubelets.
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:kubelet-api", "system:kubelet-api-admin", "User", "kube-apiserver-kubelet-client")},
		// Kubelets renew their own client certificates.
		{resource: rbac("clusterrolebindings"), text: clusterRoleBinding("atoll:kubelet-renewal", "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient", "Group", "system:nodes")},
		// Who may view or edit a namespace may see what its pods use.
		{resource: rbac("clusterroles"), text: `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: atoll:metrics-reader
  labels:
    rbac.authorization.k8s.io/aggregate-to-view: "true"
    rbac.authorization.k8s.io/aggregate-to-edit: "true"
    rbac.authorization.k8s.io/aggregate-to-admin: "true"
rules:
- apiGroups: [metrics.k8s.io]
  resources: [pods, nodes]
  verbs: [get, list, watch]
`},
		// Served by the API server itself, so there is no service.
		{resource: apiServices, text: `
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata:
  name: v1beta1.metrics.k8s.io
spec:
  group: metrics.k8s.io
  version: v1beta1
  groupPriorityMinimum: 100
  versionPriority: 100
`},
		{resource: core("configmaps"), text: fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata:
  name: atoll
  namespace: kube-public
data:
  version: %q
`, cfg.Version)},
	}
}

func clusterRoleBinding(name, role, kind, subject string) string {
	return fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: %q
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: %q
subjects:
- apiGroup: rbac.authorization.k8s.io
  kind: %s
  name: %q
`, name, role, kind, subject)
}
