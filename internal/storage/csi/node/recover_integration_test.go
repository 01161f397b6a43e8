//go:build integration

package node_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/linux/loop"
)

// TestStorageDaemonKilled: a volume whose daemon has died is put back by the next call.
func TestStorageDaemonKilled(t *testing.T) {
	h := newHost(t)
	r := h.request(h.volume("killed", nil), "runc-1")
	h.publish(r)
	f, err := os.Create(filepath.Join(r.TargetPath, "file"))
	must(t, err)
	_, err = f.WriteString("synchronized")
	must(t, errors.Join(err, f.Sync(), f.Close()))
	pids, err := filepath.Glob(filepath.Join(h.run, "exports/*/pid"))
	if err != nil || len(pids) != 1 {
		t.Fatal(pids, err)
	}
	pid, err := os.ReadFile(pids[0])
	must(t, err)
	p, err := os.FindProcess(atoi(string(pid)))
	must(t, err)
	device, _ := h.record(r)["loop"].(string)
	must(t, p.Kill())
	for end := time.Now().Add(time.Minute); unix.Kill(p.Pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the daemon lives")
		}
	}
	h.publish(r)
	if data, err := os.ReadFile(filepath.Join(r.TargetPath, "file")); err != nil || string(data) != "synchronized" {
		t.Errorf("after the daemon's end: %q, %v", data, err)
	}
	if loop.Orphan(device) {
		t.Errorf("%s is left of the daemon that has died", device)
	}
	h.unpublish(r)
}

// TestSweptAtStart: a storage daemon that no target needs ends when the service runs, and others go on.
func TestSweptAtStart(t *testing.T) {
	h := newHost(t)
	kept, lost := h.request(h.volume("kept", nil), "runc-1"), block(h.request(h.volume("lost", nil), "runc-2"), h.kubelet)
	h.publish(kept)
	exports := func() int {
		all, err := os.ReadDir(filepath.Join(h.run, "exports"))
		must(t, err)
		return len(all)
	}
	h.publish(lost)
	for _, device := range h.unrecord(lost) {
		if device != h.record(kept)["loop"] {
			must(t, loop.Detach(device))
		}
	}
	must(t, os.Remove(h.recordFile(lost)))
	h.restart()
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- h.Run(ctx) }()
	for deadline := time.Now().Add(2 * time.Minute); exports() > 1 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if n := exports(); n != 1 {
		t.Errorf("%d exports, want one", n)
	}
	must(t, os.WriteFile(filepath.Join(kept.TargetPath, "file"), []byte("kept"), 0o600))
	cancel()
	must(t, <-ran)
	h.unpublish(kept)
}

// TestLoopNotRecorded: a device that was made by an agent that died before it could note it is used, or given back.
func TestLoopNotRecorded(t *testing.T) { loopNotRecorded(t, newHost(t)) }

// TestLoopBehindLink: the kernel knows the files of devices by other names.
func TestLoopBehindLink(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(t.TempDir(), dir))
	h := newHostIn(t, dir)
	loopNotRecorded(t, h)
	for _, pod := range []string{"vm-1", "runc-1"} {
		r := block(h.request(h.volume("w-"+pod, nil), pod), h.kubelet)
		h.publish(r)
		h.unpublish(r)
		if left := h.devices(); len(left) > 0 {
			t.Errorf("%s: left %v", pod, left)
		}
	}
}

func loopNotRecorded(t *testing.T, h *host) {
	for _, pod := range []string{"vm-1", "runc-1"} {
		r := block(h.request(h.volume("v-"+pod, nil), pod), h.kubelet)
		h.publish(r)
		devices := h.unrecord(r)
		h.restart()
		h.publish(r)
		if again := h.devices(); len(devices) != 1 || !slices.Equal(again, devices) {
			t.Errorf("%s: devices %v, then %v", pod, devices, again)
		}
		h.unrecord(r)
		h.restart()
		h.unpublish(r)
		if left := h.devices(); len(left) > 0 {
			t.Errorf("%s: left %v", pod, left)
		}
	}
}

// TestLastTargetNotNoted: the last target may be one that an agent noted and then died; what another one had mounted
// is written out all the same before the storage daemon ends.
func TestLastTargetNotNoted(t *testing.T) {
	h := newHost(t)
	volume := h.volume("v", nil)
	first, last := h.request(volume, "runc-1"), h.request(volume, "runc-2")
	h.publish(first)
	must(t, os.WriteFile(filepath.Join(first.TargetPath, "file"), []byte("kept"), 0o600))
	h.publish(last)
	must(t, unix.Unmount(last.TargetPath, 0))
	h.edit(last, func(record map[string]any) {
		delete(record, "loop")
		delete(record, "backing")
	})
	h.restart()
	_, err := h.NodeUnpublishVolume(t.Context(), &csispec.NodeUnpublishVolumeRequest{VolumeId: volume, TargetPath: first.TargetPath})
	must(t, err)
	h.unpublish(last)
	if left := h.devices(); len(left) > 0 {
		t.Errorf("left %v", left)
	}
	if left := h.mounts(); len(left) > 0 {
		t.Errorf("mounted still: %v", left)
	}
	h.publish(first)
	if data, err := os.ReadFile(filepath.Join(first.TargetPath, "file")); err != nil || string(data) != "kept" {
		t.Errorf("%q, %v", data, err)
	}
	h.unpublish(first)
}

// TestBusyAtTheEnd: while somebody has a file open, the storage daemon goes on, however often the kubelet asks.
func TestBusyAtTheEnd(t *testing.T) {
	h := newHost(t)
	r := h.request(h.volume("busy", nil), "runc-1")
	h.publish(r)
	f, err := os.Create(filepath.Join(r.TargetPath, "file"))
	must(t, err)
	defer f.Close()
	must(t, unix.Unmount(r.TargetPath, unix.MNT_DETACH)) // as of a container that is just going away
	for i := range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err = h.NodeUnpublishVolume(ctx, &csispec.NodeUnpublishVolumeRequest{VolumeId: r.VolumeId, TargetPath: r.TargetPath})
		cancel()
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("call %d while a file is open: %v", i, err)
		}
	}
	_, err = f.WriteString("late")
	must(t, errors.Join(err, f.Sync(), f.Close()))
	h.unpublish(r)
	h.publish(r)
	if data, err := os.ReadFile(filepath.Join(r.TargetPath, "file")); err != nil || string(data) != "late" {
		t.Errorf("%q, %v", data, err)
	}
	h.unpublish(r)
}

// mounts are those below the directory of this host.
func (h *host) mounts() []string {
	h.t.Helper()
	data, err := os.ReadFile("/proc/mounts")
	must(h.t, err)
	var found []string
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, filepath.Dir(h.kubelet)) {
			found = append(found, line)
		}
	}
	return found
}

// unrecord takes the device out of the record of a target, as if the agent had died right after it was made, and
// returns the devices there are.
func (h *host) unrecord(r *csispec.NodePublishVolumeRequest) []string {
	h.t.Helper()
	h.edit(r, func(record map[string]any) {
		if record["loop"] == nil {
			h.t.Fatalf("no device in %v", record)
		}
		delete(record, "loop")
	})
	must(h.t, unix.Unmount(r.TargetPath, 0))
	return h.devices()
}

// edit changes what the service has noted about a target.
func (h *host) edit(r *csispec.NodePublishVolumeRequest, change func(record map[string]any)) {
	h.t.Helper()
	record := h.record(r)
	change(record)
	data, err := json.Marshal(record)
	must(h.t, err)
	must(h.t, os.WriteFile(h.recordFile(r), data, 0o600))
}

func (h *host) recordFile(r *csispec.NodePublishVolumeRequest) string {
	sum := sha256.Sum256([]byte(r.TargetPath))
	return filepath.Join(h.kubelet, "plugins", handover.Driver, "targets", hex.EncodeToString(sum[:])+".json")
}

// record is what the service has noted about a target.
func (h *host) record(r *csispec.NodePublishVolumeRequest) (record map[string]any) {
	h.t.Helper()
	data, err := os.ReadFile(h.recordFile(r))
	must(h.t, err)
	must(h.t, json.Unmarshal(data, &record))
	return record
}

// devices are the loop devices over files of this host.
func (h *host) devices() []string {
	h.t.Helper()
	out, err := exec.Command("losetup", "--noheadings", "--list", "--output", "NAME,BACK-FILE").Output()
	must(h.t, err)
	dir, err := filepath.EvalSymlinks(filepath.Dir(h.kubelet))
	must(h.t, err)
	var found []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, dir) {
			found = append(found, strings.Fields(line)[0])
		}
	}
	return found
}
