//go:build integration

package guest_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	machine "atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/initramfs"
	"atoll.dev/atoll/internal/vm/podkernel"
	"atoll.dev/atoll/internal/vm/scratch"
	"atoll.dev/atoll/internal/vm/vmtest"
)

// TestDebianKernel runs a pod on Debian's cloud kernel, the way the pool and a shim make it: a
// template, and a clone of it. It fetches the kernel from the Debian archive.
func TestDebianKernel(t *testing.T) {
	a, err := built()
	if err != nil {
		t.Fatal(err)
	}
	fetch := exec.Command("../../guestos/kernel/debian.sh")
	fetch.Stderr = os.Stderr
	out, err := fetch.Output()
	if err != nil {
		t.Fatalf("fetching Debian's kernel: %v", err)
	}
	kernel, err := podkernel.Find(strings.TrimSpace(string(out)))
	if err != nil || !kernel.Checked {
		t.Fatalf("%+v, %v", kernel, err)
	}
	files, err := podkernel.Entries(kernel.Modules)
	if err != nil {
		t.Fatal(err)
	}
	template, err := machine.BuildTemplate(t.Context(), machine.Config{
		Kernel: kernel.Path,
		Initramfs: append([]initramfs.Entry{
			{Path: "/init", Mode: 0o755, File: a.init},
			{Path: "/exec", Mode: 0o755, File: a.helper},
			{Path: "/dev/console", Mode: 0o600, Device: &initramfs.Device{Major: 5, Minor: 1}},
		}, files...),
		MemoryMiB: 512 + podkernel.ReservedMiB, ReservedMiB: podkernel.ReservedMiB, MaxMemoryMiB: 2048, MaxCPUs: 2, ScratchBytes: 1 << 30, UID: vmtest.UID, GID: vmtest.UID,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer template.Close()
	t.Logf("%s with %d modules: template in %d ms", kernel.Release, len(files), template.Meta().BootMillis)

	m, v := clone(t, template, a.image, a.image, a.warm)
	v.setUp(nil)
	if got := v.must(sh("uname -r")); got != kernel.Release {
		t.Errorf("the container runs on %q", got)
	}
	if got := v.must(sh("cat /proc/sys/kernel/modules_disabled")); got != "1" {
		t.Errorf("modules can still be loaded: %q", got)
	}
	// A shim takes it for a guest that does not use all it was given if more is missing.
	const mostMissing = 64 << 20
	res, err := v.guest.OnlineResources(t.Context(), &guestv1.Empty{})
	if err != nil || res.MemoryBytes < 512<<20-mostMissing {
		t.Errorf("the guest uses %d bytes, %v", res.GetMemoryBytes(), err)
	}
	t.Logf("the guest uses %d MiB", res.GetMemoryBytes()>>20)
	testPod(t, v, "stdin") // which takes as long as all others together
	t.Run("grow", func(t *testing.T) { testGrow(t, m, v.guest) })
}

// clone makes a clone of the template with images in its first slots.
func clone(t *testing.T, template *machine.Template, images ...string) (*machine.Machine, *vm) {
	t.Helper()
	master, err := scratch.Format(t.Context(), scratch.Config{Dir: t.TempDir(), Bytes: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	disk, err := master.Copy()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = disk.Close() })
	m, err := template.Clone(t.Context(), machine.CloneConfig{Scratch: disk, UID: vmtest.UID, GID: vmtest.UID})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The session closes its connection as soon as QEMU has ended.
		if err := m.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("console:\n%s", m.Console())
		}
	})
	for i, image := range images {
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := m.AttachImage(t.Context(), machine.SlotSerial(i), f); err != nil {
			t.Fatal(err)
		}
	}
	v := &vm{t: t, ids: &atomic.Int64{}}
	if v.session, err = channel.Attach(m.Channel()); err != nil {
		t.Fatal(err)
	}
	st, err := channel.Open(v.session, channel.Header{Kind: channel.KindRPC})
	if err != nil {
		t.Fatal(err)
	}
	v.guest = guestv1.NewGuestClient(ttrpc.NewClient(st))
	return m, v
}

// testGrow adds memory and a processor to a running pod, which takes a moment to find them.
func testGrow(t *testing.T, m *machine.Machine, guest guestv1.GuestService) {
	before, err := guest.OnlineResources(t.Context(), &guestv1.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.AddMemory(t.Context(), 2*machine.MemoryGranule); err != nil {
		t.Fatal(err)
	}
	if err := m.SetCPUs(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); ; {
		now, err := guest.OnlineResources(t.Context(), &guestv1.Empty{})
		if err != nil {
			t.Fatal(err)
		}
		if now.MemoryBytes > before.MemoryBytes+machine.MemoryGranule && now.Cpus == 2 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("from %d bytes, %d processors to %d, %d", before.MemoryBytes, before.Cpus, now.MemoryBytes, now.Cpus)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
