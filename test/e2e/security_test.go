//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
)

func TestSecurityContext(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: secure}
spec:
  terminationGracePeriodSeconds: 1
  securityContext:
    runAsUser: 1000
    runAsGroup: 2000
    supplementalGroups: [3000]
    seccompProfile: {type: RuntimeDefault}
    sysctls: [{name: net.ipv4.ip_unprivileged_port_start, value: "80"}]
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sleep, "100000"]
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
`)
	n.ready("secure")
	contains(t, n.exec("secure", "id"), "uid=1000 gid=2000 groups=2000,3000")
	status := n.exec("secure", "cat", "/proc/self/status")
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"} {
		contains(t, status, want)
	}
	if out, err := n.try("exec", "secure", "--", "touch", "/file"); err == nil || !strings.Contains(out, "Read-only file system") {
		t.Fatalf("writing a read-only root file system: %v %s", err, out)
	}
	equal(t, "sysctl", n.exec("secure", "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"), "80")
	if out, err := n.try("exec", "secure", "--", "sh", "-c", "echo 1 > /proc/sys/kernel/panic"); err == nil {
		t.Fatalf("changed a kernel setting: %s", out)
	}
}

func TestCapabilities(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: caps}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - {name: plain, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"]}
    - {name: more, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"], securityContext: {capabilities: {add: [NET_ADMIN], drop: [CHOWN]}}}
`)
	n.ready("caps")
	contains(t, n.kubectl("exec", "caps", "-c", "plain", "--", "grep", "CapEff", "/proc/self/status"), "00000000a80425fb")
	contains(t, n.kubectl("exec", "caps", "-c", "more", "--", "grep", "CapEff", "/proc/self/status"), "00000000a80435fa")
	if out, err := n.try("exec", "caps", "-c", "plain", "--", "ip", "link", "add", "d0", "type", "dummy"); err == nil {
		t.Fatalf("made a link without NET_ADMIN: %s", out)
	}
}

// TestHostAccess: pods that need the host run under runc only where an administrator allowed it.
func TestHostAccess(t *testing.T) {
	t.Parallel()
	pod := `
apiVersion: v1
kind: Pod
metadata: {name: host}
spec:
  hostNetwork: true
  restartPolicy: Never
  containers: [{name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "uname -r"]}]
`
	denied := newNamespace(t)
	message := denied.refused(pod)
	contains(t, message, "hostNetwork")
	contains(t, message, "atoll.dev/host-access=allowed")
	contains(t, denied.refused(strings.Replace(pod, "hostNetwork: true", "runtimeClassName: runc", 1)), "atoll.dev/host-access=allowed")
}

func TestHostAccessAllowed(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "atoll.dev/host-access=allowed")
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: host}
spec:
  hostNetwork: true
  restartPolicy: Never
  containers: [{name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "ip link; cat /host/hostname"], volumeMounts: [{name: v, mountPath: /host}]}]
  volumes: [{name: v, hostPath: {path: /etc}}]
`)
	equal(t, "runtime class", n.field("pod/host", ".spec.runtimeClassName"), "runc")
	equal(t, "phase", n.ended("host"), "Succeeded")
	contains(t, n.kubectl("logs", "host"), "atoll0")
}

func TestRunAsNonRootIsExplained(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(strings.Replace(sleeper, "spec:", "spec:\n  securityContext: {runAsNonRoot: true}", 1))
	contains(t, n.waiting("box", "CreateContainerConfigError"), "runAsNonRoot and image will run as root")
}

// TestSupplementalGroupsPolicy: in the image, root is a member of group wheel (10).
func TestSupplementalGroupsPolicy(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	for policy, want := range map[string]string{"Merge": "0 10 3000", "Strict": "0 3000"} {
		name := strings.ToLower(policy)
		n.apply(strings.Replace(script(name, "id -G"), "spec:", "spec:\n  securityContext: {supplementalGroups: [3000], supplementalGroupsPolicy: "+policy+"}", 1))
		equal(t, "phase", n.ended(name), "Succeeded")
		equal(t, "groups with policy "+policy, n.kubectl("logs", name), want)
	}
}

// TestServiceAccountToken asks the API server from inside a pod, before and after the account may.
func TestServiceAccountToken(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(strings.Replace(sleeper, "image: busybox", "image: atoll.dev/tester", 1))
	n.ready("box")
	get := func() (string, error) {
		return n.try("exec", "box", "--", "tester", "get", "/api/v1/namespaces/"+n.name+"/pods")
	}
	eventually(t, "the refusal", func() error {
		out, err := get()
		if err == nil {
			t.Fatalf("the account may list pods:\n%s", out)
		}
		if want := "system:serviceaccount:" + n.name + ":default"; !strings.Contains(out, "403 Forbidden") || !strings.Contains(out, want) {
			return fmt.Errorf("no refusal of %s: %s", want, out)
		}
		return nil
	})
	n.kubectl("create", "rolebinding", "view", "--clusterrole=view", "--serviceaccount="+n.name+":default")
	eventually(t, "the list of pods", func() error {
		out, err := get()
		if err == nil && !strings.Contains(out, `"name":"box"`) {
			err = fmt.Errorf("got %s", out)
		}
		return err
	})
}

// TestUserNamespacesAreRefused: a micro-VM has users of its own anyway; the pod says why it does not start.
func TestUserNamespacesAreRefused(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(strings.Replace(sleeper, "spec:", "spec:\n  hostUsers: false", 1))
	eventually(t, "the reason", func() error {
		events, err := n.try("get", "events", "--field-selector", "involvedObject.name=box,type=Warning")
		if err != nil || !strings.Contains(events, `RuntimeClass handler "atoll" does not support user namespaces`) {
			return fmt.Errorf("events are:\n%s", events)
		}
		return nil
	})
}
