//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// diskImage makes a qcow2 image of 64 MiB with a pattern from 10 MiB on.
func diskImage(t *testing.T, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	for _, command := range [][]string{
		append(append([]string{"qemu-img", "create", "-q", "-f", "qcow2"}, args...), path, "64M"),
		{"qemu-io", "-f", "qcow2", "-c", "write -P 85 510 1", "-c", "write -P 170 511 1", "-c", "write -P 7 10M 20M", path},
	} {
		if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
	return path
}

// imported is an item as atoll image import prints it.
type imported struct {
	Metadata struct {
		Name string `json:"name"`
	} `json:"metadata"`
	Status struct {
		Host           string `json:"host"`
		ContentVersion string `json:"contentVersion"`
	} `json:"status"`
}

// imageOf is the name of the image of an item.
func (n *namespace) imageOf(item string) string {
	n.t.Helper()
	var name string
	eventually(n.t, "the image of "+item, func() error {
		out, err := kubectl(n.t.Context(), "", "-n", n.name, "get", "virtualmachineimages", "-o", `jsonpath={range .items[*]}{.spec.providerRef.name} {.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}`)
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == item && f[2] == "True" {
				name = f[1]
				return nil
			}
		}
		return fmt.Errorf("%w: images are %q", err, out)
	})
	return name
}

// bootClaim is a claim of a copy of an image.
func bootClaim(name, image, size string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s, annotations: {atoll.dev/image: %s}}
spec: {storageClassName: atoll, volumeMode: Block, accessModes: [ReadWriteOnce], resources: {requests: {storage: %s}}}
`, name, image, size)
}

const blockReader = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sleep, "100000"]
      volumeDevices: [{name: disk, devicePath: /dev/disk}]
  volumes: [{name: disk, persistentVolumeClaim: {claimName: %[2]s}}]
`

// TestImagesOfMachines: an image comes in from a file, claims get copies of it at once, which outlive it; what is
// malicious or does not fit is refused with a reason.
func TestImagesOfMachines(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	path := diskImage(t)
	var item imported
	out, err := exec.CommandContext(t.Context(), suite.atoll, "image", "import", path, "--name", "My Disk", "-n", n.name, "-o", "json", "--data-dir", suite.dataDir).Output() // without the progress
	if err == nil {
		err = json.Unmarshal(out, &item)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	equal(t, "item", item.Metadata.Name, "my-disk")
	contains(t, atollOK(t, "image", "import", path, "--name", "My Disk", "-n", n.name), "imported My Disk as vmi-") // again, nothing to do
	image := n.imageOf("my-disk")
	contains(t, atollOK(t, "image", "ls", "--vm", "-n", n.name), image)
	for _, version := range []string{"v1alpha2", "v1alpha5"} {
		equal(t, "name of the image in "+version, n.field("virtualmachineimages."+version+".vmoperator.vmware.com/"+image, ".status.name"), "My Disk")
	}

	n.apply(bootClaim("small", "VirtualMachineImage/"+image, "32Mi") + "---" + bootClaim("boot", "VirtualMachineImage/"+image, "64Mi") + "---" + bootClaim("none", "VirtualMachineImage/vmi-none", "64Mi"))
	for pod, of := range map[string]string{"box": "boot", "tight": "small", "lost": "none"} {
		n.apply(fmt.Sprintf(blockReader, pod, of))
	}
	n.ready("box")
	read := `dd if=/dev/disk bs=1M skip=10 count=20 2>/dev/null | tr -d '\007' | wc -c; dd if=/dev/disk bs=1M skip=30 count=1 2>/dev/null | tr -d '\000' | wc -c`
	equal(t, "what the copy holds", n.exec("box", "sh", "-c", read), "0\n0")
	n.says("pvc/small", "has 67108864 (64Mi); set spec.resources.requests.storage to 64Mi or more")
	n.says("pvc/none", "there is no VirtualMachineImage/vmi-none")

	appliance, plain := filepath.Join(t.TempDir(), "out.ova"), filepath.Join(t.TempDir(), "out.qcow2")
	contains(t, atollOK(t, "image", "export", "My Disk", "-n", n.name, "-f", plain), "exported My Disk")
	if out, err := exec.CommandContext(t.Context(), "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", path, plain).CombinedOutput(); err != nil {
		t.Errorf("what was exported as qcow2 is another disk: %v\n%s", err, out)
	}
	contains(t, atollOK(t, "image", "export", "My Disk", "-n", n.name, "-f", appliance), "exported My Disk")
	contains(t, atollOK(t, "image", "import", appliance, "--name", "again", "-n", n.name), "imported again")
	atollOK(t, "image", "rm", "--vm", "My Disk", "-n", n.name)
	eventually(t, "the image to go", func() error {
		if out, err := n.try("get", "virtualmachineimage", image); err == nil {
			return fmt.Errorf("it is there: %s", out)
		}
		return nil
	})
	equal(t, "what the copy holds without its image", n.exec("box", "sh", "-c", read), "0\n0")

	evil := diskImage(t, "-b", "/etc/shadow", "-F", "raw")
	contains(t, atoll(t, 1, suite.atoll, "image", "import", evil, "--name", "evil", "-n", n.name, "--data-dir", suite.dataDir), "backing file")
	short := filepath.Join(t.TempDir(), "short.qcow2")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(short, b[:len(b)-5<<20], 0o600); err != nil {
		t.Fatal(err)
	}
	contains(t, atoll(t, 1, suite.atoll, "image", "import", short, "--name", "short", "-n", n.name, "--data-dir", suite.dataDir), "truncated")
	contains(t, atoll(t, 1, suite.atoll, "image", "import", path, "--name", "sum", "-n", n.name, "--checksum", strings.Repeat("0", 64), "--data-dir", suite.dataDir), "ChecksumMismatch")
	contains(t, n.refused(`
apiVersion: imageregistry.vmware.com/v1alpha1
kind: ContentLibraryItem
metadata: {name: two}
spec: {source: {http: {url: "https://x/y"}, oci: {reference: "a/b:c"}}}
`), "exactly one of http, oci, upload and volume")
}

// TestImageFormats: a machine boots from an image in one format and has disks of others, and they are the same.
func TestImageFormats(t *testing.T) {
	t.Parallel()
	n := machines(t)
	tiny := tinyDisk()
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw.img")
	commands := [][]string{{"qemu-img", "convert", "-O", "raw", tiny, raw}, {"sh", "-c", "xz -0 -c " + raw + " >" + filepath.Join(dir, "xz.img.xz")}}
	files := map[string]string{"raw": raw, "xz": filepath.Join(dir, "xz.img.xz")}
	for name, options := range map[string][]string{
		"vhdx": {"-O", "vhdx"}, "vhd": {"-O", "vpc", "-o", "force_size=on"}, "vmdk": {"-O", "vmdk", "-o", "subformat=monolithicSparse"},
	} {
		files[name] = filepath.Join(dir, name)
		commands = append(commands, append(append([]string{"qemu-img", "convert"}, options...), tiny, files[name]))
	}
	for _, command := range commands {
		if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
	var volumes []string
	for name, file := range files {
		atollOK(t, "image", "import", file, "--name", name, "-n", n.name)
		if name == "vhdx" {
			continue
		}
		n.apply(bootClaim(name, "VirtualMachineImage/"+n.imageOf(name), fmt.Sprint(capacity(t, tiny))))
		volumes = append(volumes, fmt.Sprintf("{name: %[1]s, persistentVolumeClaim: {claimName: %[1]s}}", name))
	}
	n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: box}
spec: {className: tiny, imageName: vhdx, storageClass: atoll, powerOffMode: Hard, volumes: [%s]}
`, strings.Join(volumes, ", ")))
	n.agent("box")
	eventually(t, "all volumes to be attached", func() error {
		return n.fieldIs("vm/box", ".status.volumes[*].attached", "true true true true true")
	})
	// The last partition is for data, and that of the boot disk has been written to.
	same := `cd /sys/block/sda; last=$(ls -d sda? | tail -n 1); sectors=$(cat $last/start)
for d in /dev/sd[b-e]; do dd if=$d bs=512 count=$sectors 2>/dev/null | sha256sum; done >/run/sums
dd if=/dev/sda bs=512 count=$sectors 2>/dev/null | sha256sum >/run/sum
echo $((sectors > 2048)) $(wc -l </run/sums) $(sort -u /run/sum /run/sums | wc -l)`
	equal(t, "size is more than nothing, disks, different contents", n.exec("box", "sh", "-c", same), "1 4 1")
}

// hostAddress is an address of this host that is not its loopback.
func hostAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() != nil && !ip.IP.IsLoopback() {
			return ip.IP.String()
		}
	}
	t.Fatal("this host has no address")
	return ""
}

// listen opens a port at an address of this host that its services may fetch from.
func listen(t *testing.T) (net.Listener, error) {
	t.Helper()
	return net.Listen("tcp", net.JoinHostPort(hostAddress(t), "0"))
}

// TestInterruptedImport: the agent is killed in the middle of a transfer, which goes on where it was.
func TestInterruptedImport(t *testing.T) {
	b, err := os.ReadFile(diskImage(t))
	if err != nil {
		t.Fatal(err)
	}
	var resumed, sent atomic.Int64
	var slow atomic.Bool
	slow.Store(true)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "" {
			resumed.Add(1)
		}
		w.Header().Set("ETag", `"one"`)
		http.ServeContent(&slowly{w, &slow, &sent}, r, "disk.qcow2", time.Time{}, bytes.NewReader(b))
	}))
	l, err := listen(t)
	if err != nil {
		t.Fatal(err)
	}
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	name := fmt.Sprintf("interrupted-%d", time.Now().Unix())
	t.Cleanup(func() {
		_, _ = kubectl(context.Background(), "", "delete", "clustercontentlibraryitem", name)
	})
	atollOK(t, "image", "import", s.URL+"/disk.qcow2", "--name", name, "--no-wait")
	eventually(t, "the transfer to be under way", func() error {
		if n := sent.Load(); n < 4<<20 {
			return fmt.Errorf("%d bytes sent", n)
		}
		return nil
	})
	eventually(t, "the status to say how far it is", func() error {
		progress, err := kubectl(t.Context(), "", "get", "clustercontentlibraryitem", name, "-o", "jsonpath={.status.progress['phase','bytesTotal','percent']}")
		if err != nil {
			return err
		}
		var phase string
		var total, percent int
		if _, err := fmt.Sscan(progress, &phase, &total, &percent); err != nil || phase != "Transferring" || total != len(b) || percent < 10 || percent > 99 {
			return fmt.Errorf("of %d bytes it says %q, %w", len(b), progress, err)
		}
		return nil
	})
	killService(t, "agent")
	slow.Store(false)
	contains(t, atollOK(t, "image", "import", s.URL+"/disk.qcow2", "--name", name), "imported "+name)
	if resumed.Load() == 0 || sent.Load() > int64(len(b))+8<<20 {
		t.Errorf("%d requests for a part; %d bytes sent of %d", resumed.Load(), sent.Load(), len(b))
	}
}

// slowly writes little at a time for as long as slow says so, and less when a good part is sent.
type slowly struct {
	http.ResponseWriter
	slow *atomic.Bool
	sent *atomic.Int64
}

func (s *slowly) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := s.ResponseWriter.Write(p[done:min(len(p), done+64<<10)])
		done += n
		s.sent.Add(int64(n))
		if err != nil {
			return done, err
		}
		if s.slow.Load() {
			if f, ok := s.ResponseWriter.(http.Flusher); ok {
				f.Flush()
			}
			time.Sleep(5 * time.Millisecond)
			if s.sent.Load() > 4<<20 {
				time.Sleep(time.Second)
			}
		}
	}
	return done, nil
}

// TestVolumeRollback: only the controllers of virtual machines can have a volume go back, and it does.
func TestVolumeRollback(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(claim("data", "atoll", ""))
	n.apply(fmt.Sprintf(writer, "one", "atoll", "data"))
	n.ready("one")
	n.exec("one", "sh", "-c", "echo first > /data/file && sync")
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
	content := n.field("volumesnapshot/before", ".status.boundVolumeSnapshotContentName")
	handle := run(t, "", "get", "volumesnapshotcontent", content, "-o", "jsonpath={.status.snapshotHandle}")
	volume := n.field("pvc/data", ".spec.volumeName")
	if out, err := kubectl(t.Context(), "", "annotate", "pv", volume, "atoll.dev/rollback="+handle); err == nil || !strings.Contains(out, "controllers of virtual machines only") {
		t.Errorf("%v: %s", err, out)
	}
	run(t, "", "annotate", "pv", volume, "atoll.dev/rollback="+handle, "--as", "system:atoll:vm-controller")
	annotation := func(name string) string {
		return run(t, "", "get", "pv", volume, "-o", `jsonpath={.metadata.annotations.atoll\.dev/`+name+`}`)
	}
	eventually(t, "that it is in use", func() error {
		if text := annotation("rollback-error"); !strings.Contains(text, "attached") {
			return fmt.Errorf("it says %q", text)
		}
		return nil
	})
	n.kubectl("delete", "pod", "one")
	eventually(t, "the rollback", func() error {
		if done := annotation("rolled-back"); done != handle {
			return fmt.Errorf("rolled back to %q: %s", done, annotation("rollback-error"))
		}
		return nil
	})
	n.apply(fmt.Sprintf(writer, "two", "atoll", "data"))
	n.ready("two")
	equal(t, "what is in the file", n.exec("two", "cat", "/data/file"), "first")
}
