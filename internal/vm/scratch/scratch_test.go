package scratch

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func format(t *testing.T, size int64) (*Master, string) {
	t.Helper()
	dir := t.TempDir()
	m, err := Format(context.Background(), Config{Dir: dir, Bytes: size})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m, dir
}

// check runs e2fsck and dumpe2fs on an image.
func check(t *testing.T, f *os.File) string {
	t.Helper()
	for _, name := range []string{"e2fsck", "dumpe2fs"} {
		path, err := lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		args := []string{"-h", "/proc/self/fd/3"}
		if name == "e2fsck" {
			args = []string{"-fn", "/proc/self/fd/3"}
		}
		cmd := exec.Command(path, args...)
		cmd.ExtraFiles = []*os.File{f}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		if name == "dumpe2fs" {
			return string(out)
		}
	}
	return ""
}

func allocated(t *testing.T, f *os.File) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestCopyIsSoundAndSparse(t *testing.T) {
	m, dir := format(t, 16<<30)
	c, err := m.Copy()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	info := check(t, c)
	for _, want := range []string{"quota", "project", "extent"} {
		if !strings.Contains(info, want) {
			t.Errorf("feature %s is missing in:\n%s", want, info)
		}
	}
	if strings.Contains(info, "has_journal") {
		t.Error("the file system has a journal")
	}
	if n := allocated(t, c); n > 1<<20 {
		t.Errorf("a copy takes %d bytes", n)
	}
	if st, err := c.Stat(); err != nil || st.Size() != 16<<30 {
		t.Errorf("copy has size %v, %v", st, err)
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 0 {
		t.Errorf("directory has %v, %v", names, err)
	}
}

func TestCopiesAreIndependent(t *testing.T) {
	m, dir := format(t, 64<<20)
	a, err := m.Copy()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := a.WriteAt(bytes.Repeat([]byte{0xaa}, 8192), 0); err != nil {
		t.Fatal(err)
	}
	dup, err := unix.Dup(int(m.File().Fd()))
	if err != nil {
		t.Fatal(err)
	}
	opened, err := Open(dir, os.NewFile(uintptr(dup), "master"))
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	b, err := opened.Copy()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	check(t, b)
}

func TestBadSizes(t *testing.T) {
	for _, size := range []int64{-1, 0, 1 << 20, 16<<20 + 1} {
		if _, err := Format(context.Background(), Config{Dir: t.TempDir(), Bytes: size}); err == nil {
			t.Errorf("size %d was taken", size)
		}
	}
}

func BenchmarkCopy(b *testing.B) {
	m, err := Format(context.Background(), Config{Dir: b.TempDir(), Bytes: 16 << 30})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	for b.Loop() {
		c, err := m.Copy()
		if err != nil {
			b.Fatal(err)
		}
		_ = c.Close()
	}
}
