//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAPIVolumesUpdateLive(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.kubectl("create", "configmap", "conf", "--from-literal=key=before")
	n.kubectl("create", "secret", "generic", "secret", "--from-literal=password=s3cret")
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: box, labels: {color: blue}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: box
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sleep, "100000"]
      volumeMounts:
        - {name: conf, mountPath: /conf}
        - {name: secret, mountPath: /secret}
        - {name: all, mountPath: /all}
        - {name: down, mountPath: /down}
        - {name: conf, mountPath: /one/file, subPath: key}
  volumes:
    - {name: conf, configMap: {name: conf}}
    - {name: secret, secret: {secretName: secret, defaultMode: 0400}}
    - name: all
      projected:
        sources:
          - configMap: {name: conf, items: [{key: key, path: sub/conf}]}
          - secret: {name: secret}
          - serviceAccountToken: {path: token, expirationSeconds: 3600}
    - {name: down, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
`)
	n.ready("box")
	equal(t, "configMap", n.exec("box", "cat", "/conf/key"), "before")
	equal(t, "secret", n.exec("box", "cat", "/secret/password"), "s3cret")
	equal(t, "mode", n.exec("box", "stat", "-Lc", "%a", "/secret/password"), "400")
	equal(t, "projected", n.exec("box", "sh", "-c", "cat /all/sub/conf /all/password; test -s /all/token"), "befores3cret")
	equal(t, "subPath", n.exec("box", "cat", "/one/file"), "before")
	contains(t, n.exec("box", "cat", "/down/labels"), `color="blue"`)
	contains(t, n.exec("box", "cat", "/var/run/secrets/kubernetes.io/serviceaccount/namespace"), n.name)

	n.apply("{apiVersion: v1, kind: ConfigMap, metadata: {name: conf}, data: {key: after, more: new}}")
	n.kubectl("label", "pod", "box", "--overwrite", "color=red")
	eventually(t, "the update", func() error {
		got, err := n.tryExec("box", "sh", "-c", "cat /conf/key /all/sub/conf; ls /conf; cat /down/labels")
		if err != nil || !strings.Contains(got, "afterafter") || !strings.Contains(got, "more") || !strings.Contains(got, `"red"`) {
			return fmt.Errorf("still %q", got)
		}
		return nil
	})
	equal(t, "subPath does not follow", n.exec("box", "cat", "/one/file"), "before")
}

func TestEmptyDirs(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: dirs}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 4321}
  volumes:
    - {name: disk, emptyDir: {}}
    - {name: mem, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
  containers:
    - {name: a, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"], volumeMounts: [{name: disk, mountPath: /disk}, {name: mem, mountPath: /mem}]}
    - {name: b, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"], volumeMounts: [{name: disk, mountPath: /data}, {name: disk, mountPath: /sub, subPath: deep/er}]}
`)
	n.ready("dirs")
	n.kubectl("exec", "dirs", "-c", "a", "--", "sh", "-c", "echo hi > /disk/file; echo x > /disk/deep/er/y")
	equal(t, "shared", n.kubectl("exec", "dirs", "-c", "b", "--", "cat", "/data/file"), "hi")
	equal(t, "subPath", n.kubectl("exec", "dirs", "-c", "b", "--", "cat", "/sub/y"), "x")
	equal(t, "group", n.kubectl("exec", "dirs", "-c", "a", "--", "stat", "-c", "%g", "/disk"), "4321")
	contains(t, n.kubectl("exec", "dirs", "-c", "a", "--", "df", "-m", "/mem"), "tmpfs")
	if out, err := n.try("exec", "dirs", "-c", "a", "--", "dd", "if=/dev/zero", "of=/mem/big", "bs=1M", "count=20"); err == nil {
		t.Fatalf("wrote 20 MiB into a memory volume of 8 MiB: %s", out)
	}
}

// TestSubPathExpr gives each container its own directory of a volume, by its environment.
func TestSubPathExpr(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	container := `{name: %[1]s, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"],
      env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}, {name: SELF, value: %[1]s}],
      volumeMounts: [{name: v, mountPath: /mine, subPathExpr: $(POD)/$(SELF)}, {name: v, mountPath: /all}]}`
	n.apply(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: expr}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, emptyDir: {}}]
  containers: [%s, %s]
`, fmt.Sprintf(container, "one"), fmt.Sprintf(container, "two")))
	n.ready("expr")
	for _, name := range []string{"one", "two"} {
		n.kubectl("exec", "expr", "-c", name, "--", "sh", "-c", "echo of $SELF > /mine/file")
	}
	equal(t, "files", n.kubectl("exec", "expr", "-c", "one", "--", "sh", "-c", "cd /all; grep . */*/file"), "expr/one/file:of one\nexpr/two/file:of two")
}

func TestLargeConfigMap(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	file := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(file, []byte(strings.Repeat("x", 1000000)), 0o600); err != nil {
		t.Fatal(err)
	}
	n.kubectl("create", "configmap", "big", "--from-file=big="+file)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: reader}
spec:
  restartPolicy: Never
  volumes: [{name: v, configMap: {name: big}}]
  containers:
    - {name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [wc, -c, /v/big], volumeMounts: [{name: v, mountPath: /v}]}
`)
	equal(t, "phase", n.ended("reader"), "Succeeded")
	equal(t, "size", n.kubectl("logs", "reader"), "1000000 /v/big")
}

// TestHostPathIsRefused: design decision 12; the message must say what to do.
func TestHostPathIsRefused(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	message := n.refused(`
apiVersion: v1
kind: Pod
metadata: {name: host}
spec:
  containers: [{name: main, image: busybox, volumeMounts: [{name: v, mountPath: /v}]}]
  volumes: [{name: v, hostPath: {path: /etc}}]
`)
	contains(t, message, "hostPath")
	contains(t, message, "atoll.dev/host-access")
}

func TestEphemeralStorageLimit(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: full}
spec:
  restartPolicy: Never
  containers:
    - {name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "dd if=/dev/zero of=/big bs=1M count=80; sleep 100000"], resources: {limits: {ephemeral-storage: 20Mi}}}
`)
	equal(t, "phase", n.ended("full"), "Failed")
	equal(t, "reason", n.field("pod/full", ".status.reason"), "Evicted")
}

// TestEmptyDirSizeLimit: the data is on the micro-VM's scratch disk, and the kubelet sees it all the same.
func TestEmptyDirSizeLimit(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: full}
spec:
  restartPolicy: Never
  volumes:
    - {name: small, emptyDir: {sizeLimit: 20Mi}}
  containers:
    - {name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "dd if=/dev/zero of=/small/big bs=1M count=80; sleep 100000"], volumeMounts: [{name: small, mountPath: /small}]}
`)
	equal(t, "phase", n.ended("full"), "Failed")
	equal(t, "reason", n.field("pod/full", ".status.reason"), "Evicted")
	contains(t, n.field("pod/full", ".status.message"), `Usage of EmptyDir volume "small" exceeds the limit "20Mi"`)
}
