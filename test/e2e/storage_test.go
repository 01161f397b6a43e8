//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// storageClass makes a StorageClass that goes with the test.
func (n *namespace) storageClass(name, rest string) {
	n.t.Helper()
	n.clusterObject("storageclass", name, fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: %s}
provisioner: csi.atoll.dev
allowVolumeExpansion: true
%s`, name, rest))
}

// clusterObject applies an object that is in no namespace and goes with the test, or as soon as nothing uses it.
func (n *namespace) clusterObject(kind, name, yaml string) {
	n.t.Helper()
	n.t.Cleanup(func() {
		if out, err := kubectl(context.Background(), "", "delete", kind, name, fmt.Sprintf("--wait=%t", kind != "volumeattributesclass"), timeout(longPatience)); err != nil {
			n.t.Errorf("%v: %s", err, out)
		}
	})
	run(n.t, yaml, "apply", "-f", "-")
}

// says waits for an event or condition of an object.
func (n *namespace) says(object, text string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%s to say %q", object, text), func() error {
		if out, err := n.try("describe", object); err != nil || !strings.Contains(out, text) {
			return fmt.Errorf("got %s", out)
		}
		return nil
	})
}

// bound waits until a claim has its volume, and returns the volume's name.
func (n *namespace) bound(claim string) string {
	n.t.Helper()
	n.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/"+claim, timeout(patience))
	return n.field("pvc/"+claim, ".spec.volumeName")
}

// claimOf is a claim with everything; mode is an access mode, rest more of its spec.
func claimOf(name, class, mode, size, rest string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s}
spec: {storageClassName: %s, accessModes: [%s], resources: {requests: {storage: %s}}%s}
---`, name, class, mode, size, rest)
}

// volumePod is a pod with these volumes; each of mounts and devices is one entry of the container's lists.
func volumePod(name, runtime, mounts, devices, volumes string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  runtimeClassName: %s
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sleep, "100000"]
      volumeMounts: [%s]
      volumeDevices: [%s]
  volumes: [%s]
---`, name, runtime, mounts, devices, volumes)
}

// ofClaim is a volume of a pod with the name of its claim.
func ofClaim(name string) string {
	return fmt.Sprintf("{name: %[1]s, persistentVolumeClaim: {claimName: %[1]s}}", name)
}

// everyVolume is a StatefulSet whose pod has one volume of each kind. %s is the class of its template.
const everyVolume = `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: web}
spec:
  serviceName: web
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {fsGroup: 2000}
      containers:
        - name: main
          image: busybox
          imagePullPolicy: IfNotPresent
          command: [sleep, "100000"]
          volumeMounts:
            - {name: data, mountPath: /data}
            - {name: data, mountPath: /part, subPath: a/b}
            - {name: data, mountPath: /look, readOnly: true}
            - {name: scratch, mountPath: /scratch}
            - {name: once, mountPath: /once}
          volumeDevices: [{name: raw, devicePath: /dev/raw}]
      volumes:
        - name: scratch
          ephemeral:
            volumeClaimTemplate:
              spec: {accessModes: [ReadWriteOnce], storageClassName: atoll, resources: {requests: {storage: 32Mi}}}
        - {name: once, persistentVolumeClaim: {claimName: once}}
        - {name: raw, persistentVolumeClaim: {claimName: raw}}
  volumeClaimTemplates:
    - metadata: {name: data}
      spec: {storageClassName: %s, accessModes: [ReadWriteOnce], resources: {requests: {storage: 64Mi}}}
`

// TestVolumeFeatures uses every kind of volume that Kubernetes has, in as few pods as that takes.
func TestVolumeFeatures(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "atoll.dev/host-access=allowed")
	now := n.name + "-now"
	n.storageClass(now, "volumeBindingMode: Immediate\nmountOptions: [noatime]")
	n.apply(claimOf("once", "atoll", "ReadWriteOncePod", "32Mi", "") + claimOf("raw", now, "ReadWriteOnce", "64Mi", ", volumeMode: Block"))
	n.bound("raw") // before any pod
	equal(t, "bound without a pod", n.field("pvc/once", ".status.phase"), "Pending")
	n.apply(fmt.Sprintf(everyVolume, now))
	n.apply(volumePod("host-1", "runc", "{name: host, mountPath: /data}", "", ofClaim("host")) +
		volumePod("host-2", "runc", "{name: host, mountPath: /data}", "", ofClaim("host")) + claimOf("host", "atoll", "ReadWriteOnce", "32Mi", ""))
	eventually(t, "the pod of the StatefulSet", func() error {
		_, err := n.try("get", "pod", "web-0")
		return err
	})
	n.ready("web-0")
	for _, part := range []struct {
		name string
		run  func(*testing.T, *namespace)
	}{
		{"mounts", volumeMounts},
		{"ephemeral", ephemeralVolume},
		{"block", blockVolume},
		{"second pod", secondPod},
		{"shared on the host", sharedOnHost},
		{"sizes", volumeSizes},
		{"copy for readers", copyForReaders},
		{"live limits", liveLimits},
		{"capacity", volumeCapacity},
		{"metrics", volumeMetrics},
		{"comes back", volumeComesBack},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(t, &namespace{t: t, name: n.name}) })
	}
}

// volumeMounts: sub paths, read-only mounts, mount options and groups.
func volumeMounts(t *testing.T, n *namespace) {
	n.exec("web-0", "sh", "-c", "echo one > /data/file && echo two > /part/file && echo three > /once/file && sync")
	equal(t, "through all mounts", n.exec("web-0", "cat", "/data/a/b/file", "/look/file", "/look/a/b/file"), "two\none\ntwo")
	equal(t, "groups", n.exec("web-0", "stat", "-c", "%g", "/data", "/scratch", "/once"), "2000\n2000\n2000")
	contains(t, n.exec("web-0", "grep", " /data ", "/proc/mounts"), "noatime")
	contains(t, n.exec("web-0", "sh", "-c", "touch /look/no 2>&1 || true"), "Read-only")
}

// ephemeralVolume: a claim made for the pod, and gone with it (volumeComesBack).
func ephemeralVolume(t *testing.T, n *namespace) {
	n.exec("web-0", "sh", "-c", "echo gone > /scratch/file")
	equal(t, "owner of the claim", n.field("pvc/web-0-scratch", ".metadata.ownerReferences[0].name"), "web-0")
	n.bound("web-0-scratch")
}

// blockVolume: a device of the right size that keeps what is written.
func blockVolume(t *testing.T, n *namespace) {
	equal(t, "size", n.exec("web-0", "blockdev", "--getsize64", "/dev/raw"), strconv.Itoa(64<<20))
	n.exec("web-0", "sh", "-c", "printf mark | dd of=/dev/raw bs=1M seek=63 conv=notrunc,fsync")
	equal(t, "at its end", n.exec("web-0", "sh", "-c", "dd if=/dev/raw bs=1M skip=63 | head -c 4"), "mark")
}

// secondPod: a volume for one machine is refused to a second one, which says so and waits; the first goes on.
func secondPod(t *testing.T, n *namespace) {
	n.apply(volumePod("late", "atoll", "{name: data-web-0, mountPath: /data}", "", ofClaim("data-web-0")) +
		volumePod("lone", "atoll", "{name: once, mountPath: /data}", "", ofClaim("once")))
	n.says("pod/late", "volume is attached")
	n.says("pod/lone", "ReadWriteOncePod")
	equal(t, "phase", n.field("pod/lone", ".status.phase"), "Pending")
	n.exec("web-0", "sh", "-c", "echo on > /data/on && sync")
	n.kubectl("delete", "pod", "late", "lone")
}

// sharedOnHost: pods of the host share a volume of theirs.
func sharedOnHost(t *testing.T, n *namespace) {
	n.ready("host-1")
	n.ready("host-2")
	n.exec("host-1", "sh", "-c", "echo both > /data/file")
	equal(t, "in the other pod", n.exec("host-2", "cat", "/data/file"), "both")
	n.kubectl("delete", "pod", "host-1")
	n.exec("host-2", "sh", "-c", "echo more >> /data/file && sync")
	n.kubectl("delete", "pod", "host-2")
}

// volumeSizes: what cannot be is refused with a reason, at once or at the claim.
func volumeSizes(t *testing.T, n *namespace) {
	now := n.field("pvc/raw", ".spec.storageClassName")
	contains(t, n.refused(claimOf("zero", now, "ReadWriteOnce", "0", "")), "spec.resources[storage]")
	contains(t, n.refused(claimOf("less", now, "ReadWriteOnce", "-1Gi", "")), "spec.resources[storage]")
	out, err := n.try("patch", "pvc", "data-web-0", "-p", `{"spec":{"resources":{"requests":{"storage":"16Mi"}}}}`)
	if err == nil {
		t.Errorf("a volume was made smaller: %s", out)
	}
	contains(t, fmt.Sprint(err), "storage")
	n.apply(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: whole}
spec: {volumeSnapshotClassName: atoll, source: {persistentVolumeClaimName: data-web-0}}
`)
	n.kubectl("wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/whole", timeout(patience))
	const ofSnapshot = ", dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: whole}"
	n.apply(claimOf("huge", now, "ReadWriteOnce", "100Ti", "") + claimOf("exa", now, "ReadWriteOnce", "7Ei", "") +
		claimOf("restored", now, "ReadWriteOnce", "16Mi", ofSnapshot) +
		claimOf("copied", now, "ReadWriteOnce", "16Mi", ", dataSource: {kind: PersistentVolumeClaim, name: data-web-0}"))
	n.says("pvc/huge", "resources.requests.storage")
	n.says("pvc/exa", "resources.requests.storage")
	n.says("pvc/restored", "less than the size")
	n.says("pvc/copied", "greater than or equal in size")
	n.kubectl("delete", "pvc", "huge", "exa", "restored", "copied")
	n.kubectl("delete", "volumesnapshot", "whole")
}

// sharedStore is a storage class on a datastore that could be of several hosts.
func (n *namespace) sharedStore() string {
	n.t.Helper()
	store := n.name + "-shared"
	dir := filepath.Join(suite.dataDir, store)
	if err := os.Mkdir(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n.clusterObject("datastore", store, fmt.Sprintf(`
apiVersion: atoll.dev/v1alpha1
kind: Datastore
metadata: {name: %s}
spec: {directory: {path: %s, shared: true}}
`, store, dir))
	n.storageClass(store, "parameters: {datastore: "+store+"}")
	return store
}

// copyForReaders: a clone of a volume in use, which two micro-VMs read at once, and a block volume that both
// write to, on a shared datastore.
func copyForReaders(t *testing.T, n *namespace) {
	store := n.sharedStore()
	n.apply(claimOf("copy", "atoll", "ReadOnlyMany", "64Mi", ", dataSource: {kind: PersistentVolumeClaim, name: data-web-0}") +
		claimOf("both", store, "ReadWriteMany", "16Mi", ", volumeMode: Block"))
	t.Cleanup(func() {
		for _, args := range [][]string{{"delete", "pod", "left", "right"}, {"delete", "pvc", "both", "copy"}} {
			if out, err := kubectl(context.Background(), "", append([]string{"-n", n.name}, args...)...); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
	})
	for _, pod := range []string{"left", "right"} {
		n.apply(volumePod(pod, "atoll", "{name: copy, mountPath: /data}", "{name: both, devicePath: /opt/both}", ofClaim("copy")+","+ofClaim("both")))
	}
	n.ready("left")
	n.ready("right")
	for _, pod := range []string{"left", "right"} {
		equal(t, "in the copy", n.exec(pod, "cat", "/data/file", "/data/a/b/file"), "one\ntwo")
		contains(t, n.exec(pod, "sh", "-c", "touch /data/no 2>&1 || true"), "Read-only")
	}
	n.exec("left", "sh", "-c", "yes left | head -c 4096 | dd of=/opt/both bs=4096 oflag=direct conv=notrunc")
	contains(t, n.exec("right", "sh", "-c", "dd if=/opt/both bs=4096 count=1 iflag=direct | head -c 4"), "left")
	n.exec("right", "sh", "-c", "yes right | head -c 4096 | dd of=/opt/both bs=4096 seek=1 oflag=direct conv=notrunc")
	contains(t, n.exec("left", "sh", "-c", "dd if=/opt/both bs=4096 skip=1 count=1 iflag=direct | head -c 5"), "right")
	n.exec("web-0", "sh", "-c", "echo changed > /data/file && sync")
	equal(t, "the copy is its own", n.exec("left", "cat", "/data/file"), "one")
}

// liveLimits: a VolumeAttributesClass makes a volume slower and fast again while a pod writes to it.
func liveLimits(t *testing.T, n *namespace) {
	class := func(name, bandwidth string) string {
		name = n.name + "-" + name
		n.clusterObject("volumeattributesclass", name, fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: VolumeAttributesClass
metadata: {name: %s}
driverName: csi.atoll.dev
parameters: {bandwidth: %s}
`, name, bandwidth))
		return name
	}
	write := func() (seconds float64, err error) { // 4 MiB, by the clock of the guest: getting in takes its time as well
		out, err := n.tryExec("web-0", "sh", "-ec", "read b _ </proc/uptime; dd if=/dev/zero of=/dev/raw bs=256k count=16 oflag=direct conv=notrunc; read e _ </proc/uptime; echo $b $e")
		if err != nil {
			return 0, err
		}
		var begin, end float64
		if _, err := fmt.Sscan(out, &begin, &end); err != nil {
			return 0, fmt.Errorf("%q: %w", out, err)
		}
		return end - begin, nil
	}
	// Seconds that it takes at least at 512 KiB/s. Without a limit a host with much to do stalls now and then.
	const limited = 6.0
	fast := func(when string) {
		eventually(t, "4 MiB to take less than half of that "+when, func() error {
			took, err := write()
			if err == nil && took > limited/2 {
				err = fmt.Errorf("they took %.2f s", took)
			}
			return err
		})
	}
	change := func(to string) {
		n.kubectl("patch", "pvc", "raw", "-p", fmt.Sprintf(`{"spec":{"volumeAttributesClassName":%q}}`, to))
		n.kubectl("wait", "--for=jsonpath={.status.currentVolumeAttributesClassName}="+to, "pvc/raw", timeout(patience))
	}
	fast("without a limit")
	change(class("slow", "512Ki"))
	if took, err := write(); err != nil || took < limited {
		t.Errorf("the limit does not hold: 4 MiB took %.2f s, %v", took, err)
	}
	change(class("fast", "1Gi"))
	fast("with the limit lifted")
	n.kubectl("patch", "pvc", "raw", "-p", fmt.Sprintf(`{"spec":{"volumeAttributesClassName":%q}}`, class("bad", "fast")))
	n.says("pvc/raw", `parameter "bandwidth"`)
}

// volumeCapacity: the scheduler is told how much room there is.
func volumeCapacity(t *testing.T, n *namespace) {
	eventually(t, "the room for volumes of class atoll", func() error {
		out, err := kubectl(t.Context(), "", "get", "csistoragecapacities", "-n", "kube-system", "-o",
			`jsonpath={range .items[?(@.storageClassName=="atoll")]}{.capacity} {.nodeTopology.matchLabels}{"\n"}{end}`)
		if err != nil || !strings.Contains(out, "topology.csi.atoll.dev/node") || strings.HasPrefix(out, "0 ") {
			return fmt.Errorf("got %q", out)
		}
		return nil
	})
	n.apply(claimOf("late", "atoll", "ReadWriteOnce", "100Ti", "") + volumePod("late", "atoll", "{name: late, mountPath: /data}", "", ofClaim("late")))
	n.says("pod/late", "did not have enough free storage")
	n.kubectl("delete", "pod/late", "pvc/late")
}

// volumeMetrics: the kubelet counts what is in a volume.
func volumeMetrics(t *testing.T, n *namespace) {
	node := n.field("pod/web-0", ".spec.nodeName")
	want := regexp.MustCompile(`kubelet_volume_stats_used_bytes\{namespace="` + n.name + `",persistentvolumeclaim="data-web-0"\} ([0-9.e+]+)`)
	eventually(t, "the used bytes of the volume", func() error {
		out, err := n.try("get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics")
		if err != nil {
			return err
		}
		m := want.FindStringSubmatch(out)
		if m == nil {
			return fmt.Errorf("there is no such metric")
		}
		if used, err := strconv.ParseFloat(m[1], 64); err != nil || used < 4096 || used > 64<<20 {
			return fmt.Errorf("%s bytes, %w", m[1], err)
		}
		return nil
	})
}

// volumeComesBack: the next pod of a StatefulSet has the volumes of the one before, but the ephemeral one.
func volumeComesBack(t *testing.T, n *namespace) {
	uid, volume := n.field("pod/web-0", ".metadata.uid"), n.bound("data-web-0")
	ephemeral := n.bound("web-0-scratch")
	n.kubectl("delete", "pod", "web-0")
	eventually(t, "the next pod", func() error {
		if out, err := n.try("get", "pod", "web-0", "-o", "jsonpath={.metadata.uid}"); err != nil || out == uid {
			return fmt.Errorf("%q, %w", out, err)
		}
		return nil
	})
	n.ready("web-0")
	equal(t, "volume", n.bound("data-web-0"), volume)
	equal(t, "kept", n.exec("web-0", "cat", "/part/file", "/once/file"), "two\nthree")
	equal(t, "at the end of the device", n.exec("web-0", "sh", "-c", "dd if=/dev/raw bs=1M skip=63 | head -c 4"), "mark")
	equal(t, "in the new ephemeral volume", n.exec("web-0", "sh", "-c", "cat /scratch/file 2>/dev/null || echo nothing"), "nothing")
	eventually(t, "the old ephemeral volume to go", func() error {
		if _, err := n.try("get", "pv", ephemeral); err == nil {
			return fmt.Errorf("%s is there still", ephemeral)
		}
		return nil
	})
}
