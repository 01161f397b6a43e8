//go:build integration

package diskimage

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// qemuImg runs qemu-img.
func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

func detect(t *testing.T, path string) (Info, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Detect(f, info.Size(), true)
}

// TestRealImages: what qemu-img writes is found to be what it is, and what refers to something is refused.
func TestRealImages(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", base, "300M")
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 100M 1M", base).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, c := range map[string]struct {
		args   []string
		format Format
	}{
		"qcow2":    {[]string{"-O", "qcow2"}, QCOW2},
		"old":      {[]string{"-O", "qcow2", "-o", "compat=0.10"}, QCOW2},
		"small":    {[]string{"-O", "qcow2", "-o", "cluster_size=512"}, QCOW2},
		"extended": {[]string{"-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k"}, QCOW2},
		"zstd":     {[]string{"-c", "-O", "qcow2", "-o", "compression_type=zstd"}, QCOW2},
		"raw":      {[]string{"-O", "raw"}, Raw},
		"sparse":   {[]string{"-O", "vmdk", "-o", "subformat=monolithicSparse"}, VMDK},
		"stream":   {[]string{"-O", "vmdk", "-o", "subformat=streamOptimized"}, VMDK},
		"dynamic":  {[]string{"-O", "vpc", "-o", "subformat=dynamic,force_size=on"}, VHD},
		"fixed":    {[]string{"-O", "vpc", "-o", "subformat=fixed,force_size=on"}, VHD},
		"vhdx":     {[]string{"-O", "vhdx"}, VHDX},
	} {
		path := filepath.Join(dir, name)
		qemuImg(t, append(append([]string{"convert"}, c.args...), base, path)...)
		info, err := detect(t, path)
		if err != nil || info.Format != c.format || info.Size != 300<<20 {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}
	over := filepath.Join(dir, "over")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", over)
	data := filepath.Join(dir, "data.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data"), data, "10M")
	raw := filepath.Join(dir, "rawdata.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data2")+",data_file_raw=on", raw, "10M")
	delta := filepath.Join(dir, "delta")
	qemuImg(t, "create", "-q", "-f", "vmdk", "-b", filepath.Join(dir, "sparse"), "-F", "vmdk", delta)
	for _, path := range []string{over, data, raw, delta} {
		if _, err := detect(t, path); !errors.Is(err, ErrReference) {
			t.Errorf("%s: %v", path, err)
		}
	}
	flat := filepath.Join(dir, "flat.vmdk")
	qemuImg(t, "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", flat, "10M")
	if _, err := detect(t, flat); !errors.Is(err, ErrUnsupported) {
		t.Errorf("flat: %v", err)
	}
	for _, name := range []string{"fixed", "dynamic"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		cut := filepath.Join(dir, "cut")
		if err := os.WriteFile(cut, b[:len(b)*2/3], 0o600); err != nil {
			t.Fatal(err)
		}
		if info, err := detect(t, cut); name != "fixed" && !errors.Is(err, ErrDamaged) { // a fixed one without its end is a raw one
			t.Errorf("cut %s: %+v, %v", name, info, err)
		}
	}
}
