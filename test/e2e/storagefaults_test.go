//go:build e2e

package e2e

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// topImage is the file that a volume of the default datastore is written to.
func topImage(t *testing.T, volume string) string {
	t.Helper()
	dir := filepath.Join(suite.dataDir, "datastores", "default")
	b, err := os.ReadFile(filepath.Join(dir, "volumes", volume+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var record struct{ Layers []struct{ ID string } }
	if err := json.Unmarshal(b, &record); err != nil || len(record.Layers) == 0 {
		t.Fatalf("%s: %v", b, err)
	}
	found, err := filepath.Glob(filepath.Join(dir, "layers", record.Layers[len(record.Layers)-1].ID+"*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	return found[0]
}

// TestDamagedVolume: an image that somebody has changed or removed is not opened; the pod says which and why,
// and goes on when it is back.
func TestDamagedVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(claim("data", "atoll", ""))
	n.apply(fmt.Sprintf(writer, "before", "atoll", "data"))
	n.ready("before")
	n.exec("before", "sh", "-c", "echo kept > /data/file && sync")
	n.kubectl("delete", "pod", "before")
	volume := n.bound("data")
	image := topImage(t, volume)
	aside := image + ".aside"
	check := func() string {
		return atoll(t, 1, suite.atoll, "volume", "check", "default/"+volume, "--data-dir", suite.dataDir)
	}
	eventually(t, "the volume to be given up", func() error {
		out, err := tryHost(t.Context(), "", "volume", "ls", "-o", "wide")
		for line := range strings.SplitSeq(out, "\n") {
			if strings.Contains(line, volume) && strings.Contains(line, "(rw)") {
				return fmt.Errorf("%s", line)
			}
		}
		return err
	})
	for _, damage := range []struct{ name, do, says string }{
		{"removed", "mv $1 $2", "is missing"},
		{"cut off", "cp --sparse=always $1 $2 && truncate -s 100 $1", "bad header"},
		{"edited", "cp --sparse=always $1 $2 && printf '\\0\\0\\0\\0\\0\\020\\0\\0' | dd of=$1 bs=1 seek=24 conv=notrunc", "has 1048576 bytes of 67108864"},
		{"of somebody else", "cp --sparse=always $1 $2 && rm $1 && qemu-img create -q -f qcow2 -b /etc/passwd -F raw $1 64M", "/etc/passwd"},
	} {
		t.Run(damage.name, func(t *testing.T) {
			n := &namespace{t: t, name: n.name}
			if out, err := exec.Command("sh", "-ec", damage.do, "sh", image, aside).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			t.Cleanup(func() {
				if err := os.Rename(aside, image); err != nil {
					t.Error(err)
				}
			})
			pod := strings.ReplaceAll(damage.name, " ", "-")
			n.apply(fmt.Sprintf(writer, pod, "atoll", "data"))
			n.says("pod/"+pod, damage.says)
			contains(t, n.kubectl("describe", "pod", pod), image)
			contains(t, check(), image)
			n.kubectl("delete", "pod", pod)
		})
	}
	n.apply(fmt.Sprintf(writer, "after", "atoll", "data"))
	n.ready("after")
	equal(t, "with the image back", n.exec("after", "cat", "/data/file"), "kept")
}

// TestVolumeMisuse: two claims for one volume, and a snapshot of one that is on its way out.
func TestVolumeMisuse(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(claim("data", "atoll", ""))
	n.apply(fmt.Sprintf(writer, "one", "atoll", "data"))
	n.ready("one")
	volume := n.bound("data")
	n.apply(claim("thief", "atoll", ", volumeName: "+volume))
	n.says("pvc/thief", "already bound to a different claim")
	n.kubectl("delete", "pvc", "data", "--wait=false")
	n.apply(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: late}
spec: {volumeSnapshotClassName: atoll, source: {persistentVolumeClaimName: data}}
`)
	n.says("volumesnapshot/late", "being deleted")
	n.exec("one", "sh", "-c", "echo on > /data/file && sync") // it is in use still
	n.kubectl("delete", "volumesnapshot", "late", timeout(patience))
	n.kubectl("delete", "pod", "one")
	eventually(t, "the volume to go", func() error {
		if _, err := n.try("get", "pv", volume); err == nil {
			return fmt.Errorf("%s is there still", volume)
		}
		return nil
	})
	equal(t, "the other claim", n.field("pvc/thief", ".status.phase"), "Pending")
}

// TestFullDatastore: a datastore fills up while a pod and a virtual machine write. They stand still and say so, other
// things are refused, and all goes on when there is room; nothing is lost.
func TestFullDatastore(t *testing.T) {
	t.Parallel()
	n := machines(t)
	dir := t.TempDir()
	disk, store := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	sh := func(script string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", script, "sh", disk, store).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	t.Cleanup(func() { _ = exec.Command("umount", "--lazy", store).Run() })
	sh("mkdir $2 && truncate -s 96M $1 && mkfs.ext4 -q -m 0 $1 && mount -o loop $1 $2 && mkdir $2/store")
	name := n.name + "-small"
	n.clusterObject("datastore", name, fmt.Sprintf(`
apiVersion: atoll.dev/v1alpha1
kind: Datastore
metadata: {name: %s}
spec: {refusePercent: 100, directory: {path: %s/store, node: %q}}
`, name, store, run(t, "", "get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")))
	t.Cleanup(func() {
		_ = os.Remove(filepath.Join(store, "ballast")) // the pod cannot end before there is room
		for _, args := range [][]string{{"pod", "one"}, {"vm", "machine"}, {"pvc", "data", "disk"}} {
			if _, err := kubectl(context.Background(), "", append([]string{"-n", n.name, "delete", timeout(longPatience)}, args...)...); err != nil {
				t.Error(err)
			}
		}
	})
	n.storageClass(name, "volumeBindingMode: Immediate\nparameters: {datastore: "+name+"}")
	n.apply(claim("data", name, ""))
	n.apply(fmt.Sprintf(writer, "one", "atoll", "data"))
	n.ready("one")
	n.exec("one", "sh", "-c", "echo first > /data/first && sync")
	n.apply(claim("disk", name, ""))
	n.vm("create", "machine", "--image", "tiny", "--class", "tiny", "--no-bootstrap", "--no-wait")
	n.kubectl("patch", "vm", "machine", "--type=merge", "-p", `{"spec":{"volumes":[{"name":"disk","persistentVolumeClaim":{"claimName":"disk"}}]}}`)
	n.agent("machine")
	device := n.device("machine", "disk")
	boot := n.exec("machine", "cat", "/proc/sys/kernel/random/boot_id")
	data := n.exec("machine", "sh", "-c", "dd if=/dev/urandom of=/run/data bs=1M count=16 2>/dev/null && md5sum </run/data")
	sh("fallocate -l $(($(stat -f -c '%a * %S' $2) - 6291456)) $2/ballast")
	n.exec("one", "sh", "-c", "(sleep 20; yes written | head -c 16000000 > /data/big && sync && echo done > /data/done && sync) >/dev/null 2>&1 &")
	_, _ = n.delivered("machine", "sh", "-c", "setsid sh -c 'sleep 20; dd if=/run/data of="+device+" bs=1M conv=fsync && touch /run/done' >/dev/null 2>&1 &")
	n.says("pod/one", "the datastore is full")
	eventually(t, "the condition of the virtual machine", func() error {
		got, err := n.tryField("vm/machine", `.status.conditions[?(@.type=="atoll.dev/GuestHealthy")]['status','reason','message']`)
		for _, want := range []string{"False DatastoreFull disk disk ", "on datastore " + name, "goes on by itself"} {
			if !strings.Contains(got, want) {
				return fmt.Errorf("%q is not in %q", want, got)
			}
		}
		return err
	})
	equal(t, "power state of the virtual machine", n.field("vm/machine", ".status.powerState"), "PoweredOn")
	eventually(t, "its description to say so", func() error {
		out, err := n.tryVM("describe", "machine")
		if err == nil && !strings.Contains(out, "DatastoreFull") {
			err = errors.New(out)
		}
		return err
	})
	eventually(t, "the condition of the datastore", func() error {
		out, err := n.tryField("datastore/"+name, ".status.conditions[?(@.type=='SpaceAvailable')]")
		if err == nil && !strings.Contains(out, `"Full"`) {
			err = fmt.Errorf("got %s", out)
		}
		return err
	})
	n.apply(claim("more", name, ""))
	n.says("pvc/more", "datastore is full")
	n.kubectl("delete", "pvc", "more")
	sh("rm $2/ballast")
	eventually(t, "the write to go on", func() error {
		out, err := n.try("exec", "one", "--", "cat", "/data/done")
		if err != nil || strings.TrimSpace(out) != "done" {
			return fmt.Errorf("%s, %w", out, err)
		}
		return nil
	})
	eventually(t, "the pod's clock, which has stood still, to be right", func() error {
		out, err := n.tryExec("one", "date", "+%s")
		if err != nil {
			return err
		}
		seconds, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
		if behind := time.Since(time.Unix(seconds, 0)); err != nil || behind > 10*time.Second {
			return fmt.Errorf("it is %v behind, %w", behind, err)
		}
		return nil
	})
	eventually(t, "the condition of the virtual machine to go", func() error { return n.fieldIs("vm/machine", guestHealthy, "") })
	eventually(t, "its write to end", func() error {
		_, err := n.try("exec", "machine", "--", "test", "-e", "/run/done")
		return err
	})
	equal(t, "boot of the virtual machine", n.exec("machine", "cat", "/proc/sys/kernel/random/boot_id"), boot)
	sum := md5.Sum([]byte(strings.Repeat("written\n", 2000000)))
	equal(t, "all of it", n.exec("one", "sh", "-c", "cat /data/first; md5sum < /data/big"), "first\n"+hex.EncodeToString(sum[:])+"  -")
	equal(t, "all that the virtual machine wrote", n.exec("machine", "sh", "-c", "echo 3 >/proc/sys/vm/drop_caches; head -c 16777216 "+device+" | md5sum"), data)
}
