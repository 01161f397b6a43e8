//go:build integration

package luks

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/storage/qcow2"
	"atoll.dev/atoll/internal/testkit/lukstest"
)

// image writes an encrypted image with this header.
func image(t *testing.T, header []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := (qcow2.Image{Size: 1 << 30, LUKS: header}).Write(f); err != nil {
		t.Fatal(err)
	}
	return path
}

// qemuIO opens an image with a passphrase and runs commands on it.
func qemuIO(t *testing.T, path, passphrase string, commands ...string) error {
	t.Helper()
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(passphrase), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"--object", "secret,id=k,file=" + key, "--image-opts"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.Command("qemu-io", append(args, "driver=qcow2,encrypt.key-secret=k,file.filename="+path)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "verification failed") {
		return fmt.Errorf("qemu-io: %w\n%s", err, out)
	}
	return nil
}

// TestQEMUOpensIt: QEMU unlocks what New made, before and after the passphrase was changed, and the data stay.
func TestQEMUOpensIt(t *testing.T) {
	header, err := New([]byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	path := image(t, header)
	if err := qemuIO(t, path, "one", "write -P 7 1M 1M", "read -P 7 1M 1M"); err != nil {
		t.Fatal(err)
	}
	if err := qemuIO(t, path, "two", "read 0 512"); err == nil {
		t.Fatal("QEMU took a wrong passphrase")
	}
	if out, err := exec.Command("qemu-img", "check", "--object", "secret,id=k,data=one", "--image-opts", "driver=qcow2,encrypt.key-secret=k,file.filename="+path).CombinedOutput(); err != nil {
		t.Fatalf("check: %v\n%s", err, out)
	}

	both, err := Add(header, []byte("one"), []byte("two"))
	if err != nil {
		t.Fatal(err)
	}
	replace(t, path, both)
	for _, p := range []string{"one", "two"} {
		if err := qemuIO(t, path, p, "read -P 7 1M 1M"); err != nil {
			t.Fatal(err)
		}
	}
	only, err := Keep(both, []byte("two"))
	if err != nil {
		t.Fatal(err)
	}
	replace(t, path, only)
	if err := qemuIO(t, path, "two", "read -P 7 1M 1M"); err != nil {
		t.Fatal(err)
	}
	if err := qemuIO(t, path, "one", "read 0 512"); err == nil {
		t.Fatal("the old passphrase still opens the image")
	}
}

// replace writes a header where qcow2 says it is.
func replace(t *testing.T, path string, header []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := qcow2.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	if !h.LUKS || h.CryptSize != int64(len(header)) {
		t.Fatalf("%+v", h)
	}
	if _, err := f.WriteAt(header, h.CryptOffset); err != nil {
		t.Fatal(err)
	}
}

// TestQEMUsHeader: a header that qemu-img made is read, and its slots changed.
func TestQEMUsHeader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := lukstest.Create("-f", "qcow2", "--object", "secret,id=k,data=one", "-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", path, "1G"); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := qcow2.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	header := make([]byte, h.CryptSize)
	if _, err := f.ReadAt(header, h.CryptOffset); err != nil {
		t.Fatal(err)
	}
	if err := Check(header, []byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := Check(header, []byte("two")); !errors.Is(err, ErrPassphrase) {
		t.Fatal(err)
	}
}
