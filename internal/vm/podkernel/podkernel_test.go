package podkernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/vm/initramfs/modules"
)

const release = "6.1.0-0-test-amd64"

// bzImage is a file with the header fields of a bzImage.
func bzImage(version string) []byte {
	b := make([]byte, 0x400)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x100)
	copy(b[0x300:], version+"\x00")
	return b
}

// elf is a file with what is looked for in an ELF kernel.
func elf(t *testing.T, version, config string) []byte {
	t.Helper()
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	b[18] = 62
	b = append(b, "Linux version "+version...)
	b = append(b, "IKCFG_ST"...)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write([]byte(config)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return append(append(b, packed.Bytes()...), "IKCFG_ED"...)
}

// options is a configuration with all that is needed but some.
func options(without ...string) string {
	text := "# comment\nCONFIG_HZ=250\nCONFIG_PVH=y\n"
	for _, o := range needed() {
		text += "CONFIG_" + o + "=m\n"
	}
	for _, o := range without {
		text = strings.ReplaceAll(text, "CONFIG_"+o+"=m\n", "# CONFIG_"+o+" is not set\n")
	}
	return text
}

func write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, content, 0o644); err != nil {
		t.Fatal(err)
	}
}

// unpacked is a kernel package in a directory, with all modules built in.
func unpacked(t *testing.T, image []byte, config string) (kernel, modules string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	kernel, modules = filepath.Join(dir, "boot", "vmlinuz"), filepath.Join(dir, "lib", "modules", release)
	write(t, kernel, image)
	if config != "" {
		write(t, filepath.Join(dir, "boot", "config-"+release), []byte(config))
	}
	write(t, filepath.Join(modules, "modules.builtin"), []byte(builtin()))
	return kernel, modules
}

func builtin() string {
	var text strings.Builder
	for _, m := range modules.ForPods() {
		text.WriteString("kernel/" + m + ".ko\n")
	}
	return text.String()
}

func TestFind(t *testing.T) {
	version := release + " (somebody) #1 SMP"
	kernel, dir := unpacked(t, bzImage(version), options()+"CONFIG_MODULES=y\n")
	link := filepath.Join(t.TempDir(), "vmlinuz") // as Debian's /vmlinuz
	if err := os.Symlink(kernel, link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{kernel, link} {
		if k, err := Find(name); err != nil || k != (Kernel{kernel, release, dir, true}) {
			t.Errorf("%s: %+v, %v", name, k, err)
		}
	}
	kernel, dir = unpacked(t, bzImage(version), "")
	if k, err := Find(kernel); err != nil || k != (Kernel{kernel, release, dir, false}) {
		t.Errorf("without a configuration: %+v, %v", k, err)
	}
	kernel, _ = unpacked(t, elf(t, version, options()), "")
	if k, err := Find(kernel); err != nil || k != (Kernel{kernel, release, "", true}) {
		t.Errorf("with everything built in: %+v, %v", k, err)
	}
	if r, err := Release(kernel); err != nil || r != release {
		t.Errorf("release %q, %v", r, err)
	}
}

func TestRefused(t *testing.T) {
	version := release + " (somebody)"
	whole := options() + "CONFIG_MODULES=y\n"
	find := func(image []byte, config string, change func(modules string)) error {
		kernel, dir := unpacked(t, image, config)
		if change != nil {
			change(dir)
		}
		_, err := Find(kernel)
		return err
	}
	remove := func(dir string) {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	lacking := func(files ...string) func(string) {
		return func(dir string) {
			write(t, filepath.Join(dir, "modules.builtin"), []byte(strings.ReplaceAll(builtin(), "kernel/erofs.ko\n", "")))
			for _, f := range files {
				write(t, filepath.Join(dir, f), nil)
			}
		}
	}
	_, gone := Find("/no/such/kernel")
	for want, err := range map[string]error{
		"there is no kernel":              gone,
		"not a kernel image":              find([]byte("#!/bin/sh\n"), whole, nil),
		"cannot be read":                  find(bzImage("../../etc x"), whole, nil),
		"not of a kernel":                 find(bytes.ReplaceAll(elf(t, version, ""), []byte("Linux"), nil), "", nil),
		"CONFIG_EROFS_FS, CONFIG_QFMT_V2": find(bzImage(version), strings.Join([]string{options("EROFS_FS", "QFMT_V2"), "CONFIG_MODULES=y\n"}, ""), nil),
		"has no modules":                  find(bzImage(version), whole, remove),
		"no such kernel module: erofs":    find(bzImage(version), whole, lacking()),
		"erofs.ko.xz":                     find(bzImage(version), whole, lacking("kernel/erofs.ko.xz")),
	} {
		e, ok := errors.AsType[*Error](err)
		if !ok || !strings.Contains(e.What, want) || e.Fix == "" {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(bzImage(release + " x"))
	f.Add([]byte("\x7fELF\x02\x01Linux version 1 IKCFG_ST"))
	f.Fuzz(func(t *testing.T, b []byte) {
		name := filepath.Join(t.TempDir(), "k")
		write(t, name, b)
		if i, err := read(name); err == nil && (i.release == "" || strings.ContainsAny(i.release, "/ ")) {
			t.Errorf("release %q", i.release)
		}
	})
}
