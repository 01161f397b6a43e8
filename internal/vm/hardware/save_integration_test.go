//go:build integration

package hardware_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/hardware"
)

// snapshot puts a new layer on a disk and returns its name.
func (r *running) snapshot(t testing.TB, disk, frozen string) string {
	t.Helper()
	overlay := qcow2(t, frozen, "")
	must(t, r.SnapshotDisk(t.Context(), disk,
		vm.Layer{Format: vm.QCOW2, File: open(t, frozen, os.O_RDONLY)},
		vm.Layer{Format: vm.QCOW2, File: open(t, overlay, os.O_RDWR)}))
	return overlay
}

// TestSnapshotAndRevert saves the memory and two disks at one moment while the guest writes to both and to its
// memory, lets it go on, and goes back.
func TestSnapshotAndRevert(t *testing.T) {
	ctx := t.Context()
	cfg, boot := machine(t)
	data := qcow2(t, "", "16M")
	cfg.Machine.Disks = append(cfg.Machine.Disks, machinev1.Disk{Name: "data", Bus: machinev1.SCSI, Unit: 1, UUID: uuid(2)})
	cfg.Disks["data"] = chain(t, false, data)
	m := start(t, cfg)
	m.up(t)
	// What is added while it runs is there again afterwards.
	more := qcow2(t, "", "16M")
	late := machinev1.Disk{Name: "late", Bus: machinev1.SCSI, Controller: 1, UUID: uuid(3)}
	must(t, m.AddDisk(ctx, late, chain(t, false, more)))
	_, err := m.AddMemory(ctx, 128<<20)
	must(t, err)
	m.cpus(t, 2)
	nic := machinev1.NIC{Name: "eth1", Model: "virtio-net-pci", MAC: "52:54:00:00:00:02"}
	must(t, m.AddNIC(ctx, nic, isolated(t, "tap1")))
	m.want(t, "1", "echo 1 > /sys/devices/system/cpu/cpu1/online; cat /sys/devices/system/cpu/cpu1/online")
	first, second := m.device(t, 2), m.device(t, 3)
	// The same number goes to both disks and to a file in memory, one after the other.
	m.sh(t, strings.NewReplacer("FIRST", first, "SECOND", second).Replace(`cat > /run/writer <<'END'
echo $$ > /run/pid
n=0
while true; do
	n=$((n + 1))
	echo $n > /run/next; mv /run/next /run/count # so that it is never empty
	echo $n | dd of=FIRST conv=fsync 2>/dev/null
	echo $n | dd of=SECOND conv=fsync 2>/dev/null
done
END
setsid sh /run/writer >/dev/null 2>&1 < /dev/null &`))
	m.want(t, "on", "test $(cat /run/count) -gt 5 && echo on")

	cancelled(t, m)
	memory := filepath.Join(t.TempDir(), "memory")
	file, err := os.Create(memory)
	must(t, err)
	var percents []int
	saved, err := m.SaveMemory(ctx, file, hardware.SaveOptions{
		Progress: func(p int) { percents = append(percents, p) },
		AtPause: func() error {
			m.snapshot(t, "boot", boot)
			m.snapshot(t, "data", data)
			m.snapshot(t, "late", more)
			return nil
		},
	})
	must(t, err)
	t.Logf("saved %+v, %v", saved, percents)
	if st, err := file.Stat(); err != nil || st.Size() != saved.Bytes {
		t.Errorf("%v, %v", st.Size(), err)
	}
	if n, err := m.DiskDepth(ctx, "data"); err != nil || n != 2 {
		t.Errorf("%d layers, %v", n, err)
	}
	// It goes on, and writes to the overlays.
	was := m.sh(t, "cat /run/count")
	m.want(t, "on", "test $(cat /run/count) -gt "+was+" && echo on")
	must(t, m.Kill())
	m.ended(t)

	_, err = file.Seek(0, io.SeekStart)
	must(t, err)
	back := cfg
	back.Machine, err = hardware.SavedMachine(file)
	must(t, err)
	if len(back.Machine.Disks) != 3 || len(back.Machine.NICs) != 2 {
		t.Fatalf("%+v", back.Machine)
	}
	back.Incoming = file
	back.Disks = map[string]vm.Volume{
		"boot": chain(t, false, tiny(t), boot, qcow2(t, boot, "")),
		"data": chain(t, false, data, qcow2(t, data, "")), "late": chain(t, false, more, qcow2(t, more, "")),
	}
	back.Taps = map[string]*os.File{"eth0": isolated(t, "tap0"), "eth1": isolated(t, "tap1")}
	begin := time.Now()
	r := start(t, back)
	r.up(t)
	t.Logf("back after %s", time.Since(begin).Round(time.Millisecond))
	r.sh(t, "kill $(cat /run/pid)")
	count := r.sh(t, "cat /run/count")
	if s := r.Size(); s.CPUs != 2 || s.Memory != 640<<20 {
		t.Errorf("%+v", s)
	}
	t.Logf("saved at %d, then at %s before it was ended", number(t, data), was)
	// What was on the disks at that moment is what the guest had just written.
	inMemory, a, b := atoi(t, count), number(t, data), number(t, more)
	if a < b || a > b+1 || inMemory < a {
		t.Errorf("disks at %d and %d, memory at %d", a, b, inMemory)
	}
	for _, dev := range []string{first, second} {
		got := atoi(t, r.sh(t, "head -c 32 "+dev+" | tr -d '\\0' | head -n 1"))
		if got < inMemory-1 || got > inMemory {
			t.Errorf("%s at %d, memory at %d", dev, got, inMemory)
		}
	}
	removed(t, r.RemoveNIC, "eth1")
	removed(t, r.RemoveDisk, "late")
	r.cpus(t, 3)
	_, err = r.AddMemory(ctx, 128<<20)
	must(t, err)
}

func atoi(t testing.TB, s string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(s, &n); err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	return n
}

// number is what is written at the beginning of an image.
func number(t testing.TB, image string) int {
	t.Helper()
	out, err := exec.Command("qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read -v 0 16", image).Output()
	must(t, err)
	line, _, _ := strings.Cut(string(out), "\n")
	digits, _, _ := strings.Cut(line[strings.LastIndex(line, "  ")+2:], ".")
	return atoi(t, digits)
}

// cancelled: giving up leaves the machine running, whatever was the reason.
func cancelled(t *testing.T, m *running) {
	null := open(t, "/dev/null", os.O_WRONLY)
	gone := errors.New("the snapshot failed")
	if _, err := m.SaveMemory(t.Context(), null, hardware.SaveOptions{AtPause: func() error { return gone }}); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := m.SaveMemory(ctx, null, hardware.SaveOptions{AtPause: func() error { cancel(); return ctx.Err() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if _, err := m.SaveMemory(t.Context(), open(t, "/dev/full", os.O_WRONLY), hardware.SaveOptions{}); err == nil {
		t.Error("a full file was written")
	}
	was := m.sh(t, "cat /run/count")
	m.want(t, "on", "test $(cat /run/count) -gt "+was+" && echo on")
}

// TestSuspend ends a machine with its memory saved, and goes on from it.
func TestSuspend(t *testing.T) {
	ctx := t.Context()
	cfg, boot := machine(t)
	m := start(t, cfg)
	m.up(t)
	m.sh(t, "echo here > /run/mark")
	file, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	must(t, err)
	saved, err := m.SaveMemory(ctx, file, hardware.SaveOptions{End: true})
	must(t, err)
	t.Logf("%+v", saved)
	must(t, m.PowerOff(ctx))
	_, err = file.Seek(0, io.SeekStart)
	must(t, err)
	other := cfg
	other.Incoming, other.Machine.UID = file, "another"
	if _, err := hardware.Start(ctx, other); !errors.Is(err, hardware.ErrMemoryImage) {
		t.Errorf("%v", err)
	}
	_, err = file.Seek(0, io.SeekStart)
	must(t, err)
	cfg.Incoming, cfg.Paused = file, true
	cfg.Disks["boot"] = chain(t, false, tiny(t), boot)
	cfg.Taps["eth0"] = isolated(t, "tap0")
	r := start(t, cfg)
	must(t, r.Resume(ctx))
	r.up(t)
	r.want(t, "here", "cat /run/mark")
}
