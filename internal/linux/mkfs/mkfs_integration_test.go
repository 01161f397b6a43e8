//go:build integration

package mkfs_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"atoll.dev/atoll/internal/linux/mkfs"
)

// TestParts: what Each reports is the whole file system, in few parts of bounded size. It needs e2fsprogs and
// xfsprogs.
func TestParts(t *testing.T) {
	for fsType, check := range map[string][]string{mkfs.Ext4: {"e2fsck", "-fn"}, mkfs.XFS: {"xfs_repair", "-n", "-f"}} {
		const size, limit = 10 << 30, 256 << 10
		img, err := mkfs.New(t.Context(), fsType, size, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		copied := filepath.Join(t.TempDir(), "copy")
		f, err := os.Create(copied)
		if err != nil {
			t.Fatal(err)
		}
		total, last := 0, int64(-1)
		err = img.Each(limit, func(offset int64, data []byte) error {
			if offset <= last || len(data) > limit || bytes.Count(data, []byte{0}) == len(data) {
				t.Errorf("%s: part of %d bytes at %d after %d", fsType, len(data), offset, last)
			}
			total, last = total+len(data), offset
			_, err := f.WriteAt(data, offset)
			return err
		})
		if err := errors.Join(err, f.Truncate(size), f.Close(), img.Close()); err != nil {
			t.Fatal(err)
		}
		if total > 1<<20 {
			t.Errorf("%s: %d bytes to send", fsType, total)
		}
		if out, err := exec.Command(check[0], append(check[1:], copied)...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", fsType, err, out)
		}
	}
}

func TestRefused(t *testing.T) {
	if _, err := mkfs.New(t.Context(), "btrfs", 1<<30, t.TempDir()); err == nil {
		t.Error("btrfs was made")
	}
	if _, err := mkfs.New(t.Context(), mkfs.XFS, 1<<20, t.TempDir()); err == nil {
		t.Error("xfs of 1 MiB was made")
	}
}
