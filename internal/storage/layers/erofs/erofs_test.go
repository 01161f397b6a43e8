package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

var testID = [16]byte{1, 2, 3}

// build writes a tree that fill makes and returns the file.
func build(t testing.TB, fill func(w *Writer) *Node) *os.File {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w, err := NewWriter(f, dir, testID)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Finish(fill(w)); err != nil {
		t.Fatal(err)
	}
	return f
}

func load(t testing.TB, f *os.File) *Node {
	t.Helper()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	root, err := Load(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func file(t testing.TB, w *Writer, content []byte) *Node {
	t.Helper()
	d, err := w.WriteFile(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	return &Node{Mode: unix.S_IFREG | 0o644, Data: d}
}

func random(n int) []byte {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32()) | 1
	}
	return b
}

// contents are files that meet every way of storing data.
func contents() map[string][]byte {
	out := map[string][]byte{}
	for _, n := range []int{0, 1, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 8192, 65535, 65536, 65537, 200000} {
		out[fmt.Sprintf("file-%d", n)] = random(n)
	}
	hole := make([]byte, ChunkSize)
	out["sparse-end"] = append(random(100000), make([]byte, 300000)...)
	out["sparse-start"] = append(slices.Clone(hole), random(5000)...)
	out["sparse-middle"] = slices.Concat(random(ChunkSize), hole, hole, random(70000))
	out["sparse-all"] = make([]byte, 10*ChunkSize+17)
	out["zeros-short"] = make([]byte, ChunkSize-1)
	return out
}

// richTree is a tree with every kind of inode.
func richTree(t testing.TB, w *Writer) *Node {
	root := NewDir(0o755)
	root.Xattrs = map[string]string{"user.root": "r"}
	for name, b := range contents() {
		n := file(t, w, b)
		n.UID, n.GID, n.Mtime, n.MtimeNsec = 1000000, 7, 1<<33, 999999999
		if len(b)%2 == 1 {
			n.Xattrs = map[string]string{"user.a": name, "security.capability": "\x01\x00\x02", "trusted.big": strings.Repeat("v", 5000)}
		}
		root.Children[name] = n
	}
	root.Children["hardlink"] = root.Children["file-4097"]
	dir := NewDir(0o1777)
	root.Children["dir"] = dir
	dir.Children["hardlink"] = root.Children["file-4097"]
	dir.Xattrs = map[string]string{"system.posix_acl_default": "acl", "system.posix_acl_access": ""}
	for i, target := range []string{"x", strings.Repeat("y", 1000), strings.Repeat("z", MaxSymlink)} {
		dir.Children[fmt.Sprint("link", i)] = &Node{Mode: unix.S_IFLNK | 0o777, Target: target}
	}
	rdev, _ := Mkdev(300, 70000)
	dir.Children["chr"] = &Node{Mode: unix.S_IFCHR | 0o600, Rdev: rdev}
	dir.Children["blk"] = &Node{Mode: unix.S_IFBLK | 0o600, Rdev: rdev}
	dir.Children["fifo"] = &Node{Mode: unix.S_IFIFO | 0o600}
	dir.Children["empty"] = NewDir(0o700)
	for _, name := range []string{"+x", "-", "!", "#", "...", "..x", ".-", "\xff", strings.Repeat("n", 255)} {
		dir.Children[name] = file(t, w, []byte(name))
	}
	many := NewDir(0o755)
	root.Children["many"] = many
	for i := range 1000 {
		many.Children[fmt.Sprintf("%0*d", 1+i%200, i)] = &Node{Mode: unix.S_IFREG | 0o600}
	}
	// Directories whose entries end on or about a block boundary.
	for n := 3950; n < 4130; n++ {
		edge := NewDir(0o755)
		left := n - 2*direntSize - 3
		for i := 0; left > direntSize; i++ {
			name := min(left-direntSize, 255)
			if rest := left - direntSize - name; rest > 0 && rest <= direntSize {
				name -= direntSize + 1 - rest
			}
			edge.Children[fmt.Sprintf("%03d%s", i, strings.Repeat("e", max(0, name-3)))] = &Node{Mode: unix.S_IFREG}
			left -= direntSize + max(3, name)
		}
		root.Children[fmt.Sprint("edge", n)] = edge
	}
	return root
}

// describe returns a line for every name below root; names of one inode share
// a number.
func describe(t testing.TB, root *Node, data func(*Node) []byte) map[string]string {
	t.Helper()
	out := map[string]string{}
	ids := map[*Node]string{}
	var walk func(at string, n *Node)
	walk = func(at string, n *Node) {
		if ids[n] == "" {
			ids[n] = at
		}
		line := fmt.Sprintf("%o %d:%d %d.%d rdev=%d to=%q xattrs=%v", n.Mode, n.UID, n.GID, n.Mtime, n.MtimeNsec, n.Rdev, n.Target, n.Xattrs)
		if n.IsRegular() {
			line += fmt.Sprintf(" inode=%s data=%d/%x", ids[n], n.Data.Size, data(n))
		}
		out[at] = line
		for _, name := range slices.Sorted(maps.Keys(n.Children)) {
			walk(at+"/"+name, n.Children[name])
		}
	}
	walk("", root)
	return out
}

func readAll(t testing.TB) func(*Node) []byte {
	return func(n *Node) []byte {
		b, err := n.ReadAll(1 << 30)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

func TestRoundTrip(t *testing.T) {
	want := map[*Node][]byte{}
	var tree *Node
	f := build(t, func(w *Writer) *Node {
		tree = richTree(t, w)
		for name, b := range contents() {
			want[tree.Children[name]] = b
		}
		for name, n := range tree.Children["dir"].Children {
			if n.IsRegular() && name != "hardlink" {
				want[n] = []byte(name)
			}
		}
		return tree
	})
	got := describe(t, load(t, f), readAll(t))
	exp := describe(t, tree, func(n *Node) []byte { return want[n] })
	diff(t, exp, got)
}

func diff(t *testing.T, want, got map[string]string) {
	t.Helper()
	for name, w := range want {
		if got[name] != w {
			t.Errorf("%.60q:\n got %.300s\nwant %.300s", name, got[name], w)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%.60q should not be there", name)
		}
	}
}

// TestCopy copies an image through a second Writer, and that once more.
func TestCopy(t *testing.T) {
	first := build(t, func(w *Writer) *Node { return richTree(t, w) })
	want := describe(t, load(t, first), readAll(t))
	src := first
	for range 2 {
		next := build(t, func(w *Writer) *Node {
			root := load(t, src)
			done := map[*Node]bool{}
			var walk func(n *Node)
			walk = func(n *Node) {
				if n.IsRegular() && !done[n] {
					d, err := w.CopyFile(src, n.Data)
					if err != nil {
						t.Fatal(err)
					}
					n.Data, done[n] = d, true
				}
				for _, name := range slices.Sorted(maps.Keys(n.Children)) {
					walk(n.Children[name])
				}
			}
			walk(root)
			return root
		})
		diff(t, want, describe(t, load(t, next), readAll(t)))
		src = next
	}
}

// TestOtherReader reads an image with an independent implementation.
func TestOtherReader(t *testing.T) {
	var tree *Node
	want := contents()
	f := build(t, func(w *Writer) *Node { tree = richTree(t, w); return tree })
	img, err := goerofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range want {
		got, err := fs.ReadFile(img, name)
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("%s: %d bytes, %v; want %d bytes", name, len(got), err, len(b))
		}
		st, err := fs.Stat(img, name)
		if err != nil {
			t.Fatal(err)
		}
		sys := st.Sys().(*goerofs.Stat)
		if n := tree.Children[name]; sys.UID != n.UID || sys.Mtime != uint64(n.Mtime) || !maps.Equal(sys.Xattrs, n.Xattrs) && len(n.Xattrs) > 0 {
			t.Errorf("%s: got %+v", name, sys)
		}
	}
	for _, dir := range []string{".", "dir", "many", "edge4096"} {
		entries, err := fs.ReadDir(img, dir)
		n := Lookup(tree, dir, true)
		if err != nil || len(entries) != len(n.Children) {
			t.Errorf("%s: %d entries, %v; want %d", dir, len(entries), err, len(n.Children))
		}
	}
	st, err := fs.Stat(img, "hardlink")
	if err != nil || st.Sys().(*goerofs.Stat).Nlink != 3 {
		t.Errorf("hard link: %+v, %v", st, err)
	}
}

func TestShortInput(t *testing.T) {
	build(t, func(w *Writer) *Node {
		if _, err := w.WriteFile(strings.NewReader("abc"), 10); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("got %v, want an unexpected EOF", err)
		}
		return NewDir(0o755)
	})
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	for name, tree := range map[string]*Node{
		"empty symlink": {Mode: unix.S_IFDIR, Children: map[string]*Node{"l": {Mode: unix.S_IFLNK}}},
		"attributes": {Mode: unix.S_IFDIR, Xattrs: map[string]string{
			"user.1": strings.Repeat("x", 60000), "user.2": strings.Repeat("x", 60000), "user.3": strings.Repeat("x", 60000),
			"user.4": strings.Repeat("x", 60000), "user.5": strings.Repeat("x", 60000),
		}},
	} {
		f, err := os.Create(filepath.Join(dir, "image"))
		if err != nil {
			t.Fatal(err)
		}
		w, err := NewWriter(f, dir, testID)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Finish(tree); err == nil {
			t.Errorf("%s: no error", name)
		}
		w.Close()
		f.Close()
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("files left: %v", left)
	}
}

func TestLookup(t *testing.T) {
	f := func(target string) *Node { return &Node{Mode: unix.S_IFLNK, Target: target} }
	dir := func(c map[string]*Node) *Node { return &Node{Mode: unix.S_IFDIR, Children: c} }
	x := &Node{Mode: unix.S_IFREG}
	etc := dir(map[string]*Node{"x": x, "up": f("../../../../etc/x"), "abs": f("/etc/x"), "loop": f("loop"), "dangling": f("no/where")})
	root := dir(map[string]*Node{"etc": etc, "link": f("etc"), "conf": f("/link/")})
	for path, want := range map[string]*Node{
		"/etc/x": x, "etc//./x": x, "link/x": x, "conf/x": x, "etc/up": x, "etc/abs": x, "../../etc/x": x,
		"etc/loop": nil, "etc/dangling": nil, "etc/x/y": nil, "nothing": nil, "": root, "/..": root, "etc": etc,
	} {
		if got := Lookup(root, path, true); got != want {
			t.Errorf("Lookup(%q) = %v, want %v", path, got, want)
		}
	}
	if got := Lookup(root, "link", false); !reflect.DeepEqual(got, f("etc")) {
		t.Errorf("Lookup of a symbolic link without following it = %v", got)
	}
}

// FuzzLoad checks that damaged images give errors, not panics, and that what
// is accepted can be read.
func FuzzLoad(f *testing.F) {
	image := build(f, func(w *Writer) *Node {
		root := NewDir(0o755)
		root.Xattrs = map[string]string{"user.k": "v"}
		root.Children["small"] = file(f, w, random(100))
		root.Children["big"] = file(f, w, random(5000))
		root.Children["sparse"] = file(f, w, make([]byte, 2*ChunkSize))
		root.Children["link"] = &Node{Mode: unix.S_IFLNK, Target: "target"}
		root.Children["dir"] = NewDir(0o755)
		root.Children["dir"].Children["same"] = root.Children["big"]
		return root
	})
	b, err := os.ReadFile(image.Name())
	if err != nil {
		f.Fatal(err)
	}
	meta := int(le.Uint32(b[superOffset+40:])) * BlockSize
	f.Add(b[meta:], uint16(0), byte(0))
	f.Fuzz(func(t *testing.T, m []byte, at uint16, v byte) {
		img := append(slices.Clone(b[:meta]), m...)
		img = append(img, make([]byte, align(len(img), BlockSize)-len(img))...)
		if len(img) > meta {
			img[meta+int(at)%(len(img)-meta)] ^= v
		}
		le.PutUint32(img[superOffset+36:], uint32(len(img)/BlockSize))
		le.PutUint32(img[superOffset+4:], 0)
		le.PutUint32(img[superOffset+4:], superChecksum(img[superOffset:BlockSize]))
		root, err := Load(bytes.NewReader(img), int64(len(img)))
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error %v does not match ErrCorrupt", err)
			}
			return
		}
		describe(t, root, func(n *Node) []byte {
			if n.Data.Size > 1<<24 {
				return nil
			}
			return readAll(t)(n)
		})
	})
}
