//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
)

// writer is a pod with the claim of its name; %s are name, runtime class and command.
const writer = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s}
spec:
  runtimeClassName: %[2]s
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 2000}
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sleep, "100000"]
      volumeMounts: [{name: data, mountPath: /data}, {name: data, mountPath: /part, subPath: a/b}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: %[3]s}}]
`

func claim(name, class, rest string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s}
spec: {storageClassName: %s, accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}%s}
`, name, class, rest)
}

// TestPersistentVolume: what a pod writes the next one reads, under either runtime, and a snapshot keeps what
// was there when it was taken.
func TestPersistentVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "atoll.dev/host-access=allowed")
	n.apply(claim("data", "atoll", ""))
	n.apply(fmt.Sprintf(writer, "one", "atoll", "data"))
	n.ready("one")
	n.exec("one", "sh", "-c", "echo first > /data/file && echo sub > /part/file && sync")
	equal(t, "group", n.exec("one", "stat", "-c", "%g", "/data"), "2000")

	n.apply(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: before}
spec: {volumeSnapshotClassName: atoll, source: {persistentVolumeClaimName: data}}
`)
	eventually(t, "the snapshot", func() error {
		if ready, err := n.tryField("volumesnapshot/before", ".status.readyToUse"); err != nil || ready != "true" {
			return fmt.Errorf("ready: %q", ready)
		}
		return nil
	})
	n.exec("one", "sh", "-c", "echo second > /data/file && sync")
	n.kubectl("delete", "pod", "one")
	n.apply(fmt.Sprintf(writer, "two", "runc", "data"))
	n.ready("two")
	equal(t, "on the host", n.exec("two", "cat", "/data/file", "/data/a/b/file"), "second\nsub")
	n.exec("two", "sh", "-c", "echo third > /data/file && sync")
	n.kubectl("delete", "pod", "two")
	n.apply(fmt.Sprintf(writer, "three", "atoll", "data"))
	n.ready("three")
	equal(t, "back in a micro-VM", n.exec("three", "cat", "/data/file"), "third")

	n.apply(claim("old", "atoll", ", dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: before}"))
	n.apply(fmt.Sprintf(writer, "four", "atoll", "old"))
	n.ready("four")
	equal(t, "restored", n.exec("four", "cat", "/data/file"), "first")

	n.kubectl("patch", "pvc", "data", "-p", `{"spec":{"resources":{"requests":{"storage":"256Mi"}}}}`)
	eventually(t, "more room", func() error {
		out, err := n.tryExec("three", "sh", "-c", "df -m /data | tail -1")
		if f := strings.Fields(out); err != nil || len(f) < 2 || len(f[1]) < 3 {
			return fmt.Errorf("df says %q, %w", out, err)
		}
		return nil
	})
	equal(t, "after growth", n.exec("three", "cat", "/data/file"), "third")
}

// TestVolumeRefused: what cannot be had says why, at the claim.
func TestVolumeRefused(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	shared := strings.Replace(claim("shared", "atoll", ""), "ReadWriteOnce", "ReadWriteMany", 1)
	n.apply(shared)
	n.apply(fmt.Sprintf(writer, "one", "atoll", "shared"))
	eventually(t, "an event that says why", func() error {
		out, err := n.try("describe", "pvc", "shared")
		if err != nil || !strings.Contains(out, "ReadWriteMany is not possible") || !strings.Contains(out, "ReadWriteOnce") {
			return fmt.Errorf("got %s", out)
		}
		return nil
	})
}

// TestEncryptedVolume: pods notice nothing; without the key the claim says what is missing.
func TestEncryptedVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	class := n.name + "-secret"
	t.Cleanup(func() {
		for _, args := range [][]string{{"delete", "storageclass", class}, {"delete", "secret", class, "-n", "atoll-keys"}} {
			if out, err := kubectl(context.Background(), "", args...); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
	})
	n.apply(fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: %[1]s}
provisioner: csi.atoll.dev
volumeBindingMode: WaitForFirstConsumer
parameters: {encryption: %[1]s, fsType: xfs}
`, class))
	n.apply(strings.Replace(claim("data", class, ""), "64Mi", "512Mi", 1))
	n.apply(fmt.Sprintf(writer, "one", "atoll", "data"))
	eventually(t, "an event about the key", func() error {
		if out, err := n.try("describe", "pvc", "data"); err != nil || !strings.Contains(out, class) || !strings.Contains(out, "atoll-keys") {
			return fmt.Errorf("got %s", out)
		}
		return nil
	})
	if out, err := kubectl(t.Context(), "", "create", "secret", "generic", class, "-n", "atoll-keys", "--from-literal=a=0123456789abcdef0123456789abcdef"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n.ready("one")
	n.exec("one", "sh", "-c", "echo kept > /data/file && sync")
	contains(t, n.exec("one", "grep", " /data ", "/proc/mounts"), "xfs")
	n.kubectl("delete", "pod", "one")
	n.apply(fmt.Sprintf(writer, "two", "atoll", "data"))
	n.ready("two")
	equal(t, "after the first pod", n.exec("two", "cat", "/data/file"), "kept")
}
