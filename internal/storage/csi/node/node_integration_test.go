//go:build integration

package node_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/csi"
	"atoll.dev/atoll/internal/storage/csi/export"
	"atoll.dev/atoll/internal/storage/csi/node"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/directory"
	"atoll.dev/atoll/internal/storage/datastore/keys"
	"atoll.dev/atoll/internal/storage/stores"
)

// These tests need root, QEMU's tools, FUSE, loop devices and e2fsprogs.

const size = 512 << 20

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// host is a host with a datastore and its node service.
type host struct {
	t            *testing.T
	kubelet, run string
	store        stores.Store
	set          *stores.Set
	refuse       error // of machines that ask for volumes
	*node.Service
}

func newHost(t *testing.T) *host {
	t.Helper()
	return newHostIn(t, t.TempDir())
}

// newHostIn makes one in a directory.
func newHostIn(t *testing.T, dir string) *host {
	t.Helper()
	backend, err := directory.New(directory.Config{
		Path: filepath.Join(dir, "store"), Keys: keys.Wrapper{Source: keys.Static{"gold": {make([]byte, 32)}}},
	})
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(dir, "store"), 0o700))
	_, err = backend.Init(t.Context())
	must(t, err)
	h := &host{t: t, kubelet: filepath.Join(dir, "kubelet"), run: filepath.Join(dir, "run"), set: &stores.Set{}}
	must(t, os.MkdirAll(h.run, 0o700))
	h.store = stores.Store{Name: "default", Backend: backend}
	h.set.Put(h.store)
	h.restart()
	t.Cleanup(func() {
		if n, err := node.CleanUp(h.kubelet, h.exports()); n != 0 || err != nil {
			t.Errorf("%d left on the host, %v", n, err)
		}
	})
	return h
}

// exports waits for storage daemons however slow the host is.
func (h *host) exports() *export.Set {
	return export.New(export.Config{Dir: filepath.Join(h.run, "exports"), Patience: 5 * time.Minute})
}

// restart makes a new service, as after the end of the agent.
func (h *host) restart() {
	h.t.Helper()
	var err error
	h.Service, err = node.New(node.Config{
		Node: "host-1", Stores: h.set, Kubelet: h.kubelet, RunDir: h.run,
		MicroVM: func(_ context.Context, _, name, _ string) (bool, error) { return strings.HasPrefix(name, "vm"), nil },
		Export:  h.exports(),
		MayUse:  func(context.Context, attach.OpenRequest) error { return h.refuse },
	})
	must(h.t, err)
}

func (h *host) volume(id string, edit func(*datastore.Spec)) string {
	h.t.Helper()
	spec := datastore.Spec{ID: id, Size: size}
	if edit != nil {
		edit(&spec)
	}
	_, err := h.store.Create(h.t.Context(), spec)
	must(h.t, err)
	return stores.Handle("default", id)
}

// request publishes a volume for a pod; pods whose name begins with vm are micro-VMs.
func (h *host) request(volume, pod string) *csispec.NodePublishVolumeRequest {
	return &csispec.NodePublishVolumeRequest{
		VolumeId: volume, TargetPath: filepath.Join(h.kubelet, "pods", "uid-"+pod, "volumes/kubernetes.io~csi/pvc-1/mount"),
		VolumeCapability: &csispec.VolumeCapability{
			AccessMode: &csispec.VolumeCapability_AccessMode{Mode: csispec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csispec.VolumeCapability_Mount{Mount: &csispec.VolumeCapability_MountVolume{}},
		},
		VolumeContext: map[string]string{"csi.storage.k8s.io/pod.name": pod, "csi.storage.k8s.io/pod.namespace": "default", "csi.storage.k8s.io/pod.uid": "uid-" + pod},
	}
}

func block(r *csispec.NodePublishVolumeRequest, kubelet string) *csispec.NodePublishVolumeRequest {
	r.VolumeCapability.AccessType = &csispec.VolumeCapability_Block{Block: &csispec.VolumeCapability_BlockVolume{}}
	r.TargetPath = filepath.Join(kubelet, "plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1", r.GetVolumeContext()["csi.storage.k8s.io/pod.uid"])
	return r
}

func (h *host) publish(r *csispec.NodePublishVolumeRequest) {
	h.t.Helper()
	for range 2 { // the second time nothing is to be done
		_, err := h.NodePublishVolume(h.t.Context(), r)
		must(h.t, err)
	}
}

func (h *host) unpublish(r *csispec.NodePublishVolumeRequest) {
	h.t.Helper()
	for range 2 {
		_, err := h.NodeUnpublishVolume(h.t.Context(), &csispec.NodeUnpublishVolumeRequest{VolumeId: r.VolumeId, TargetPath: r.TargetPath})
		must(h.t, err)
	}
	if _, err := os.Lstat(r.TargetPath); !errors.Is(err, os.ErrNotExist) {
		h.t.Errorf("the target after unpublishing: %v", err)
	}
	_, v, err := h.set.Volume(h.t.Context(), r.VolumeId)
	must(h.t, err)
	for _, a := range v.Attachments {
		h.t.Errorf("still attached: %+v", a)
	}
}

// TestFailedPublish: nothing stays of it, since the kubelet does not unpublish what was never published.
func TestFailedPublish(t *testing.T) {
	h := newHost(t)
	r := h.request(h.volume("v", nil), "host")
	r.VolumeCapability.GetMount().MountFlags = []string{"no_such_option"}
	if _, err := h.NodePublishVolume(t.Context(), r); err == nil {
		t.Fatal("mounted with an unknown option")
	}
	_, v, err := h.set.Volume(t.Context(), r.VolumeId)
	must(t, err)
	targets, err := os.ReadDir(filepath.Join(h.kubelet, "plugins", handover.Driver, "targets"))
	must(t, err)
	exports, err := os.ReadDir(filepath.Join(h.run, "exports"))
	must(t, err)
	if len(v.Attachments)+len(targets)+len(exports) > 0 {
		t.Errorf("still there: %v %v %v", v.Attachments, targets, exports)
	}
	r.VolumeCapability.GetMount().MountFlags = nil
	h.publish(r)
	h.unpublish(r)
}

// TestHostPods: pods of the host write, snapshot, growth, a second pod on the same host, agent restart.
func TestHostPods(t *testing.T) {
	for name, edit := range map[string]func(*datastore.Spec){
		"plain":     nil,
		"encrypted": func(s *datastore.Spec) { s.Encryption = "gold" },
		"thick":     func(s *datastore.Spec) { s.Provisioning = datastore.Thick },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			v := h.volume("vol-"+name, edit)
			first, second := h.request(v, "runc-1"), h.request(v, "runc-2")
			first.VolumeCapability.GetMount().VolumeMountGroup = "4000"
			h.publish(first)
			must(t, os.WriteFile(filepath.Join(first.TargetPath, "file"), []byte("kept"), 0o600))
			var st unix.Stat_t
			if err := unix.Stat(first.TargetPath, &st); err != nil || st.Gid != 4000 || st.Mode&0o2770 != 0o2770 {
				t.Errorf("group %d, mode %o: %v", st.Gid, st.Mode, err)
			}
			h.restart()
			h.publish(second)
			if data, err := os.ReadFile(filepath.Join(second.TargetPath, "file")); err != nil || string(data) != "kept" {
				t.Errorf("the second pod reads %q, %v", data, err)
			}
			live := h.Live(v)
			if live == nil {
				t.Fatal("not open for writing")
			}
			f, err := os.Open(second.TargetPath)
			must(t, err)
			must(t, errors.Join(unix.Syncfs(int(f.Fd())), f.Close()))
			_, err = h.store.Snapshot(t.Context(), "snap-"+name, "vol-"+name, live)
			must(t, err)
			must(t, os.WriteFile(filepath.Join(first.TargetPath, "later"), []byte("later"), 0o600))
			stats, err := h.NodeGetVolumeStats(t.Context(), &csispec.NodeGetVolumeStatsRequest{VolumeId: v, VolumePath: first.TargetPath})
			if err != nil || stats.GetUsage()[0].GetTotal() < size*8/10 || stats.GetVolumeCondition().GetAbnormal() {
				t.Errorf("stats: %v, %v", stats, err)
			}
			must(t, h.Limit(t.Context(), v, csi.Limits{IOPS: 100000}))
			h.checkGroup(first)
			_, err = h.NodeUnpublishVolume(t.Context(), &csispec.NodeUnpublishVolumeRequest{VolumeId: v, TargetPath: first.TargetPath})
			must(t, err)
			if data, err := os.ReadFile(filepath.Join(second.TargetPath, "later")); err != nil || string(data) != "later" {
				t.Errorf("after the first pod has ended: %q, %v", data, err)
			}
			h.unpublish(second)

			restored := h.volume("restored-"+name, func(s *datastore.Spec) {
				if edit != nil {
					edit(s)
				}
				s.Size, s.Provisioning, s.Source = 0, "", &datastore.Source{Snapshot: "snap-" + name}
			})
			third := h.request(restored, "runc-3")
			h.publish(third)
			if data, err := os.ReadFile(filepath.Join(third.TargetPath, "file")); err != nil || string(data) != "kept" {
				t.Errorf("the restored volume has %q, %v", data, err)
			}
			if _, err := os.Stat(filepath.Join(third.TargetPath, "later")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the restored volume has what came later: %v", err)
			}
			h.unpublish(third)
			report, err := h.store.Check(t.Context(), nil)
			if err != nil || len(report.Problems) > 0 {
				t.Errorf("check: %+v, %v", report, err)
			}
		})
	}
}

// checkGroup: a request that differs is refused, the same is not.
func (h *host) checkGroup(r *csispec.NodePublishVolumeRequest) {
	h.t.Helper()
	other := h.request(r.VolumeId, "runc-1")
	other.Readonly = true
	if _, err := h.NodePublishVolume(h.t.Context(), other); status.Code(err) != codes.AlreadyExists {
		h.t.Errorf("another way at the same path: %v", err)
	}
}

// TestHostGrowth grows a mounted xfs, which takes no capability that a host may lack.
func TestHostGrowth(t *testing.T) {
	h := newHost(t)
	v := h.volume("grow", nil)
	r := h.request(v, "runc-1")
	r.VolumeCapability.GetMount().FsType = "xfs"
	h.publish(r)
	_, err := h.store.Expand(t.Context(), "grow", 2*size, h.Live(v))
	must(t, err)
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		_, err = h.NodeExpandVolume(t.Context(), &csispec.NodeExpandVolumeRequest{VolumeId: v, VolumePath: r.TargetPath, CapacityRange: &csispec.CapacityRange{RequiredBytes: 2 * size}})
		must(t, err)
		stats, err := h.NodeGetVolumeStats(t.Context(), &csispec.NodeGetVolumeStatsRequest{VolumeId: v, VolumePath: r.TargetPath})
		must(t, err)
		if stats.GetUsage()[0].GetTotal() > size*15/10 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the file system has %d bytes", stats.GetUsage()[0].GetTotal())
		}
	}
	h.unpublish(r)
}

// TestHostBlock: a volume as a device of this host.
func TestHostBlock(t *testing.T) {
	h := newHost(t)
	r := block(h.request(h.volume("block", nil), "runc-1"), h.kubelet)
	h.publish(r)
	f, err := os.OpenFile(r.TargetPath, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("atoll"), 4096)
	must(t, errors.Join(err, f.Sync(), f.Close()))
	stats, err := h.NodeGetVolumeStats(t.Context(), &csispec.NodeGetVolumeStatsRequest{VolumeId: r.VolumeId, VolumePath: r.TargetPath})
	if err != nil || stats.GetUsage()[0].GetTotal() != size {
		t.Errorf("stats: %v, %v", stats, err)
	}
	h.unpublish(r)
	h.publish(r)
	data := make([]byte, 5)
	f, err = os.Open(r.TargetPath)
	must(t, err)
	_, err = f.ReadAt(data, 4096)
	if must(t, errors.Join(err, f.Close())); string(data) != "atoll" {
		t.Errorf("got %q", data)
	}
	h.unpublish(r)
}

// TestMicroVMPods: nothing is mounted; the shim learns how to open the volume, as it is now.
func TestMicroVMPods(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- h.Run(ctx) }()
	v := h.volume("vm", func(s *datastore.Spec) { s.Encryption = "gold" })
	r := h.request(v, "vm-1")
	r.VolumeCapability.GetMount().MountFlags = []string{"noatime"}
	r.VolumeCapability.GetMount().VolumeMountGroup = "77"
	h.publish(r)
	record, err := handover.ReadVolume(handover.PublishedVolume(h.kubelet, "uid-vm-1", "pvc-1"))
	if err != nil || record.ID != v || record.FSType != "ext4" || record.FSGroup == nil || *record.FSGroup != 77 || len(record.MountOptions) != 1 {
		t.Errorf("record: %+v, %v", record, err)
	}
	ask := func(pod string) (attach.Opened, error) {
		var o attach.Opened
		var err error
		for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			err = attach.Call(ctx, attach.AgentSocket(h.run), attach.MethodOpen, attach.OpenRequest{Volume: v, Pod: pod}, &o)
			var refused *attach.Error
			if err == nil || errors.As(err, &refused) {
				break
			}
		}
		return o, err
	}
	o, err := ask("uid-vm-1")
	if err != nil || len(o.Disk.Layers) == 0 || len(o.Keys) == 0 || o.Disk.Size != size {
		t.Fatalf("open: %+v, %v", o.Disk, err)
	}
	if _, err := ask("uid-vm-2"); !errors.Is(err, attach.ErrNotFound) {
		t.Errorf("open by a pod that does not have it: %v", err)
	}
	if _, err := h.NodePublishVolume(ctx, h.request(v, "vm-2")); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a second pod: %v", err)
	}
	if _, err := h.NodePublishVolume(ctx, h.request(v, "runc-2")); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a pod of the host: %v", err)
	}

	// A shim that has it open: it is told, and the volume cannot be taken away.
	socket := filepath.Join(h.run, "shim.sock")
	l, err := attach.Listen(socket)
	must(t, err)
	var told []string
	note := func(s string) { told = append(told, s) }
	go func() {
		_ = attach.Serve(ctx, l, map[string]attach.Handler{
			attach.MethodSnapshot: attach.Handle(func(_ context.Context, r attach.SnapshotRequest) (struct{}, error) {
				if len(r.Key) == 0 {
					return struct{}{}, errors.New("no key")
				}
				note("snapshot")
				return struct{}{}, nil
			}),
			attach.MethodResize: attach.Handle(func(context.Context, attach.ResizeRequest) (struct{}, error) {
				note("resize")
				return struct{}{}, errors.New("no") // nothing here can make the image larger
			}),
			attach.MethodGrow: attach.Handle(func(context.Context, attach.ResizeRequest) (struct{}, error) {
				note("grow")
				return struct{}{}, nil
			}),
			attach.MethodStats: attach.Handle(func(context.Context, attach.VolumeRequest) (attach.Stats, error) {
				return attach.Stats{Capacity: 100, Bytes: 10, Available: 90, Stalled: true}, nil
			}),
		})
	}()
	records := attach.NewRecords(h.run)
	must(t, records.Put(attach.Record{Volume: v, Pod: "uid-vm-1", Socket: socket}))
	_, err = h.store.Snapshot(ctx, "snap", "vm", h.Live(v))
	must(t, err)
	if _, err = h.store.Expand(ctx, "vm", 2*size, h.Live(v)); err == nil {
		t.Error("grown although the shim refused")
	}
	_, err = h.NodeExpandVolume(ctx, &csispec.NodeExpandVolumeRequest{VolumeId: v, VolumePath: r.TargetPath})
	must(t, err)
	if got := strings.Join(told, " "); got != "snapshot resize grow" {
		t.Errorf("told: %q", got)
	}
	again, err := ask("uid-vm-1")
	if err != nil || len(again.Disk.Layers) != len(o.Disk.Layers)+1 {
		t.Errorf("open again: %+v, %v", again.Disk, err)
	}
	stats, err := h.NodeGetVolumeStats(ctx, &csispec.NodeGetVolumeStatsRequest{VolumeId: v, VolumePath: r.TargetPath})
	if err != nil || stats.GetUsage()[0].GetUsed() != 10 || !stats.GetVolumeCondition().GetAbnormal() {
		t.Errorf("stats: %v, %v", stats, err)
	}
	if got := h.Users(v); len(got) != 1 {
		t.Errorf("users: %q", got)
	}
	_, err = h.NodeUnpublishVolume(ctx, &csispec.NodeUnpublishVolumeRequest{VolumeId: v, TargetPath: r.TargetPath})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("taking it from a pod that runs: %v", err)
	}
	must(t, records.Remove(v, "uid-vm-1"))
	// Published, and not open: the engine changes the files itself.
	_, err = h.store.Snapshot(ctx, "snap-closed", "vm", h.Live(v))
	must(t, err)
	_, err = h.store.Expand(ctx, "vm", 2*size, h.Live(v))
	must(t, err)
	if last, err := ask("uid-vm-1"); err != nil || len(last.Disk.Layers) != len(again.Disk.Layers)+1 || last.Disk.Size != 2*size {
		t.Errorf("open after changes while it was closed: %+v, %v", last.Disk, err)
	}
	must(t, os.MkdirAll(filepath.Join(r.TargetPath, "sub/path"), 0o750)) // the kubelet's, for a subPath
	h.unpublish(r)
	if h.Live(v) != nil {
		t.Error("open for writing after the end")
	}

	b := block(h.request(v, "vm-3"), h.kubelet)
	h.publish(b)
	var st unix.Stat_t
	must(t, unix.Stat(b.TargetPath, &st))
	record, err = handover.ReadVolume(handover.PublishedVolume(h.kubelet, "uid-vm-3", "pvc-1"))
	if err != nil || record.Block == nil || record.Block.Major != int64(unix.Major(st.Rdev)) || record.Block.Minor != int64(unix.Minor(st.Rdev)) {
		t.Errorf("record of the block volume: %+v, device %x, %v", record, st.Rdev, err)
	}
	// What the kubelet does with a device: another loop device over it, which goes before it unpublishes.
	out, err := exec.Command("losetup", "-f", "--show", b.TargetPath).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	must(t, exec.Command("losetup", "-d", strings.TrimSpace(string(out))).Run())
	h.unpublish(b)
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestCleanUp: "atoll down" takes everything away, and the kubelet's next call brings it back.
func TestCleanUp(t *testing.T) {
	h := newHost(t)
	mounted := h.request(h.volume("mounted", nil), "runc-1")
	device := block(h.request(h.volume("device", nil), "runc-2"), h.kubelet)
	standIn := block(h.request(h.volume("stand-in", nil), "vm-3"), h.kubelet)
	all := []*csispec.NodePublishVolumeRequest{mounted, device, standIn}
	for _, r := range all {
		h.publish(r)
	}
	must(t, os.WriteFile(filepath.Join(mounted.TargetPath, "file"), []byte("kept"), 0o600))
	exports := h.exports()
	if n, err := node.CleanUp(h.kubelet, exports); n != 3 || err != nil {
		t.Errorf("%d cleaned up, %v", n, err)
	}
	for _, file := range []string{"/proc/self/mountinfo"} {
		text, err := os.ReadFile(file)
		must(t, err)
		if strings.Contains(string(text), h.kubelet) || strings.Contains(string(text), h.run) {
			t.Errorf("mounts are left:\n%s", text)
		}
	}
	backing, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, b := range backing {
		if text, _ := os.ReadFile(b); strings.HasPrefix(string(text), h.run) || strings.HasPrefix(string(text), h.kubelet) {
			t.Errorf("%s is left: %s", b, text)
		}
	}
	h.restart()
	for _, r := range all {
		h.publish(r)
	}
	if data, err := os.ReadFile(filepath.Join(mounted.TargetPath, "file")); err != nil || string(data) != "kept" {
		t.Errorf("after all: %q, %v", data, err)
	}
	for _, r := range all {
		h.unpublish(r)
	}
}

func atoi(s string) int {
	n := 0
	for _, c := range s {
		n = 10*n + int(c-'0')
	}
	return n
}
