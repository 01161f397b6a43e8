//go:build integration

package vm_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/scratch"
	"atoll.dev/atoll/internal/vm/vmtest"
)

// pattern makes a raw image of 1 MiB that repeats one byte, open for reading only.
func pattern(t testing.TB, b byte) *os.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, bytes.Repeat([]byte{b}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return open(t, name, os.O_RDONLY)
}

func open(t testing.TB, name string, flag int) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// exited waits for the end of the machine.
func exited(t *testing.T, m *vm.Machine) vm.Exit {
	t.Helper()
	select {
	case <-m.Done():
		return m.Exit()
	case <-time.After(3 * time.Minute):
		t.Fatal("the machine does not end")
		return vm.Exit{}
	}
}

func TestImageSlots(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	a, b := pattern(t, 0xaa), pattern(t, 0xbb)
	for i := range vm.ImageSlots {
		serial := vm.SlotSerial(i)
		for _, step := range []struct {
			image *os.File
			want  string
		}{{a, "aaaa"}, {b, "bbbb"}, {a, "aaaa"}} {
			must(t, m.AttachImage(ctx, serial, step.image))
			for _, off := range []int{0, 4096, 1<<20 - 2} {
				g.Want(t, step.want, "slot %s %d 2", serial, off)
			}
			must(t, m.DetachImage(ctx, serial))
		}
		g.Want(t, "0000", "slot %s 0 2", serial)
	}
}

func TestImageSlotErrors(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	a := pattern(t, 0xaa)
	if err := m.AttachImage(ctx, "img99", a); err == nil {
		t.Error("an unknown slot was taken")
	}
	if err := m.AttachImage(ctx, "img0", open(t, a.Name(), os.O_RDWR)); err == nil {
		t.Error("a writable image was taken")
	}
	if err := m.DetachImage(ctx, "img0"); !errors.Is(err, vm.ErrBusy) {
		t.Errorf("detaching nothing: %v", err)
	}
	must(t, m.AttachImage(ctx, "img0", a))
	if err := m.AttachImage(ctx, "img0", a); !errors.Is(err, vm.ErrBusy) {
		t.Errorf("attaching twice: %v", err)
	}
}

func TestErofsInSlot(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	for i, text := range []string{"first", "second", "third"} {
		src := filepath.Join(dir, "src")
		must(t, os.MkdirAll(src, 0o755))
		must(t, os.WriteFile(filepath.Join(src, "f"), []byte(text), 0o644))
		img := filepath.Join(dir, fmt.Sprintf("%d.erofs", i))
		if out, err := exec.Command("mkfs.erofs", img, src).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		must(t, m.AttachImage(ctx, "img3", open(t, img, os.O_RDONLY)))
		g.Want(t, text, "erofs img3 f")
		must(t, m.DetachImage(ctx, "img3"))
	}
}

func TestScratch(t *testing.T) {
	master, err := scratch.Format(t.Context(), scratch.Config{Dir: t.TempDir(), Bytes: 1 << 30})
	must(t, err)
	defer master.Close()
	tmpl := build(t)
	for range 2 {
		disk, err := master.Copy()
		must(t, err)
		g := vmtest.NewGuest(vmtest.Clone(t, tmpl, vm.CloneConfig{Scratch: disk}))
		g.Want(t, "ok", "ext4 scratch")
		var st unix.Stat_t
		must(t, unix.Fstat(int(disk.Fd()), &st))
		if st.Blocks*512 < 1<<20 {
			t.Errorf("after the guest wrote a MiB the disk holds %d bytes", st.Blocks*512)
		}
		must(t, disk.Close())
	}
}

// TestScratchOfTemplate: the file system that the template has mounted goes on in every clone.
func TestScratchOfTemplate(t *testing.T) {
	const size = 64 << 20
	dir := t.TempDir()
	disk, err := scratch.Format(t.Context(), scratch.Config{Dir: dir, Bytes: size})
	must(t, err)
	defer disk.Close()
	image := filepath.Join(dir, "image")
	must(t, os.WriteFile(image, []byte("img!"), 0o600))
	must(t, os.Truncate(image, vm.SlotBytes))
	f, err := os.Open(image)
	must(t, err)
	defer f.Close()
	cfg := config(t)
	cfg.Scratch, cfg.ScratchBytes, cfg.Image, cfg.Cmdline = disk.File(), size, f, "KEEP=1"
	tmpl, err := vm.BuildTemplate(t.Context(), cfg)
	must(t, err)
	defer tmpl.Close()
	saved := hash(t, disk.File())
	master, err := scratch.Open(dir, disk.File()) // what there is to copy has changed
	must(t, err)
	for range 2 {
		own, err := master.Copy()
		must(t, err)
		g := vmtest.NewGuest(vmtest.Clone(t, tmpl, vm.CloneConfig{Scratch: own}))
		g.Want(t, hex.EncodeToString([]byte("img!")), "kept mine")
		g.Want(t, "mine", "kept again")
		g.Want(t, "00000000", "slot img0 0 4") // the image is gone
		must(t, own.Close())
	}
	if hash(t, disk.File()) != saved {
		t.Error("a clone has changed the disk of the template")
	}
}

func TestHotAddDisk(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	a := pattern(t, 0xaa)
	lun, err := m.HotAddDisk(ctx, vm.Disk{Serial: "ro-1", File: a, ReadOnly: true})
	must(t, err)
	g.Want(t, "aaaa", "lun %d 4096 2", lun)
	if got := g.Ask(t, "write %d 0 ff", lun); !strings.HasPrefix(got, "error") {
		t.Errorf("writing a read-only disk: %s", got)
	}
	b := pattern(t, 0xbb)
	rw := open(t, b.Name(), os.O_RDWR)
	lun2, err := m.HotAddDisk(ctx, vm.Disk{Serial: "rw-1", File: rw})
	must(t, err)
	g.Want(t, "ok", "write %d 512 %s", lun2, hex.EncodeToString(bytes.Repeat([]byte{0xcc}, 512)))
	buf := make([]byte, 1024)
	if _, err := b.ReadAt(buf, 0); err != nil || buf[511] != 0xbb || buf[512] != 0xcc {
		t.Errorf("the image has %x %x, %v", buf[511], buf[512], err)
	}
	if _, err := m.HotAddDisk(ctx, vm.Disk{Serial: "rw-1", File: rw}); err == nil {
		t.Error("a serial number was taken twice")
	}
	must(t, m.RemoveDisk(ctx, "ro-1"))
	must(t, m.RemoveDisk(ctx, "rw-1"))
	for range 3 { // the same place again, with other content
		lun, err := m.HotAddDisk(ctx, vm.Disk{Serial: "again", File: b, ReadOnly: true})
		must(t, err)
		g.Want(t, "bbbb", "lun %d 0 2", lun)
		must(t, m.RemoveDisk(ctx, "again"))
	}
}

func TestAddMemory(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	total := func(answer string) int64 {
		n, err := strconv.ParseInt(answer, 10, 64)
		must(t, err)
		return n
	}
	before := total(g.Ask(t, "memory"))
	has := func(more int64) func(string) bool {
		return func(answer string) bool { return total(answer)-before >= more }
	}
	got, err := m.AddMemory(ctx, 200<<20)
	must(t, err)
	if got != 256<<20 {
		t.Errorf("%d bytes were plugged", got)
	}
	g.Until(t, has(240<<20), "memory")
	if _, err := m.AddMemory(ctx, 4<<30); !errors.Is(err, vm.ErrLimit) {
		t.Errorf("adding too much: %v", err)
	}
	_, err = m.AddMemory(ctx, 1<<30)
	must(t, err)
	g.Until(t, has(1200<<20), "memory")
}

func TestSetCPUs(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	g := vmtest.NewGuest(m)
	for _, n := range []int{1, 2, 4, 3} {
		must(t, m.SetCPUs(ctx, n))
		want := max(n, map[int]int{3: 4}[n])
		g.Until(t, func(answer string) bool { return answer == strconv.Itoa(want) }, "cpus")
	}
	if err := m.SetCPUs(ctx, 5); !errors.Is(err, vm.ErrLimit) {
		t.Errorf("five cpus: %v", err)
	}
}

func TestPause(t *testing.T) {
	ctx := t.Context()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{Paused: true})
	g := vmtest.NewGuest(m)
	for i := range 3 {
		g.Send(t, "echo %d", i)
		_ = m.Channel().SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if n, err := m.Channel().Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a stopped guest answers: %d bytes, %v", n, err)
		}
		must(t, m.Resume(ctx))
		if got := g.Receive(t); got != strconv.Itoa(i) {
			t.Fatalf("guest answered %q", got)
		}
		must(t, m.Pause(ctx))
	}
}

func TestExits(t *testing.T) {
	tmpl := build(t)
	for _, tt := range []struct {
		name string
		end  func(*vm.Machine, *vmtest.Guest)
		want vm.ExitReason
	}{
		{"poweroff", func(_ *vm.Machine, g *vmtest.Guest) { g.Send(t, "poweroff") }, vm.ExitShutdown},
		{"panic", func(_ *vm.Machine, g *vmtest.Guest) { g.Send(t, "panic") }, vm.ExitReset},
		{"kill", func(m *vm.Machine, _ *vmtest.Guest) { must(t, m.Kill()) }, vm.ExitKilled},
		{"killed by another", func(m *vm.Machine, _ *vmtest.Guest) { must(t, unix.Kill(m.PID(), unix.SIGKILL)) }, vm.ExitFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := vmtest.Clone(t, tmpl, vm.CloneConfig{})
			g := vmtest.NewGuest(m)
			g.Want(t, "x", "echo x")
			tt.end(m, g)
			e := exited(t, m)
			t.Log(e)
			if e.Reason != tt.want {
				t.Errorf("ended with %s, want %s", e, tt.want)
			}
			if tt.name == "panic" && !bytes.Contains(m.Console(), []byte("Kernel panic")) {
				t.Errorf("the console has no panic: %s", m.Console())
			}
			if err := m.Pause(t.Context()); !errors.Is(err, vm.ErrExited) {
				t.Errorf("pausing an ended machine: %v", err)
			}
		})
	}
}

func TestBoot(t *testing.T) {
	cfg := config(t)
	cfg.CPUs = 2
	m, err := vm.Boot(context.Background(), cfg, vm.CloneConfig{UID: vmtest.UID, GID: vmtest.UID})
	must(t, err)
	defer m.Close()
	g := vmtest.NewGuest(m)
	g.Want(t, "hello", "echo hello")
	g.Want(t, "2", "cpus")
	must(t, m.AttachImage(t.Context(), "img0", pattern(t, 0xaa)))
	g.Want(t, "aaaa", "slot img0 0 2")
}
