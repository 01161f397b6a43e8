//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestPrivileged: in a namespace without any label, one pod with a privileged container and an ordinary
// one. The first has all of the micro-VM and nothing of the host.
func TestPrivileged(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	pod := `
apiVersion: v1
kind: Pod
metadata: {name: strong}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - {name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"], securityContext: {privileged: true}}
    - {name: plain, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"]}
`
	n.apply(pod)
	equal(t, "runtime class", n.field("pod/strong", ".spec.runtimeClassName"), "atoll")
	n.ready("strong")
	main := func(command ...string) string {
		return n.kubectl(append([]string{"exec", "strong", "-c", "main", "--"}, command...)...)
	}
	host, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	if got := main("cat", "/proc/sys/kernel/random/boot_id"); got == strings.TrimSpace(string(host)) {
		t.Fatal("the container runs on the host's kernel")
	}
	status := main("cat", "/proc/self/status")
	for _, want := range []string{"Seccomp:\t0", "CapEff:\t000001ffffffffff"} {
		contains(t, status, want)
	}
	equal(t, "link", main("sh", "-c", "ip link add dummy1 type dummy && ip -o link show dummy1 | wc -l"), "1")
	equal(t, "file system on a loop device", main("sh", "-c",
		"dd if=/dev/zero of=/disk bs=1M count=8 2>/dev/null && mknod $(losetup -f) b 7 0 && losetup /dev/loop0 /disk && mke2fs /dev/loop0 >/dev/null && "+
			"mkdir /m && mount -t ext4 /dev/loop0 /m && grep -c ' /m ext4' /proc/mounts"), "1")
	equal(t, "cgroup", main("sh", "-c", "mkdir /sys/fs/cgroup/own && ls /sys/fs/cgroup/own/cgroup.procs"), "/sys/fs/cgroup/own/cgroup.procs")
	contains(t, main("ls", "/dev"), "vda")
	plain := n.kubectl("exec", "strong", "-c", "plain", "--", "ls", "/dev")
	if strings.Contains(plain, "vda") {
		t.Fatalf("the ordinary container has the guest's devices: %s", plain)
	}
	// The cluster is told of the class, so that what needs the host is refused as ever.
	message := n.refused(strings.Replace(strings.Replace(pod, "name: strong", "name: other", 1), "spec:", "spec:\n  runtimeClassName: runc", 1))
	contains(t, message, "atoll.dev/host-access=allowed")
}

// TestPrivilegedDebugging adds a privileged container to a pod that runs.
func TestPrivilegedDebugging(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	n.kubectl("debug", "box", "--image=busybox", "--image-pull-policy=IfNotPresent", "--profile=sysadmin", "--target=box", "-c", "debugger",
		"--", "sh", "-c", "ip link add dummy1 type dummy && echo made")
	eventually(t, "the debugger's output", func() error {
		out, err := n.try("logs", "box", "-c", "debugger")
		if err == nil && !strings.Contains(out, "made") {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
}

// TestPodSecurity: who may be privileged is for the namespace's Pod Security level to say.
func TestPodSecurity(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "pod-security.kubernetes.io/enforce=baseline")
	n.apply(sleeper)
	message := n.refused(strings.Replace(strings.Replace(sleeper, "name: box", "name: strong", 1), "image: busybox", "securityContext: {privileged: true}, image: busybox", 1))
	contains(t, message, `violates PodSecurity "baseline`)
}
