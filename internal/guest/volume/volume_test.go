package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/usage"
)

// store is a store in a temporary directory; nothing in these tests needs root.
func store(t *testing.T) *Store {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{Dir: filepath.Join(dir, "v"), Stage: filepath.Join(dir, "stage"), Scratch: filepath.Join(dir, "scratch")}
	for _, d := range []string{cfg.Dir, cfg.Stage, cfg.Scratch} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	meter, err := usage.New(cfg.Scratch)
	if err != nil {
		t.Fatal(err)
	}
	return New(cfg, meter)
}

func create(t *testing.T, s *Store, id string, kind Kind) *Volume {
	t.Helper()
	if err := s.Create(id, kind, 0, 0o755, uint32(os.Getuid()), uint32(os.Getgid())); err != nil {
		t.Fatal(err)
	}
	v, err := s.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func entry(path string, mode uint32) File {
	return File{Path: path, Mode: mode, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
}

func regular(path, data string) File {
	f := entry(path, unix.S_IFREG|0o644)
	f.Data = []byte(data)
	return f
}

func directory(path string) File { return entry(path, unix.S_IFDIR|0o755) }

func symlink(path, target string) File {
	f := entry(path, unix.S_IFLNK|0o777)
	f.Target = target
	return f
}

func read(t *testing.T, v *Volume, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(v.Root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func tree(version, value string) []File {
	return []File{directory(version), regular(version+"/key", value), symlink("..data", version), symlink("key", "..data/key")}
}

func TestReplaceIsAtomic(t *testing.T) {
	s := store(t)
	v := create(t, s, "cm", Pushed)
	if err := s.Put("cm", tree("..1", "one"), true, true); err != nil {
		t.Fatal(err)
	}
	held, err := os.Open(filepath.Join(v.Root, "key"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	before, err := os.Lstat(filepath.Join(v.Root, "key"))
	if err != nil {
		t.Fatal(err)
	}
	// In chunks, nothing visible until the last.
	files := tree("..2", "tw")
	if err := s.Put("cm", files[:2], true, false); err != nil {
		t.Fatal(err)
	}
	more := regular("..2/key", "o")
	more.Append = true
	if err := s.Put("cm", []File{more}, false, false); err != nil {
		t.Fatal(err)
	}
	if got := read(t, v, "key"); got != "one" {
		t.Errorf("before the commit: %q", got)
	}
	if err := s.Put("cm", files[2:], false, true); err != nil {
		t.Fatal(err)
	}
	if got := read(t, v, "key"); got != "two" {
		t.Errorf("after the commit: %q", got)
	}
	if _, err := os.Stat(filepath.Join(v.Root, "..1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("old tree: %v", err)
	}
	after, err := os.Lstat(filepath.Join(v.Root, "key"))
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("unchanged link was replaced, %v", err)
	}
	// The same tree again, as a host that starts over sends it.
	if err := s.Put("cm", tree("..2", "two"), true, true); err != nil {
		t.Fatal(err)
	}
	if got := read(t, v, "key"); got != "two" {
		t.Errorf("pushed again: %q", got)
	}
	if left, err := os.ReadDir(s.cfg.Stage); err != nil || len(left) != 0 {
		t.Errorf("left in the stage: %v, %v", left, err)
	}
}

func TestInPlaceKeepsInode(t *testing.T) {
	s := store(t)
	v := create(t, s, "hosts", Pushed)
	if err := s.Put("hosts", []File{regular("hosts", "long old content"), regular("d/e", "x")}, false, true); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(v.Root, "hosts"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Put("hosts", []File{regular("hosts", "new")}, false, true); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := f.Read(b)
	if err != nil || string(b[:n]) != "new" {
		t.Errorf("open file reads %q, %v", b[:n], err)
	}
	if got := read(t, v, "d/e"); got != "x" {
		t.Errorf("other file: %q", got)
	}
}

// A container that can write to a volume plants links; nothing outside may change or be read.
func TestLinksDoNotLeadOut(t *testing.T) {
	s := store(t)
	v := create(t, s, "v", Pushed)
	outside := filepath.Join(filepath.Dir(s.cfg.Dir), "outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"dir": outside, "file": filepath.Join(outside, "secret"), "up": "../.."} {
		if err := os.Symlink(target, filepath.Join(v.Root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(v.Root, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	_ = s.Put("v", []File{regular("file", "changed")}, false, true)
	_ = s.Put("v", []File{regular("dir/new", "x")}, false, true)
	_ = s.Put("v", []File{regular("up/outside/new", "x")}, false, true)
	if b, err := os.ReadFile(filepath.Join(outside, "secret")); err != nil || string(b) != "secret" {
		t.Errorf("outside file: %q, %v", b, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 1 {
		t.Errorf("outside: %v, %v", left, err)
	}
	for _, p := range []string{"dir/secret", "up/outside/secret", "fifo", ".", "missing", "../x"} {
		if b, err := s.Tail("v", p, 10); err == nil {
			t.Errorf("%s read: %q", p, b)
		}
	}
	// Replacing the tree removes the links, not what they point to.
	if err := s.Put("v", tree("..1", "one"), true, true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(outside, "secret")); err != nil {
		t.Error(err)
	}
}

func TestTail(t *testing.T) {
	s := store(t)
	create(t, s, "v", Pushed)
	if err := s.Put("v", []File{regular("log", "0123456789")}, false, true); err != nil {
		t.Fatal(err)
	}
	for limit, want := range map[int64]string{4: "6789", 100: "0123456789", 0: ""} {
		if got, err := s.Tail("v", "log", limit); err != nil || string(got) != want {
			t.Errorf("last %d: %q, %v", limit, got, err)
		}
	}
}

func TestSource(t *testing.T) {
	s := store(t)
	v := create(t, s, "v", Scratch)
	dir := s.cfg.Dir
	if got, err := s.Source(dir + "/v"); err != nil || got != (Source{Root: v.Root, Dir: true}) {
		t.Errorf("root: %+v, %v", got, err)
	}
	if got, err := s.Source(dir + "/v/a/b/"); err != nil || got != (Source{Root: v.Root, Sub: "a/b", Dir: true}) {
		t.Errorf("made: %+v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(v.Root, "a", "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Source(dir + "/v/a/f"); err != nil || got.Dir {
		t.Errorf("file: %+v, %v", got, err)
	}
	if err := os.Symlink("/etc", filepath.Join(v.Root, "etc")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", filepath.Join(v.Root, "inside")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Source(dir + "/v/inside/b"); err != nil {
		t.Errorf("link inside: %v", err)
	}
	for _, bad := range []string{dir, dir + "/none", dir + "/../x", "/etc", dir + "/v/etc", dir + "/v/etc/made", dir + "/v/a/f/x"} {
		if got, err := s.Source(bad); err == nil {
			t.Errorf("%s accepted: %+v", bad, got)
		}
	}
}

func TestFill(t *testing.T) {
	s := store(t)
	v := create(t, s, "v", Image)
	src := t.TempDir()
	if err := os.MkdirAll(filepath.Join(src, "d"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "d", "f"), []byte("x"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/d", filepath.Join(src, "l")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Fill("v", src); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, v, "d/f"); got != "x" {
		t.Errorf("file %q", got)
	}
	if l, err := os.Readlink(filepath.Join(v.Root, "l")); err != nil || l != "/d" {
		t.Errorf("link %q, %v", l, err)
	}
	if err := s.Remove("v"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("v"); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed volume: %v", err)
	}
}

func FuzzPath(f *testing.F) {
	for _, p := range []string{"a", "../a", "..data", "a/../b", "/a", "a//b", ".", "", "a\x00b"} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if checkPath(p) != nil {
			return
		}
		joined := filepath.Join("/root/volume", p)
		if joined != "/root/volume" && !strings.HasPrefix(joined, "/root/volume/") {
			t.Errorf("%q leads to %q", p, joined)
		}
	})
}

// TestDiskAgain: an attempt that failed, or that the host gave up on, is no obstacle to the next one.
func TestDiskAgain(t *testing.T) {
	s := store(t)
	d := Disk{Device: "/dev/sda", FSType: "ext4"}
	bad := errors.New("bad")
	if err := s.CreateDisk("d", d, func(string) error { return bad }); !errors.Is(err, bad) {
		t.Fatal(err)
	}
	for _, device := range []string{"/dev/sda", "/dev/sdb"} {
		d.Device = device
		if err := s.CreateDisk("d", d, func(string) error { return nil }); err != nil {
			t.Fatal(err)
		}
		if v, err := s.Get("d"); err != nil || v.Disk.Device != device {
			t.Errorf("%+v, %v", v, err)
		}
	}
	started, hold := make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- s.CreateDisk("d", d, func(string) error { close(started); <-hold; return nil })
	}()
	<-started
	if err := s.CreateDisk("d", d, nil); !errors.Is(err, ErrExists) {
		t.Errorf("while it is being mounted: %v", err)
	}
	close(hold)
	if err := <-done; err != nil {
		t.Error(err)
	}
	create(t, s, "other", Pushed)
	if err := s.CreateDisk("other", d, nil); !errors.Is(err, ErrExists) {
		t.Errorf("in the place of a volume without a disk: %v", err)
	}
}
