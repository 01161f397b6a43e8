//go:build integration

package filesystem_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/filesystem"
	"atoll.dev/atoll/internal/linux/mkfs"
)

// These tests need root, loop devices, e2fsprogs and xfsprogs.

// loop is a blank disk.
func loop(t *testing.T, bytes int64) (device, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, bytes))
	out, err := exec.Command("losetup", "-f", "--show", file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	device = strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", device).Run() })
	return device, file
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func format(t *testing.T, fsType, device string, bytes int64) {
	t.Helper()
	img, err := mkfs.New(t.Context(), fsType, bytes, t.TempDir())
	must(t, err)
	defer img.Close()
	w, err := filesystem.StartFormat(device)
	must(t, err)
	must(t, img.Each(64<<10, func(offset int64, data []byte) error { return w.Write(uint64(offset), data) }))
	must(t, w.Finish())
}

// TestLife formats, mounts, fills, grows and unmounts both kinds of file systems.
func TestLife(t *testing.T) {
	for fsType, check := range map[string]string{filesystem.Ext4: "e2fsck -fn", filesystem.XFS: "xfs_repair -n"} {
		t.Run(fsType, func(t *testing.T) {
			const bytes = 400 << 20
			device, file := loop(t, bytes)
			c, err := filesystem.Probe(device)
			if err != nil || !c.Blank || c.Bytes != bytes {
				t.Fatalf("a blank disk: %+v, %v", c, err)
			}
			dir := t.TempDir()
			if err := filesystem.Mount(device, dir, filesystem.Options{FSType: fsType}); !errors.Is(err, filesystem.ErrForeign) {
				t.Fatalf("mounting a blank disk: %v", err)
			}
			format(t, fsType, device, bytes)
			if c, err = filesystem.Probe(device); err != nil || c.Blank || c.FSType != fsType {
				t.Fatalf("a formatted disk: %+v, %v", c, err)
			}
			if _, err := filesystem.StartFormat(device); !errors.Is(err, filesystem.ErrForeign) {
				t.Fatalf("formatting what is formatted: %v", err)
			}
			options := filesystem.Options{FSType: fsType, Options: []string{"noatime,nodev", "discard"}}
			must(t, filesystem.Mount(device, dir, options))
			t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
			must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("kept"), 0o600))
			if fsType == filesystem.XFS { // ext4 takes CAP_SYS_RESOURCE, which hosts may lack and guests have
				before := capacity(t, dir)
				must(t, os.Truncate(file, 2*bytes))
				if out, err := exec.Command("losetup", "-c", device).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				n, err := filesystem.Grow(device, dir, fsType)
				if err != nil || n != 2*bytes || capacity(t, dir) < before*3/2 {
					t.Fatalf("grown from %d to %d (disk %d): %v", before, capacity(t, dir), n, err)
				}
			}
			_, err = filesystem.Grow(device, dir, fsType) // nothing to do
			must(t, err)
			must(t, filesystem.Unmount(t.Context(), device, dir))
			args := append(strings.Fields(check), device)
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%v: %v: %s", args, err, out)
			}
			must(t, filesystem.Mount(device, dir, filesystem.Options{FSType: fsType, ReadOnly: true}))
			if data, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(data) != "kept" {
				t.Errorf("%q, %v", data, err)
			}
			if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("writing to a read-only mount: %v", err)
			}
			must(t, filesystem.Unmount(t.Context(), device, dir))
			if err := filesystem.Mount(device, dir, filesystem.Options{FSType: fsType, Options: []string{"no-such-option"}}); err == nil {
				t.Error("an unknown mount option was taken")
			}
		})
	}
}

func capacity(t *testing.T, dir string) uint64 {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	return st.Blocks * uint64(st.Bsize)
}

// TestFormatCutShort ends formatting at every step: the disk counts as blank, and the next attempt works.
func TestFormatCutShort(t *testing.T) {
	const bytes = 64 << 20
	device, _ := loop(t, bytes)
	img, err := mkfs.New(t.Context(), mkfs.Ext4, bytes, t.TempDir())
	must(t, err)
	defer img.Close()
	stop := errors.New("stop")
	for parts := range 6 {
		w, err := filesystem.StartFormat(device)
		must(t, err)
		n := 0
		err = img.Each(4096, func(offset int64, data []byte) error {
			if n++; n > parts*3 {
				return stop
			}
			return w.Write(uint64(offset), data)
		})
		if err != nil && !errors.Is(err, stop) {
			t.Fatal(err)
		}
		must(t, w.Close())
		if c, err := filesystem.Probe(device); err != nil || !c.Blank || !c.Begun {
			t.Fatalf("after %d parts: %+v, %v", parts*3, c, err)
		}
	}
	format(t, filesystem.Ext4, device, bytes)
	if out, err := exec.Command("e2fsck", "-fn", device).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
}

// TestForeign: what is not ours is never touched.
func TestForeign(t *testing.T) {
	const bytes = 16 << 20
	for name, at := range map[string]int64{"partition table": 510, "something further on": 900 << 10, "backup at the end": bytes - 512} {
		device, file := loop(t, bytes)
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt([]byte{0x55, 0xaa}, at)
		must(t, errors.Join(err, f.Sync(), f.Close()))
		must(t, exec.Command("blockdev", "--flushbufs", device).Run())
		c, err := filesystem.Probe(device)
		if err != nil || c.Blank || c.FSType != "" {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
		if _, err := filesystem.StartFormat(device); !errors.Is(err, filesystem.ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSetGroup: everything is the group's, links are not followed, and a second time nothing is done.
func TestSetGroup(t *testing.T) {
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, nil, 0o600))
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "a/b/file"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "program"), nil, 0o700))
	must(t, os.Symlink(outside, filepath.Join(dir, "link")))
	must(t, filesystem.SetGroup(context.Background(), dir, 4242))
	for name, mode := range map[string]uint32{".": 0o2770, "a": 0o2770, "a/b": 0o2770, "a/b/file": 0o660, "program": 0o760} {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(dir, name), &st))
		if st.Gid != 4242 || st.Mode&0o7770 != mode {
			t.Errorf("%s: group %d, mode %o", name, st.Gid, st.Mode&0o7777)
		}
	}
	var st unix.Stat_t
	must(t, unix.Lstat(filepath.Join(dir, "link"), &st))
	if st.Gid != 4242 {
		t.Errorf("link: group %d", st.Gid)
	}
	must(t, unix.Stat(outside, &st))
	if st.Gid == 4242 || st.Mode&0o777 != 0o600 {
		t.Errorf("outside: group %d, mode %o", st.Gid, st.Mode)
	}
	must(t, os.Chown(filepath.Join(dir, "program"), 0, 1))
	must(t, filesystem.SetGroup(context.Background(), dir, 4242))
	must(t, unix.Lstat(filepath.Join(dir, "program"), &st))
	if st.Gid != 1 {
		t.Error("went through all files although the root was right")
	}
}
