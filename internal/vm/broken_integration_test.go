//go:build integration

package vm_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"atoll.dev/atoll/internal/linux/memfd"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/initramfs"
	"atoll.dev/atoll/internal/vm/vmtest"
)

func TestBrokenParts(t *testing.T) {
	good, err := os.ReadFile(vmtest.Kernel(t))
	must(t, err)
	file := func(content []byte) string {
		name := filepath.Join(t.TempDir(), "kernel")
		must(t, os.WriteFile(name, content, 0o600))
		return name
	}
	damaged := bytes.Clone(good)
	for i := 1 << 21; i < len(damaged)-1<<21; i += 64 { // the code, but not the ELF headers
		damaged[i] ^= 0xff
	}
	base := config(t)
	for _, tt := range []struct {
		name   string
		change func(*vm.Config)
		want   error
	}{
		{"no kernel", func(c *vm.Config) { c.Kernel = "/nonexistent" }, vm.ErrKernel},
		{"empty kernel", func(c *vm.Config) { c.Kernel = file(nil) }, vm.ErrKernel},
		{"text as kernel", func(c *vm.Config) { c.Kernel = file(bytes.Repeat([]byte("x"), 4096)) }, vm.ErrKernel},
		{"truncated kernel", func(c *vm.Config) { c.Kernel = file(good[:len(good)/2]) }, vm.ErrKernel},
		{"damaged kernel", func(c *vm.Config) { c.Kernel, c.BootTimeout = file(damaged), 5*time.Second }, vm.ErrKernel},
		{"init ends", func(c *vm.Config) {
			c.Initramfs = []initramfs.Entry{{Path: "/init", Mode: 0o755, Content: []byte("#!/nothing\n")}}
		}, vm.ErrKernel},
		{"too slow", func(c *vm.Config) { c.BootTimeout = 50 * time.Millisecond }, vm.ErrKernel},
		{"no qemu", func(c *vm.Config) { c.QEMU = "/nonexistent" }, vm.ErrQEMU},
		{"no firmware", func(c *vm.Config) { c.Firmware = "/nonexistent" }, vm.ErrQEMU},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := base
			tt.change(&cfg)
			tmpl, err := vm.BuildTemplate(context.Background(), cfg)
			if err == nil {
				_ = tmpl.Close()
			}
			t.Log(err)
			if !errors.Is(err, tt.want) {
				t.Errorf("not %v", tt.want)
			}
		})
	}
}

// replaced makes a template whose state file has other content.
func replaced(t *testing.T, tmpl *vm.Template, change func([]byte) []byte) *vm.Template {
	t.Helper()
	meta := tmpl.Meta()
	state := make([]byte, meta.StateBytes)
	_, err := tmpl.Files()[1].ReadAt(state, 0)
	must(t, err)
	state = change(state)
	f, err := memfd.Create("atoll-state", 0)
	must(t, err)
	_, err = f.Write(state)
	must(t, err)
	must(t, memfd.Seal(f))
	meta.StateBytes = int64(len(state))
	out, err := vm.OpenTemplate(meta, []*os.File{tmpl.Files()[0], f})
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return out
}

func TestBrokenTemplate(t *testing.T) {
	tmpl := build(t)
	for name, change := range map[string]func([]byte) []byte{
		"no state":        func([]byte) []byte { return nil },
		"truncated state": func(b []byte) []byte { return b[:len(b)/2] },
		"other bytes":     func(b []byte) []byte { return bytes.Repeat([]byte{0x5a}, len(b)) },
	} {
		t.Run(name, func(t *testing.T) {
			m, err := replaced(t, tmpl, change).Clone(t.Context(), vm.CloneConfig{UID: vmtest.UID, GID: vmtest.UID})
			if err == nil {
				_ = m.Close()
			}
			t.Log(err)
			if !errors.Is(err, vm.ErrTemplate) {
				t.Error("not ErrTemplate")
			}
		})
	}
	meta := tmpl.Meta()
	meta.MemoryMiB++
	if _, err := vm.OpenTemplate(meta, tmpl.Files()); !errors.Is(err, vm.ErrTemplate) {
		t.Errorf("wrong memory size: %v", err)
	}
	open, err := memfd.Create("open", meta.StateBytes)
	must(t, err)
	defer open.Close()
	if _, err := vm.OpenTemplate(tmpl.Meta(), []*os.File{tmpl.Files()[0], open}); !errors.Is(err, memfd.ErrNotSealed) {
		t.Errorf("unsealed state: %v", err)
	}
}

func TestProbeAccelerator(t *testing.T) {
	cfg := config(t)
	accel, reason := vm.ProbeAccelerator(context.Background(), cfg)
	t.Log(accel, reason)
	if reason == "" || (accel != vm.TCG && accel != vm.KVM) {
		t.Errorf("probe says %q, %q", accel, reason)
	}
	cfg.QEMU = "/nonexistent"
	if accel, reason = vm.ProbeAccelerator(context.Background(), cfg); accel != vm.TCG {
		t.Errorf("without qemu the probe says %q, %q", accel, reason)
	}
}
