//go:build integration

package qcow2

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// create writes an image file.
func create(t testing.TB, i Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := i.Write(f); err != nil {
		t.Fatal(err)
	}
	return path
}

// info is what qemu-img says about an image.
type info struct {
	VirtualSize    int64  `json:"virtual-size"`
	Backing        string `json:"backing-filename"`
	BackingFormat  string `json:"backing-filename-format"`
	Encrypted      bool   `json:"encrypted"`
	ActualSize     int64  `json:"actual-size"`
	FormatSpecific struct {
		Data struct {
			Corrupt bool `json:"corrupt"`
		} `json:"data"`
	} `json:"format-specific"`
}

func qemuInfo(t *testing.T, path string) info {
	t.Helper()
	out, err := exec.Command("qemu-img", "info", "--output=json", path).Output()
	if err != nil {
		t.Fatalf("qemu-img info: %v", err)
	}
	var i info
	if err := json.Unmarshal(out, &i); err != nil {
		t.Fatal(err)
	}
	return i
}

func check(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", "check", `json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"`+path+`"}}`).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
}

// TestQEMUAgrees: what Write makes is to QEMU what it is to Read, sound and writable.
func TestQEMUAgrees(t *testing.T) {
	for _, i := range []Image{
		{Size: 1 << 20},
		{Size: 512},
		{Size: 10 << 30},
		{Size: 4 << 40},
		{Size: 64 << 40},
		{Size: 10 << 30, Backing: "l0123456789abcdef.raw", BackingFormat: "raw"},
	} {
		path := create(t, i)
		check(t, path)
		got := qemuInfo(t, path)
		if got.VirtualSize != i.Size || got.Backing != i.Backing || got.BackingFormat != i.BackingFormat || got.ActualSize > 1<<20 {
			t.Errorf("%+v: qemu-img says %+v", i, got)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		h, err := Read(f)
		if err != nil || h.Size != i.Size || h.Backing != i.Backing || h.BackingFormat != i.BackingFormat || h.LUKS {
			t.Errorf("%+v: read %+v, %v", i, h, err)
		}
		if i.Backing != "" {
			if err := SetBacking(f, "lfedcba9876543210.raw", "qcow2"); err != nil {
				t.Error(err)
			}
			if got := qemuInfo(t, path); got.Backing != "lfedcba9876543210.raw" || got.BackingFormat != "qcow2" {
				t.Errorf("backing file %+v", got)
			}
			if err := SetBacking(f, "short", "raw"); !errors.Is(err, ErrFormat) {
				t.Errorf("a shorter name: %v", err)
			}
		} else if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 512", "-c", "read -P 7 0 512", path).CombinedOutput(); err != nil {
			t.Errorf("writing: %v\n%s", err, out)
		}
		f.Close()
		check(t, path)
	}
}

func TestGrow(t *testing.T) {
	path := create(t, Image{Size: 1 << 30})
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if ok, err := Grow(f, 3<<40); !ok || err != nil {
		t.Fatal(ok, err)
	}
	check(t, path)
	if got := qemuInfo(t, path).VirtualSize; got != 3<<40 {
		t.Fatalf("size %d", got)
	}
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 2T 512", "-c", "read -P 7 2T 512", path).CombinedOutput(); err != nil {
		t.Errorf("writing: %v\n%s", err, out)
	}
	check(t, path)
	if ok, err := Grow(f, 5<<40); ok || err != nil {
		t.Errorf("beyond the table: %v, %v", ok, err)
	}
	if _, err := Grow(f, 1<<30); !errors.Is(err, ErrFormat) {
		t.Errorf("shrinking: %v", err)
	}
}

// TestForeignImages: images that refer to something are recognised.
func TestForeignImages(t *testing.T) {
	dir := t.TempDir()
	for name, args := range map[string][]string{
		"data file": {"-o", "data_file=" + filepath.Join(dir, "data"), "10M"},
		"version 2": {"-o", "compat=0.10", "10M"},
		"clusters":  {"-o", "cluster_size=4096", "10M"},
		"extended":  {"-o", "extended_l2=on", "10M"},
	} {
		path := filepath.Join(dir, name)
		args = append([]string{"create", "-q", "-f", "qcow2"}, append(args[:len(args)-1:len(args)-1], path, args[len(args)-1])...)
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		if err := readFile(t, path); !errors.Is(err, ErrFeature) && !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	snapshot := create(t, Image{Size: 1 << 20})
	if out, err := exec.Command("qemu-img", "snapshot", "-c", "s", snapshot).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := readFile(t, snapshot); !errors.Is(err, ErrFeature) {
		t.Errorf("internal snapshot: %v", err)
	}
}

func readFile(t *testing.T, path string) error {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = Read(f)
	return err
}
