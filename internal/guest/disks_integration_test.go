//go:build integration

package guest

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/disk"
	"atoll.dev/atoll/internal/linux/filesystem"
	"atoll.dev/atoll/internal/linux/mkfs"
)

// TestFormatAgain: the host gives up in the middle of a file system and begins again, also on another device.
func TestFormatAgain(t *testing.T) {
	const serial, bytes = "v1", 64 << 20
	sys := t.TempDir()
	plug := func() (device string) {
		file := filepath.Join(t.TempDir(), "disk")
		for _, err := range []error{os.WriteFile(file, nil, 0o600), os.Truncate(file, bytes)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		out, err := exec.Command("losetup", "-f", "--show", file).Output()
		if err != nil {
			t.Fatal(err)
		}
		device = strings.TrimSpace(string(out))
		t.Cleanup(func() { _ = exec.Command("losetup", "-d", device).Run() })
		dir := filepath.Join(sys, filepath.Base(device))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "serial"), []byte(serial), 0o600); err != nil {
			t.Fatal(err)
		}
		return device
	}
	s, err := newServer(t.Context(), slog.New(slog.DiscardHandler), &machine{parts: parts{disks: disk.New(sys, t.TempDir())}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	img, err := mkfs.New(t.Context(), mkfs.Ext4, bytes, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	write := func(last bool) error {
		req := &guestv1.WriteDiskRequest{Serial: serial, First: true, Last: last}
		err := img.Each(64<<10, func(at int64, data []byte) error {
			req.Extents = append(req.Extents, &guestv1.Extent{Offset: uint64(at), Data: append([]byte(nil), data...)})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.WriteDisk(t.Context(), req)
		return err
	}
	first := plug()
	for range 2 {
		if err := write(false); err != nil {
			t.Fatalf("beginning: %v", err)
		}
	}
	// The disk is taken away and comes back under another name.
	if err := os.RemoveAll(filepath.Join(sys, filepath.Base(first))); err != nil {
		t.Fatal(err)
	}
	device := plug()
	if err := write(true); err != nil {
		t.Fatalf("on another device: %v", err)
	}
	if c, err := filesystem.Probe(device); err != nil || c.FSType != filesystem.Ext4 {
		t.Errorf("%+v, %v", c, err)
	}
	if out, err := exec.Command("losetup", "-d", first).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := os.Stat(filepath.Join("/sys/block", filepath.Base(first), "loop")); err == nil {
		t.Error("the first device is held")
	}
}
