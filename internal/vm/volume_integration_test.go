//go:build integration

package vm_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/testkit/lukstest"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/vmtest"
)

func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
	return string(out)
}

// qcow2 makes an empty image; backing is the file below it, or "".
func qcow2(t testing.TB, name, backing string, args ...string) string {
	t.Helper()
	name = filepath.Join(t.TempDir(), name)
	args = append([]string{"-f", "qcow2"}, args...)
	if backing != "" {
		args = append(args, "-b", backing, "-F", "qcow2")
	}
	must(t, lukstest.Create(append(args, name, "8M")...))
	return name
}

func layers(t testing.TB, flag int, names ...string) []vm.Layer {
	t.Helper()
	var out []vm.Layer
	for i, n := range names {
		mode := os.O_RDONLY
		if i == len(names)-1 {
			mode = flag
		}
		out = append(out, vm.Layer{Format: vm.QCOW2, File: open(t, n, mode)})
	}
	return out
}

// holders are the processes that have a file open, each with how.
func holders(t testing.TB, name string) []string {
	t.Helper()
	var want unix.Stat_t
	must(t, unix.Stat(name, &want))
	var out []string
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, l := range links {
		var st unix.Stat_t
		if unix.Stat(l, &st) != nil || st.Ino != want.Ino || st.Dev != want.Dev {
			continue
		}
		info, _ := os.ReadFile(strings.Replace(l, "/fd/", "/fdinfo/", 1))
		var pos, flags int
		_, _ = fmt.Sscanf(string(info), "pos: %d\nflags: %o", &pos, &flags)
		out = append(out, fmt.Sprintf("%s %d", strings.Split(l, "/")[2], flags&unix.O_ACCMODE))
	}
	return out
}

// TestVolume goes through the life of a volume: chain, lock, snapshot, growth, limits, removal, next machine.
func TestVolume(t *testing.T) {
	ctx := t.Context()
	tmpl := build(t)
	m := vmtest.Clone(t, tmpl, vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	base := qcow2(t, "base", "")
	top := qcow2(t, "top", base)
	chain := layers(t, os.O_RDWR, base, top)
	lun, err := m.AddVolume(ctx, vm.Volume{Serial: "vol-1", Layers: chain})
	must(t, err)
	for _, l := range chain {
		must(t, l.File.Close())
	}
	g.Want(t, "0000", "lun %d 0 2", lun)
	g.Want(t, "ok", "write %d 4096 abcd", lun)
	if _, err := m.AddVolume(ctx, vm.Volume{Serial: "vol-1", Layers: layers(t, os.O_RDWR, base, top)}); err == nil {
		t.Error("the same serial was taken twice")
	}

	// The lock keeps everybody else out, and the one on the base lets readers in.
	other := vmtest.Clone(t, tmpl, vm.CloneConfig{UID: vmtest.UID + 1, GID: vmtest.UID + 1})
	if _, err := other.AddVolume(ctx, vm.Volume{Serial: "x", Layers: layers(t, os.O_RDWR, base, top)}); !errors.Is(err, vm.ErrLocked) {
		t.Errorf("a second writer: %v", err)
	}
	clone := qcow2(t, "clone", base)
	otherLUN, err := other.AddVolume(ctx, vm.Volume{Serial: "x", Layers: layers(t, os.O_RDWR, base, clone)})
	must(t, err)
	og := vmtest.NewGuest(other)
	og.Want(t, "0000", "lun %d 4096 2", otherLUN)

	// After a snapshot writes go to the new layer, and QEMU holds the old one for reading only.
	overlay := qcow2(t, "overlay", top)
	must(t, m.SnapshotVolume(ctx, "vol-1", layers(t, os.O_RDONLY, top)[0], layers(t, os.O_RDWR, overlay)[0]))
	if n, err := m.Depth(ctx, "vol-1"); n != 3 || err != nil {
		t.Errorf("%d layers, %v", n, err)
	}
	before, err := os.ReadFile(top)
	must(t, err)
	g.Want(t, "abcd", "lun %d 4096 2", lun)
	g.Want(t, "ok", "write %d 8192 ef01", lun)
	g.Want(t, "ef01", "lun %d 8192 2", lun)
	_ = before
	pid := fmt.Sprint(m.PID())
	for _, h := range holders(t, top) {
		if h == pid+" 2" {
			t.Errorf("qemu can still write to the frozen layer")
		}
	}
	if after, err := os.ReadFile(top); err != nil || string(after) != string(before) {
		t.Errorf("the frozen layer changed: %v", err)
	}
	frozenClone := qcow2(t, "frozen-clone", top)
	lun2, err := other.AddVolume(ctx, vm.Volume{Serial: "y", Layers: layers(t, os.O_RDWR, base, top, frozenClone)})
	must(t, err)
	og.Want(t, "abcd", "lun %d 4096 2", lun2)
	og.Want(t, "0000", "lun %d 8192 2", lun2)

	must(t, m.ResizeVolume(ctx, "vol-1", 16<<20))
	if info := qemuImg(t, "info", "-U", overlay); !strings.Contains(info, "16 MiB") {
		t.Errorf("after growing: %s", info)
	}
	must(t, m.LimitVolume(ctx, "vol-1", vm.Limits{IOPS: 20}))
	start := time.Now()
	for range 30 {
		g.Want(t, "ok", "write %d 0 11", lun)
	}
	if took := time.Since(start); took < time.Second {
		t.Errorf("30 flushed writes at 20 per second took %v", took)
	}
	must(t, m.LimitVolume(ctx, "vol-1", vm.Limits{}))

	must(t, m.RemoveVolume(ctx, "vol-1"))
	for _, name := range []string{top, overlay} {
		for _, h := range holders(t, name) {
			if strings.HasPrefix(h, pid+" ") {
				t.Errorf("qemu holds %s after the volume was removed: %s", name, h)
			}
		}
	}
	if err := m.RemoveVolume(ctx, "vol-1"); !errors.Is(err, vm.ErrNoVolume) {
		t.Errorf("removing it again: %v", err)
	}
	if out := qemuImg(t, "check", overlay); !strings.Contains(out, "No errors") {
		t.Errorf("check: %s", out)
	}
	next, err := m.AddVolume(ctx, vm.Volume{Serial: "vol-1", ReadOnly: true, Layers: layers(t, os.O_RDONLY, base, top, overlay)})
	must(t, err)
	g.Want(t, "abcd", "lun %d 4096 2", next)
	if got := g.Ask(t, "write %d 0 22", next); !strings.HasPrefix(got, "error") {
		t.Errorf("writing to a read-only volume: %s", got)
	}
}

// TestSnapshotOfBusyQEMU: a snapshot for whose end nobody waited can be taken again.
func TestSnapshotOfBusyQEMU(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	base := qcow2(t, "base", "")
	lun, err := m.AddVolume(ctx, vm.Volume{Serial: "v", Layers: layers(t, os.O_RDWR, base)})
	must(t, err)
	overlay := qcow2(t, "overlay", base)
	snapshot := func() error {
		return m.SnapshotVolume(ctx, "v", layers(t, os.O_RDONLY, base)[0], layers(t, os.O_RDWR, overlay)[0])
	}
	must(t, unix.Kill(m.PID(), unix.SIGSTOP))
	m.SetPatience(time.Second)
	if err := snapshot(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("of a QEMU that stands still: %v", err)
	}
	must(t, unix.Kill(m.PID(), unix.SIGCONT))
	m.SetPatience(time.Minute)
	for range 2 {
		must(t, snapshot())
	}
	if n, err := m.Depth(ctx, "v"); n != 2 || err != nil {
		t.Errorf("%d layers, %v", n, err)
	}
	before, err := os.ReadFile(base)
	must(t, err)
	g.Want(t, "ok", "write %d 8192 ef01", lun)
	if after, err := os.ReadFile(base); err != nil || string(after) != string(before) {
		t.Errorf("the frozen layer changed: %v", err)
	}
	must(t, m.RemoveVolume(ctx, "v"))
	if out := qemuImg(t, "check", overlay); !strings.Contains(out, "No errors") {
		t.Errorf("check: %s", out)
	}
}

// TestVolumeLUKS: encrypted chains, with the right key only; nothing readable in the file.
func TestVolumeLUKS(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	key := filepath.Join(t.TempDir(), "key")
	must(t, os.WriteFile(key, []byte("a secret key"), 0o600))
	secret := []string{"--object", "secret,id=k,file=" + key}
	luks := append(secret, "-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10")
	base := qcow2(t, "base", "", luks...)
	top := qcow2(t, "top", "", luks...)
	raw := filepath.Join(t.TempDir(), "raw")
	must(t, lukstest.Create(append(append([]string{"-f", "luks"}, secret...), "-o", "key-secret=k,iter-time=10", raw, "8M")...))
	chain := func(k string) []vm.Layer {
		l := layers(t, os.O_RDWR, base, top)
		for i := range l {
			l[i].Key = []byte(k)
		}
		return l
	}
	if _, err := m.AddVolume(ctx, vm.Volume{Serial: "wrong", Layers: chain("another key")}); err == nil || strings.Contains(err.Error(), "another key") {
		t.Errorf("the wrong key: %v", err)
	}
	for name, l := range map[string][]vm.Layer{
		"qcow2": chain("a secret key"),
		"raw":   {{Format: vm.Raw, File: open(t, raw, os.O_RDWR), Key: []byte("a secret key")}},
	} {
		lun, err := m.AddVolume(ctx, vm.Volume{Serial: name, Layers: l})
		must(t, err)
		g.Want(t, "ok", "write %d 4096 %s", lun, strings.Repeat("feedbeef", 8))
		g.Want(t, "feedbeef", "lun %d 4096 4", lun)
		must(t, m.RemoveVolume(ctx, name))
	}
	for _, name := range []string{top, raw} {
		data, err := os.ReadFile(name)
		must(t, err)
		if strings.Contains(string(data), "\xfe\xed\xbe\xef\xfe\xed\xbe\xef") {
			t.Errorf("%s has the data in the clear", name)
		}
	}
}

// TestVolumeHostile: images that would make QEMU open something else, or that are none.
func TestVolumeHostile(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, make([]byte, 8<<20), 0o644))
	data := qcow2(t, "data", "", "-o", "data_file="+secret)
	if _, err := m.AddVolume(ctx, vm.Volume{Serial: "a", Layers: layers(t, os.O_RDWR, data)}); !errors.Is(err, vm.ErrImage) {
		t.Errorf("an image with a data file: %v", err)
	}
	// A backing file that is only named in the header is not opened.
	backed := qcow2(t, "backed", qcow2(t, "below", ""))
	must(t, os.RemoveAll(filepath.Dir(backed)+"/below"))
	_, err := m.AddVolume(ctx, vm.Volume{Serial: "b", Layers: layers(t, os.O_RDWR, backed)})
	must(t, err)
	must(t, m.RemoveVolume(ctx, "b"))
	text := filepath.Join(t.TempDir(), "text")
	must(t, os.WriteFile(text, []byte(strings.Repeat("no image ", 100)), 0o600))
	if _, err := m.AddVolume(ctx, vm.Volume{Serial: "c", Layers: layers(t, os.O_RDWR, text)}); !errors.Is(err, vm.ErrImage) {
		t.Errorf("a text: %v", err)
	}
	corrupt := qcow2(t, "corrupt", "")
	f := open(t, corrupt, os.O_RDWR)
	_, err = f.WriteAt(binary.BigEndian.AppendUint32(nil, 1<<31), 36) // size of the L1 table
	must(t, err)
	if _, err := m.AddVolume(ctx, vm.Volume{Serial: "d", Layers: layers(t, os.O_RDWR, corrupt)}); err == nil {
		t.Error("a corrupt image was attached")
	}
	// Nothing is left behind by the failures.
	lun, err := m.AddVolume(ctx, vm.Volume{Serial: "a", Layers: layers(t, os.O_RDWR, qcow2(t, "fine", ""))})
	must(t, err)
	vmtest.NewGuest(m).Want(t, "0000", "lun %d 0 2", lun)
}

// TestVolumeDeepest: as many layers as the engine makes can be opened, and one more.
func TestVolumeDeepest(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	m.SetPatience(10 * time.Minute)
	names := []string{qcow2(t, "layer", "")}
	for len(names) < handover.MaxLayers {
		names = append(names, qcow2(t, "layer", names[len(names)-1]))
	}
	top := names[len(names)-1]
	lun, err := m.AddVolume(ctx, vm.Volume{Serial: "deep", Layers: layers(t, os.O_RDWR, names...)})
	must(t, err)
	g := vmtest.NewGuest(m)
	g.Want(t, "ok", "write %d 4096 abcd", lun)
	overlay := layers(t, os.O_RDWR, qcow2(t, "overlay", top))[0]
	must(t, m.SnapshotVolume(ctx, "deep", layers(t, os.O_RDONLY, top)[0], overlay))
	g.Want(t, "abcd", "lun %d 4096 2", lun)
	must(t, m.RemoveVolume(ctx, "deep"))
}

// TestVolumeKilled: what was flushed is there after SIGKILL of QEMU, and the lock is free.
func TestVolumeKilled(t *testing.T) {
	tmpl := build(t)
	base := qcow2(t, "base", "")
	top := qcow2(t, "top", base)
	for round := range 3 {
		m := vmtest.Clone(t, tmpl, vm.CloneConfig{})
		g := vmtest.NewGuest(m)
		chain := layers(t, os.O_RDWR, base, top)
		lun, err := m.AddVolume(context.Background(), vm.Volume{Serial: "v", Layers: chain})
		must(t, err)
		for _, l := range chain {
			must(t, l.File.Close()) // the lock goes with the last copy of the descriptor
		}
		for i := range round {
			g.Want(t, fmt.Sprintf("%02x", i+1), "lun %d %d 1", lun, i*1<<20)
		}
		g.Want(t, "ok", "write %d %d %02x", lun, round*1<<20, round+1)
		must(t, unix.Kill(m.PID(), unix.SIGKILL))
		exited(t, m)
	}
}

// TestVolumeFull: a full file system on the host stops the machine, which goes on once there is room.
func TestVolumeFull(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	dir := t.TempDir()
	must(t, unix.Mount("small", dir, "tmpfs", 0, "size=3M"))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	ballast := filepath.Join(dir, "ballast")
	must(t, os.WriteFile(ballast, make([]byte, 2200<<10), 0o600))
	image := filepath.Join(dir, "image")
	qemuImg(t, "create", "-q", "-f", "qcow2", image, "8M")
	lun, err := m.AddVolume(ctx, vm.Volume{Serial: "v", Layers: layers(t, os.O_RDWR, image)})
	must(t, err)
	data := strings.Repeat("77", 512)
	stalled := false
	for i := range 24 {
		g.Send(t, "write %d %d %s", lun, i*128<<10, data)
		answer := make(chan string, 1)
		go func() {
			got, err := g.Answer()
			if err != nil {
				got = err.Error()
			}
			answer <- got
		}()
		for done := false; !done; {
			select {
			case got := <-answer:
				if got != "ok" {
					t.Fatalf("write %d: %s", i, got)
				}
				done = true
			case <-time.After(20 * time.Millisecond):
				if m.Stalled() && !stalled {
					stalled = true
					must(t, os.Remove(ballast))
				}
			}
		}
	}
	if !stalled {
		t.Error("the file system never was full")
	}
	must(t, m.RemoveVolume(ctx, "v"))
	if out := qemuImg(t, "check", image); !strings.Contains(out, "No errors") {
		t.Errorf("check: %s", out)
	}
}
