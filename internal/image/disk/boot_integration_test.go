//go:build integration

package disk

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"atoll.dev/atoll/internal/image"
)

// console collects what a guest prints.
type console struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// tiny builds the tiny VM's disk, or takes it from the cache.
func tiny(t *testing.T, cache string) string {
	t.Helper()
	recipe, err := Load("../../../guestos/vm/tiny")
	if err != nil {
		t.Fatal(err)
	}
	result, err := Build(t.Context(), recipe, image.Options{CacheDir: cache})
	if err != nil {
		t.Fatal(err)
	}
	return result.Image
}

func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("ATOLL_CACHE"); dir != "" {
		return dir
	}
	home, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(home, ".cache", "atoll")
}

// TestTinyBoots boots the tiny VM with a BIOS and with UEFI, from each kind of
// disk that it has a driver for, and powers it off by its console.
func TestTinyBoots(t *testing.T) {
	disk := tiny(t, cacheDir(t))
	for name, args := range map[string][]string{
		"BIOS, virtio-scsi": {"-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"},
		"BIOS, NVMe":        {"-device", "nvme,drive=disk,serial=1"},
		"UEFI, virtio-scsi": {"-bios", "/usr/share/ovmf/OVMF.fd", "-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"},
		"UEFI, virtio-blk":  {"-bios", "/usr/share/ovmf/OVMF.fd", "-device", "virtio-blk-pci,drive=disk"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append([]string{
				"-M", "q35", "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio", "-snapshot",
				"-drive", "if=none,id=disk,format=qcow2,file=" + disk,
			}, args...)...)
			var out console
			cmd.Stdout, cmd.Stderr = &out, &out
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			started := time.Now()
			for !strings.Contains(out.String(), "login: root") {
				select {
				case <-ctx.Done():
					t.Fatalf("no prompt; the console says:\n%s", out.String())
				case <-time.After(50 * time.Millisecond):
				}
			}
			t.Logf("prompt after %s", time.Since(started).Round(100*time.Millisecond))
			if strings.Contains(out.String(), "/data is in memory") {
				t.Errorf("the data partition was not found:\n%s", out.String())
			}
			if _, err := in.Write([]byte("poweroff\n")); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Fatalf("qemu: %v; the console says:\n%s", err, out.String())
			}
		})
	}
}

// TestTinyIsReproducible builds the disk twice, from the same packages.
func TestTinyIsReproducible(t *testing.T) {
	first, err := os.ReadFile(tiny(t, cacheDir(t)))
	if err != nil {
		t.Fatal(err)
	}
	cache := t.TempDir()
	if err := os.Symlink(filepath.Join(cacheDir(t), "apt"), filepath.Join(cache, "apt")); err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(tiny(t, cache))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Error("the second disk differs from the first")
	}
}
