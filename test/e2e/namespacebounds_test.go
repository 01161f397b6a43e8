//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// boundedNamespace is a SupervisorNamespace that goes with the test, made by `atoll ns create`.
func boundedNamespace(t *testing.T, name string, flags ...string) *namespace {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := kubectl(context.Background(), "", "get", "supervisornamespace", name, "-o", "yaml")
			t.Log(out)
		}
		out, err := exec.Command(suite.atoll, "ns", "delete", name, "--with-contents", "--yes", "--timeout", longPatience.String(), "--data-dir", suite.dataDir).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "no SupervisorNamespace") {
			t.Errorf("deleting %s: %v\n%s", name, err, out)
		}
	})
	contains(t, atollOK(t, append([]string{"ns", "create", name, "--timeout", longPatience.String()}, flags...)...), name+" is ready")
	n := &namespace{t: t, name: name}
	n.account()
	return n
}

// as is kubectl by a person, with nothing but what the access list gives.
func (n *namespace) as(person, yaml string, args ...string) (string, error) {
	args = append([]string{"-n", n.name, "--as", "sso:" + person + "@atoll.local", "--as-group", "system:authenticated"}, args...)
	return kubectl(n.t.Context(), yaml, args...)
}

// refusedOwner applies as anna what must be refused and looks at what the refusal says: the namespace, the limit and who can change it.
func (n *namespace) refusedOwner(yaml string, says ...string) {
	n.t.Helper()
	out, err := n.as("anna", yaml, "create", "-f", "-")
	if err == nil {
		n.t.Errorf("accepted, but should have been refused:\n%s", yaml)
		return
	}
	for _, want := range append(says, fmt.Sprintf("namespace %q", n.name), "administrators can change it: atoll ns edit "+n.name, "owners: sso:anna@atoll.local") {
		if !strings.Contains(out, want) {
			n.t.Errorf("want %q in:\n%s", want, out)
		}
	}
}

// boundedPod is a pod with more in its spec and in its container.
func boundedPod(name, image, spec, container string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 0
%s
  containers:
  - {name: main, image: %s, imagePullPolicy: IfNotPresent, command: [sleep, "100000"]%s}
`, name, spec, image, container)
}

// TestNamespaceBounds: an owner meets each limit that quota cannot enforce, and quota itself; every refusal says what
// the limit is and who can change it, and what is within the limits runs.
func TestNamespaceBounds(t *testing.T) {
	t.Parallel()
	node := strings.TrimSpace(run(t, "", "get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"))
	n := boundedNamespace(t, "bounds-shop", "--owner", "anna", "--view", "victor", "--cpu-limit", "2", "--memory-limit", "1Gi",
		"--cpu-limit-default", "100m", "--memory-limit-default", "64Mi", "--cpu-request-default", "10m", "--memory-request-default", "32Mi",
		"--storage-class", "atoll=2Gi", "--vm-class", "best-effort-small", "--content-library", "namespace:default",
		"--image", "docker.io/library/*", "--host", node, "--count", "pods=3")
	const busybox = "docker.io/library/busybox:latest"

	eventually(t, "the role of anna to count", func() error {
		_, err := n.as("anna", "", "auth", "can-i", "create", "pods")
		return err
	})
	if out, err := n.as("anna", boundedPod("web", busybox, "", ""), "create", "-f", "-"); err != nil {
		t.Fatalf("a pod within all limits: %v\n%s", err, out)
	}
	affinity := n.field("pod/web", ".spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution")
	contains(t, affinity, "kubernetes.io/hostname")
	n.ready("web")
	if out, err := n.as("victor", boundedPod("unseen", busybox, "", ""), "create", "-f", "-"); err == nil || !strings.Contains(out, `User "sso:victor@atoll.local" cannot create`) {
		t.Errorf("a viewer makes a pod: %v\n%s", err, out)
	}

	n.refusedOwner(boundedPod("a", "registry.example/web", "", ""), "limit spec.images", "only docker.io/library/* may be used", "asked: spec.containers[0].image registry.example/web")
	n.refusedOwner(boundedPod("b", busybox, "", ", securityContext: {privileged: true}"), "limit spec.podRuntime.privilegedAllowed")
	n.refusedOwner(boundedPod("c", busybox, "  hostNetwork: true", ""), "limit spec.podRuntime.policy", "asked: spec.hostNetwork")
	n.refusedOwner(boundedPod("d", busybox, "  runtimeClassName: runc", ""), "limit spec.podRuntime.policy", `asked: spec.runtimeClassName "runc"`)
	n.refusedOwner(boundedPod("e", busybox, "  nodeName: elsewhere", ""), "limit spec.hosts", "asked: spec.nodeName elsewhere")
	n.refusedOwner(boundedPod("f", busybox, "", ", resources: {requests: {cpu: 10m}, limits: {cpu: 3, memory: 64Mi}}"), "exceeded quota", "requested: limits.cpu", "used: limits.cpu", "limited: limits.cpu=2")
	n.refusedOwner(claim("g", "other", ""), "limit spec.storageClasses", "only atoll may be used", `asked: spec.storageClassName "other"`)
	n.refusedOwner(strings.Replace(claim("h", "atoll", ""), "storage: 64Mi", "storage: 3Gi", 1), "exceeded quota", "atoll.storageclass.storage.k8s.io/requests.storage")
	machine := `
apiVersion: vmoperator.vmware.com/%s
kind: VirtualMachine
metadata: {name: box}
spec: {className: %s, storageClass: %s, image: {kind: ClusterVirtualMachineImage, name: vmi-none}}
`
	n.refusedOwner(fmt.Sprintf(machine, "v1alpha5", "guaranteed-8xlarge", "atoll"), "limit spec.vmClasses", "asked: spec.className guaranteed-8xlarge")
	n.refusedOwner(fmt.Sprintf(machine, "v1alpha3", "best-effort-small", "other"), "limit spec.storageClasses")
	n.refusedOwner(fmt.Sprintf(machine, "v1alpha5", "best-effort-small", "atoll"), "limit spec.contentSources", "asked: image ClusterVirtualMachineImage/vmi-none of no library")

	// What bounds the namespace is not for those to change who have every right in it.
	n.kubectl("create", "rolebinding", "all", "--clusterrole", "cluster-admin", "--user", "sso:mallory@atoll.local")
	eventually(t, "what binds her to hold", func() error {
		_, err := n.as("mallory", "", "auth", "can-i", "*", "*")
		return err
	})
	if out, err := n.as("mallory", "", "debug", "web", "--image", "registry.example/debug", "--profile", "baseline", "--quiet", "--attach=false"); err == nil || !strings.Contains(out, "limit spec.images") {
		t.Errorf("an ephemeral container: %v\n%s", err, out)
	}
	for _, args := range [][]string{
		{"delete", "resourcequota", n.name + "-quota"},
		{"patch", "resourcequota", n.name + "-quota", "--type=merge", "-p", `{"spec":{"hard":{"limits.cpu":"100"}}}`},
		{"delete", "rolebinding", "-l", "atoll.dev/supervisor-namespace"},
		{"label", "namespace", n.name, "--overwrite", "pod-security.kubernetes.io/enforce=privileged"},
	} {
		out, err := n.as("mallory", "", args...)
		if err == nil || !strings.Contains(out, "only administrators change it") || !strings.Contains(out, "atoll ns edit "+n.name) {
			t.Errorf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	out, err := n.as("anna", `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: mine, labels: {atoll.dev/tier: administrator}}
spec: {podSelector: {}, policyTypes: [Ingress]}
`, "create", "-f", "-")
	if err == nil || !strings.Contains(out, "only administrators make objects with this label") {
		t.Errorf("a policy of administrators: %v\n%s", err, out)
	}

	// The administrator shrinks a limit below what is used: nothing is evicted, and it is shown.
	contains(t, atollOK(t, "ns", "edit", n.name, "--count", "pods=0"), n.name+" is changed")
	eventually(t, "the namespace to be over its limit", func() error {
		if out, err := tryHost(t.Context(), "", "ns", "ls", n.name); err != nil || !strings.Contains(out, "OverLimit") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	n.ready("web")
	contains(t, atollOK(t, "ns", "describe", n.name), "Owners:")
	eventually(t, "the pod to be among what uses most", func() error {
		if out, err := tryHost(t.Context(), "", "ns", "top", n.name); err != nil || !strings.Contains(out, "web") {
			return fmt.Errorf("that is %q", out)
		}
		return nil
	})
	left, err := exec.CommandContext(t.Context(), suite.atoll, "ns", "delete", n.name, "--data-dir", suite.dataDir).CombinedOutput()
	if err == nil || !strings.Contains(string(left), "is not empty, there are 1 pods in it; --with-contents deletes them too") {
		t.Errorf("deleting it with a pod in it: %v\n%s", err, left)
	}
}

// TestReservedResources: what is reserved for one namespace, others cannot request, with pods or machines, and it can.
func TestReservedResources(t *testing.T) {
	t.Parallel()
	reserving := boundedNamespace(t, "bounds-reserved", "--memory-reservation", "160Mi", "--cpu-reservation", "300m")
	plain := machines(t)
	node := map[string]string{}
	for resource, field := range map[string]string{"memory": "memoryReservation", "cpu": "cpuReservation"} {
		all := run(t, "", "get", "nodes", "-o", "jsonpath={.items[*].status.allocatable."+resource+"}")
		first, _, _ := strings.Cut(all, " ")
		node[resource] = strings.TrimSpace(first)
		greedy := boundedPod("greedy", "docker.io/library/busybox:1.36", "", ", resources: {requests: {"+resource+": "+node[resource]+"}}")
		eventually(t, "the reservation of "+resource+" to hold", func() error {
			out, err := kubectl(t.Context(), greedy, "-n", plain.name, "create", "--dry-run=server", "-f", "-")
			if err == nil {
				return fmt.Errorf("it is accepted: %s", out)
			}
			if !strings.Contains(out, "limit spec.resources."+field+" of other namespaces") || !strings.Contains(out, "administrators can change it") {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		if out, err := kubectl(t.Context(), greedy, "-n", reserving.name, "create", "--dry-run=server", "-f", "-"); err != nil {
			t.Errorf("the namespace that has reserved %s: %v\n%s", resource, err, out)
		}
		contains(t, plain.refused(greedy), "limit spec.resources."+field+" of other namespaces")
	}
	plain.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineClass
metadata: {name: greedy}
spec: {hardware: {cpus: 1, memory: %[1]s}, policies: {resources: {requests: {memory: %[1]s}}}}
`, node["memory"]))
	plain.apply(machine("greedy", "greedy"))
	plain.condition("greedy", "VirtualMachineConditionPlacementReady", "False", "limit spec.resources.memoryReservation of other namespaces")
	equal(t, "pods that are too large", plain.kubectl("get", "pods", "-o", "name"), "")
	// The reserved is for whom it is reserved for, and others have the rest.
	reserving.apply(boundedPod("own", "docker.io/library/busybox:1.36", "", ", resources: {requests: {memory: 64Mi, cpu: 200m}}"))
	reserving.ready("own")
	plain.apply(boundedPod("modest", "docker.io/library/busybox:1.36", "", ", resources: {requests: {memory: 1Mi}}"))
	plain.ready("modest")
}
