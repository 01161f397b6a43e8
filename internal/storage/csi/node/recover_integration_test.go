//go:build integration

package node_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
)

// TestLoopNotRecorded: a device that was made by an agent that died before it could note it is used, or given back.
func TestLoopNotRecorded(t *testing.T) {
	h := newHost(t)
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

// unrecord takes the device out of the record of a target, as if the agent had died right after it was made, and
// returns the devices there are.
func (h *host) unrecord(r *csispec.NodePublishVolumeRequest) []string {
	h.t.Helper()
	sum := sha256.Sum256([]byte(r.TargetPath))
	file := filepath.Join(h.kubelet, "plugins", handover.Driver, "targets", hex.EncodeToString(sum[:])+".json")
	data, err := os.ReadFile(file)
	must(h.t, err)
	var record map[string]any
	must(h.t, json.Unmarshal(data, &record))
	if record["loop"] == nil {
		h.t.Fatalf("no device in %s", data)
	}
	delete(record, "loop")
	data, err = json.Marshal(record)
	must(h.t, err)
	must(h.t, os.WriteFile(file, data, 0o600))
	must(h.t, unix.Unmount(r.TargetPath, 0))
	return h.devices()
}

// devices are the loop devices over files of this host.
func (h *host) devices() []string {
	h.t.Helper()
	out, err := exec.Command("losetup", "--noheadings", "--list", "--output", "NAME,BACK-FILE").Output()
	must(h.t, err)
	var found []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, filepath.Dir(h.kubelet)) {
			found = append(found, strings.Fields(line)[0])
		}
	}
	return found
}
