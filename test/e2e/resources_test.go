//go:build e2e

package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
)

func TestResizeInPlace(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: box}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: box
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sleep, "100000"]
      resources: {requests: {cpu: 100m, memory: 64Mi}, limits: {cpu: 500m, memory: 64Mi}}
`)
	n.ready("box")
	limit := func(file string) string { return strings.TrimSpace(n.exec("box", "cat", "/sys/fs/cgroup/"+file)) }
	equal(t, "memory.max", limit("memory.max"), strconv.Itoa(64<<20))
	equal(t, "cpu.max", limit("cpu.max"), "50000 100000")
	restarts := n.field("pod/box", ".status.containerStatuses[0].restartCount") // of starts for which a busy host had no time
	n.kubectl("patch", "pod", "box", "--subresource", "resize", "--type", "strategic", "-p",
		`{"spec":{"containers":[{"name":"box","resources":{"requests":{"cpu":"100m","memory":"64Mi"},"limits":{"cpu":"2","memory":"1Gi"}}}]}}`)
	eventually(t, "the new limits", func() error {
		return n.execIs("box", fmt.Sprintf("%d\n200000 100000\n", 1<<30), "sh", "-c", "cd /sys/fs/cgroup; cat memory.max cpu.max")
	})
	equal(t, "restarts", n.field("pod/box", ".status.containerStatuses[0].restartCount"), restarts)
	// The machine itself must have grown, not only the limit.
	eventually(t, "memory and CPUs of the micro-VM", func() error {
		out, err := n.tryExec("box", "sh", "-c", "grep MemTotal /proc/meminfo; nproc")
		if err != nil {
			return err
		}
		var kib, processors int
		if _, err := fmt.Sscanf(out, "MemTotal: %d kB\n%d", &kib, &processors); err != nil || kib < 1<<20 || processors != 2 {
			return fmt.Errorf("got %q, %w", out, err)
		}
		return nil
	})
}

// TestSmallCPULimit: a limit that would not be enough for the micro-VM itself holds for the container, and
// is no reason for the pod not to start or to answer.
func TestSmallCPULimit(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(strings.Replace(sleeper, "command:", "resources: {requests: {cpu: 2m}, limits: {cpu: 10m}}, command:", 1))
	n.ready("box")
	equal(t, "cpu.max", n.exec("box", "cat", "/sys/fs/cgroup/cpu.max"), "1000 100000")
	restarts := n.field("pod/box", ".status.containerStatuses[0].restartCount")
	n.kubectl("patch", "pod", "box", "--subresource", "resize", "--type", "strategic", "-p",
		`{"spec":{"containers":[{"name":"box","resources":{"limits":{"cpu":"20m"}}}]}}`)
	eventually(t, "the new limit", func() error {
		return n.execIs("box", "2000 100000\n", "cat", "/sys/fs/cgroup/cpu.max")
	})
	equal(t, "restarts", n.field("pod/box", ".status.containerStatuses[0].restartCount"), restarts)
}

func TestTop(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	eventually(t, "kubectl top pod", func() error {
		out, err := n.try("top", "pod", "box", "--no-headers")
		if err == nil && !strings.Contains(out, "Mi") {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
	eventually(t, "kubectl top node", func() error {
		out, err := n.try("top", "node", "--no-headers")
		if err == nil && !strings.Contains(out, "%") {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
}

func TestImageProblemsAreExplained(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: missing}
spec: {containers: [{name: main, image: "registry.invalid/no/such:image"}]}
`)
	eventually(t, "the reason", func() error {
		reason, err := n.tryField("pod/missing", ".status.containerStatuses[0].state.waiting.reason")
		if err != nil || reason != "ErrImagePull" && reason != "ImagePullBackOff" {
			return fmt.Errorf("reason is %q", reason)
		}
		return nil
	})
}

// TestManyContainers puts 64 containers of one image into one micro-VM.
func TestManyContainers(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	var containers strings.Builder
	for i := range 64 {
		fmt.Fprintf(&containers, "    - {name: c%d, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, \"100000\"]}\n", i)
	}
	n.apply("{apiVersion: v1, kind: Pod, metadata: {name: many}, spec: {terminationGracePeriodSeconds: 1, containers: [\n" +
		strings.ReplaceAll(strings.TrimSuffix(strings.ReplaceAll(containers.String(), "    - ", ""), "\n"), "\n", ",\n") + "]}}")
	n.kubectl("wait", "--for=condition=Ready", "pod/many", timeout(crowdPatience))
	equal(t, "the last one", n.kubectl("exec", "many", "-c", "c63", "--", "echo", "here"), "here")
}
