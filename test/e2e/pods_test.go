//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const sleeper = `
apiVersion: v1
kind: Pod
metadata: {name: box}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - {name: box, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"]}
`

// script is a pod that runs a shell script once.
func script(name, text string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -ec, %q]
`, name, text)
}

func TestPodHasItsOwnKernel(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(script("kernel", "uname -r; cat /proc/cmdline; hostname"))
	equal(t, "phase", n.ended("kernel"), "Succeeded")
	logs := n.kubectl("logs", "kernel")
	host, err := exec.Command("uname", "-r").Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(logs, string(host)) {
		t.Fatalf("the pod runs on the host's kernel %s", host)
	}
	contains(t, logs, "\nkernel\n")
	equal(t, "runtime class", n.field("pod/kernel", ".spec.runtimeClassName"), "atoll")
}

func TestExitCodesAndRestarts(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(script("fails", "echo going down; exit 7"))
	equal(t, "phase", n.ended("fails"), "Failed")
	equal(t, "exit code", n.field("pod/fails", ".status.containerStatuses[0].state.terminated.exitCode"), "7")
	n.apply(strings.Replace(script("again", "echo try; exit 1"), "restartPolicy: Never", "restartPolicy: Always", 1))
	eventually(t, "a restart", func() error {
		if count, err := n.tryField("pod/again", ".status.containerStatuses[0].restartCount"); err != nil || count == "" || count == "0" {
			return fmt.Errorf("no restart yet: %q, %w", count, err)
		}
		return nil
	})
	// The kubelet keeps one ended container; which one is the previous changes at each restart.
	eventually(t, "the log of the container before", func() error {
		out, err := n.try("logs", "-p", "again")
		if err == nil && strings.TrimSpace(out) != "try" {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
}

func TestContainersShareNetworkAndIPC(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: pair}
spec:
  shareProcessNamespace: true
  terminationGracePeriodSeconds: 1
  containers:
    - {name: web, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "mkdir /w && echo shared > /w/index.html && exec httpd -f -p 8080 -h /w"]}
    - {name: box, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100001"]}
`)
	n.ready("pair")
	eventually(t, "the neighbour's port", func() error {
		out, err := n.try("exec", "pair", "-c", "box", "--", "wget", "-qO-", "http://127.0.0.1:8080/")
		if err == nil && out != "shared\n" {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
	contains(t, n.kubectl("exec", "pair", "-c", "web", "--", "ps"), "sleep 100001")
}

func TestInitAndSidecarContainers(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: staged}
spec:
  restartPolicy: Never
  volumes: [{name: v, emptyDir: {}}]
  initContainers:
    - {name: first, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "echo one > /v/log"], volumeMounts: [{name: v, mountPath: /v}]}
    - {name: side, image: busybox, imagePullPolicy: IfNotPresent, restartPolicy: Always, command: [sh, -c, "echo side >> /v/log; touch /v/up; sleep 100000"], volumeMounts: [{name: v, mountPath: /v}], startupProbe: {exec: {command: [cat, /v/up]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 60}}
    - {name: second, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "echo two >> /v/log"], volumeMounts: [{name: v, mountPath: /v}]}
  containers:
    - {name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [cat, /v/log], volumeMounts: [{name: v, mountPath: /v}]}
`)
	equal(t, "phase", n.ended("staged"), "Succeeded")
	equal(t, "log", n.kubectl("logs", "staged", "-c", "main"), "one\nside\ntwo")
}

func TestProbes(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: probed}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /w; touch /w/ok /tmp/alive; exec httpd -f -p 80 -h /w"]
      startupProbe: {tcpSocket: {port: 80}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 600}
      readinessProbe: {httpGet: {path: /ok, port: 80}, periodSeconds: 1, timeoutSeconds: 10}
      livenessProbe: {exec: {command: [cat, /tmp/alive]}, periodSeconds: 1, timeoutSeconds: 120, failureThreshold: 2}
`)
	n.ready("probed")
	n.exec("probed", "rm", "/w/ok")
	n.kubectl("wait", "--for=condition=Ready=false", "pod/probed", timeout(longPatience))
	n.exec("probed", "rm", "/tmp/alive")
	eventually(t, "the liveness restart", func() error {
		if got, err := n.tryField("pod/probed", ".status.containerStatuses[0].restartCount"); err != nil || got == "0" {
			return fmt.Errorf("restart count %s", got)
		}
		return nil
	})
	n.ready("probed")
}

func TestGRPCProbe(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: grpc}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: atoll.dev/tester
      imagePullPolicy: IfNotPresent
      command: [tester, health]
      readinessProbe: {grpc: {port: 50051}, periodSeconds: 1, timeoutSeconds: 10}
`)
	n.ready("grpc")
	n.exec("grpc", "touch", "/tmp/down")
	n.kubectl("wait", "--for=condition=Ready=false", "pod/grpc", timeout(patience))
	n.exec("grpc", "rm", "/tmp/down")
	n.ready("grpc")
}

func TestLifecycleHooksAndGracefulEnd(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: hooks}
spec:
  terminationGracePeriodSeconds: 300
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "trap 'echo got TERM; until test -e /heard; do sleep 0.2; done; exit 0' TERM; while true; do sleep 0.2; done"]
      lifecycle:
        postStart: {exec: {command: [sh, -c, "echo started > /proc/1/fd/1"]}}
        preStop: {exec: {command: [sh, -c, "echo stopping > /proc/1/fd/1"]}}
`)
	n.ready("hooks")
	follow := kubectlCommand(t.Context(), "-n", n.name, "logs", "-f", "hooks")
	out, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = follow.Wait() }()
	log := bufio.NewReader(out)
	text := ""
	follows := func(until string) {
		t.Helper()
		for !strings.HasSuffix(text, until) {
			line, err := log.ReadString('\n')
			if text += line; err != nil {
				t.Fatalf("the log: %v after %q", err, text)
			}
		}
	}
	follows("\n") // it is followed from here on
	n.kubectl("delete", "pod", "hooks", "--wait=false")
	follows("got TERM\n")
	n.exec("hooks", "touch", "/heard") // what nobody has read goes with the container
	n.kubectl("wait", "--for=delete", "pod/hooks", timeout(longPatience))
	rest, err := io.ReadAll(log)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "log", text+string(rest), "started\nstopping\ngot TERM")
}

func TestTerminationMessage(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(script("message", "echo the reason > /dev/termination-log; exit 3"))
	n.ended("message")
	equal(t, "message", n.field("pod/message", ".status.containerStatuses[0].state.terminated.message"), "the reason")
	n.apply(strings.Replace(script("fallback", "echo last words; exit 3"), "image: busybox", "image: busybox\n      terminationMessagePolicy: FallbackToLogsOnError", 1))
	n.ended("fallback")
	equal(t, "message", n.field("pod/fallback", ".status.containerStatuses[0].state.terminated.message"), "last words")
}

func TestEnvFromFieldsAndResources(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: env}
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, 'echo "$NAME $LIMIT $IP"; grep -q "$IP" /etc/hosts']
      resources: {limits: {memory: 64Mi, cpu: 500m}}
      env:
        - {name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: LIMIT, valueFrom: {resourceFieldRef: {resource: limits.memory}}}
`)
	equal(t, "phase", n.ended("env"), "Succeeded")
	equal(t, "log", n.kubectl("logs", "env"), "env 67108864 "+n.field("pod/env", ".status.podIP"))
}

func TestOutOfMemoryKillsTheContainerOnly(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: greedy}
spec:
  restartPolicy: Never
  containers:
    - {name: eats, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "tail /dev/zero"], resources: {limits: {memory: 48Mi}}}
    - {name: lives, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"]}
`)
	eventually(t, "OOMKilled", func() error {
		reason, err := n.tryField("pod/greedy", `.status.containerStatuses[?(@.name=="eats")].state.terminated.reason`)
		if err != nil || reason != "OOMKilled" {
			return fmt.Errorf("reason is %q", reason)
		}
		return nil
	})
	equal(t, "the other container", n.kubectl("exec", "greedy", "-c", "lives", "--", "echo", "alive"), "alive")
}

// TestForcedEnd does not wait for a pod that would take its time, and leaves no machine behind.
func TestForcedEnd(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(strings.Replace(sleeper, "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 3600", 1))
	n.ready("box")
	uid := n.field("pod/box", ".metadata.uid")
	if len(pidsInCgroup(t, uid, "qemu-system")) == 0 {
		t.Fatalf("no QEMU in the cgroup of pod %s", uid)
	}
	n.kubectl("delete", "pod", "box", "--grace-period=0", "--force")
	if out, err := n.try("get", "pod", "box"); err == nil {
		t.Fatalf("the pod is still there:\n%s", out)
	}
	eventually(t, "the end of the machine", func() error {
		if left := pidsInCgroup(t, uid, "qemu-system|shim-daemon"); len(left) > 0 {
			return fmt.Errorf("processes %v of the pod are left", left)
		}
		return nil
	})
}
