//go:build integration

package layers

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
)

// TestAgainstOverlay mounts the image of every case and compares it, entry by
// entry, with an overlayfs mount of the same layers unpacked by containerd.
// It needs root.
func TestAgainstOverlay(t *testing.T) {
	for name, layers := range cases {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			var tars [][]byte
			for _, l := range layers {
				tars = append(tars, layerTar(t, l))
			}
			m := b.container(t, "k8s.io/9/c", b.image(t, tars...))
			image := handover.ImagePath(m.Options)
			if out, err := exec.Command("fsck.erofs", image).CombinedOutput(); err != nil && !strings.Contains(name, "names") {
				t.Errorf("fsck.erofs: %v\n%s", err, out)
			}
			ours := t.TempDir()
			mustMount(t, []mount.Mount{{Type: "erofs", Source: image, Options: []string{"ro", "loop"}}}, ours)
			compare(t, snapshotTree(t, overlay(t, tars), false), snapshotTree(t, ours, true))
		})
	}
}

func mustMount(t *testing.T, m []mount.Mount, target string) {
	t.Helper()
	if err := mount.All(m, target); err != nil {
		t.Fatalf("mounting %v: %v", m, err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(target, 0); err != nil {
			t.Error(err)
		}
	})
}

// overlay unpacks layers as containerd's overlayfs snapshotter does and
// returns the directory where they are mounted.
func overlay(t *testing.T, tars [][]byte) string {
	t.Helper()
	base := t.TempDir()
	var lowers []string // topmost first
	for i, data := range tars {
		dir := filepath.Join(base, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		_, err := archive.Apply(context.Background(), dir, bytes.NewReader(data),
			archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(lowers))
		if err != nil {
			t.Fatalf("overlay unpack of layer %d: %v", i, err)
		}
		lowers = append([]string{dir}, lowers...)
	}
	empty := filepath.Join(base, "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	lowers = append(lowers, empty)
	target := t.TempDir()
	mustMount(t, []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"ro", "lowerdir=" + strings.Join(lowers, ":")}}}, target)
	return target
}

// snapshotTree describes every entry below root in a line. With exact, link
// counts must be the number of names; overlayfs counts hidden names too. Times
// that the unpacking set are left out.
func snapshotTree(t *testing.T, root string, exact bool) map[string]string {
	t.Helper()
	out := map[string]string{}
	inodes, nlinks := map[uint64][]string{}, map[uint64]int{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("mode=%o uid=%d gid=%d", st.Mode, st.Uid, st.Gid)
		if rel != "." && st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Mtim.Sec != 0 && st.Mtim.Sec < at.Unix()+1 {
			line += fmt.Sprintf(" mtime=%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size=%d sum=%x", st.Size, sha256.Sum256(b))
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to=" + to
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" rdev=%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			inodes[st.Ino] = append(inodes[st.Ino], rel)
			nlinks[st.Ino] = int(st.Nlink)
		}
		out[rel] = line + xattrs(t, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for ino, names := range inodes {
		if exact && nlinks[ino] != len(names) {
			t.Errorf("%q: link count %d", names, nlinks[ino])
		}
		slices.Sort(names)
		for _, n := range names {
			out[n] += fmt.Sprintf(" same=%q", names)
		}
	}
	return out
}

func xattrs(t *testing.T, path string) string {
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatalf("listing attributes of %q: %v", path, err)
	}
	names := strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	out := ""
	for _, name := range names {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil {
			t.Fatalf("attribute %q of %q: %v", name, path, err)
		}
		out += fmt.Sprintf(" %s=%q", name, buf[:n])
	}
	return out
}

var mtimeField = regexp.MustCompile(` mtime=[0-9.]+`)

func compare(t *testing.T, want, got map[string]string) {
	t.Helper()
	for path, w := range want {
		g, ok := got[path]
		if !strings.Contains(w, "mtime=") {
			g = mtimeField.ReplaceAllString(g, "")
		}
		if !ok {
			t.Errorf("%.80q is missing", path)
		} else if g != w {
			t.Errorf("%.80q differs:\n got %.400s\nwant %.400s", path, g, w)
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%.80q should not be there: %.200s", path, got[path])
		}
	}
}
