//go:build integration

package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// smallDisk mounts a file system of its own and returns where, and a command to run there.
func smallDisk(t *testing.T) (dir string, sh func(script string)) {
	t.Helper()
	at := t.TempDir()
	disk, dir := filepath.Join(at, "disk"), filepath.Join(at, "mnt")
	sh = func(script string) {
		t.Helper()
		if out, err := exec.CommandContext(context.WithoutCancel(t.Context()), "sh", "-ec", script, "sh", disk, dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	sh("mkdir $2 && truncate -s 32M $1 && mkfs.ext4 -q -m 0 $1 && mount -o loop $1 $2 && mkdir $2/registry")
	t.Cleanup(func() { sh("umount --lazy $2") })
	return dir, sh
}

// TestDiskFillsUp: the disk is full midway in a push whose length nobody knows. The push is refused for that reason and
// takes no room afterwards, what is there is pulled, and when there is room again the same push goes through.
func TestDiskFillsUp(t *testing.T) {
	dir, sh := smallDisk(t)
	h := start(t, func(c *Config) { c.Dir = filepath.Join(dir, "registry") })
	h.push("shop/web:1", h.image(100_000, 1), h.as("olga"))
	sh("fallocate -l $(($(stat -f -c '%a * %S' $2) - 3145728)) $2/ballast") // 3 MiB are free
	layer := make([]byte, 6<<20)
	_, _ = rand.Read(layer)
	push := func() (status int, text string) {
		t.Helper()
		_, token := h.token("olga", passwords()["olga"], "repository:shop/big:pull,push")
		status, header, text := h.do(http.MethodPost, "/v2/shop/big/blobs/uploads/", token, nil, nil)
		if status != http.StatusAccepted {
			t.Fatal(status, text)
		}
		upload := strings.TrimPrefix(header.Get("Location"), h.srv.URL)
		status, _, text = h.do(http.MethodPatch, upload, token, io.MultiReader(bytes.NewReader(layer)), map[string]string{"Content-Type": "application/octet-stream"})
		return status, text
	}
	used := func() int64 {
		n, err := h.reg.Usage(t.Context(), "shop")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := used()
	status, text := push()
	if status != http.StatusInsufficientStorage || !strings.Contains(text, "the disk of the registry is full") {
		t.Errorf("%d %s", status, text)
	}
	if now := used(); now != before {
		t.Errorf("used %d after a refusal, before %d", now, before)
	}
	if left := largest(t, filepath.Join(dir, "registry")); left > 1<<20 {
		t.Errorf("what was refused has left a file of %d bytes", left)
	}
	if err := h.pull("shop/web:1", h.as("victor")); err != nil {
		t.Errorf("pulling: %v", err)
	}
	sh("rm $2/ballast")
	if status, text := push(); status != http.StatusAccepted {
		t.Errorf("when there is room: %d %s", status, text)
	}
	h.push("shop/web:2", h.image(100_000, 1), h.as("olga"))
}

// largest is the size of the largest file.
func largest(t *testing.T, dir string) (size int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("looking at %s: %w", path, err)
		}
		size = max(size, info.Size())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return size
}
