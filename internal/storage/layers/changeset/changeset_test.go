package changeset

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/storage/layers/erofs"
)

func tarOf(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Format = tar.FormatPAX
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpack writes a layer to an image and loads it back.
func unpack(t testing.TB, data []byte, limits Limits) (*erofs.Node, error) {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := erofs.NewWriter(f, dir, [16]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	root, err := FromTar(t.Context(), bytes.NewReader(data), w, limits)
	if err != nil {
		return nil, err
	}
	if err := w.Finish(root); err != nil {
		t.Fatalf("a tree that FromTar made cannot be written: %v", err)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := erofs.Load(f, st.Size())
	if err != nil {
		t.Fatalf("an image of a tree that FromTar made cannot be read: %v", err)
	}
	return loaded, nil
}

func TestInvalid(t *testing.T) {
	long := strings.Repeat("x", 256)
	for name, h := range map[string]tar.Header{
		"long name":          {Name: long},
		"long parent":        {Name: long + "/x"},
		"long path":          {Name: strings.Repeat("y/", 2100) + "x"},
		"long symlink":       {Name: "l", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("z", 4096)},
		"empty symlink":      {Name: "l", Typeflag: tar.TypeSymlink},
		"whiteout of dot":    {Name: "a/.wh.."},
		"whiteout of dotdot": {Name: "a/.wh..."},
		"whiteout alone":     {Name: ".wh."},
		"device":             {Name: "d", Typeflag: tar.TypeChar, Devmajor: 5000},
		"owner":              {Name: "o", Uid: 1<<32 - 1},
		"attribute":          {Name: "x", PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", 70000)}},
		"type":               {Name: "x", Typeflag: 'Z'},
		"too big":            {Name: "x", Size: 2000},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := unpack(t, tarOf(t, h), Limits{Metadata: 1 << 20, Content: 1000})
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("got %v, want ErrInvalid", err)
			}
			if err != nil && len(err.Error()) > 600 {
				t.Errorf("error text of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestPaths(t *testing.T) {
	dirLink := tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "l"}
	_, err := unpack(t, tarOf(t, dirLink, tar.Header{Name: "l/x"}), DefaultLimits)
	if !errors.Is(err, ErrInvalid) {
		t.Errorf("path through a symbolic link to itself: got %v", err)
	}
	_, err = unpack(t, tarOf(t, tar.Header{Name: "f"}, tar.Header{Name: "f/x"}), DefaultLimits)
	if !errors.Is(err, ErrInvalid) {
		t.Errorf("path through a file: got %v", err)
	}
	_, err = unpack(t, tarOf(t, tar.Header{Name: "d", Typeflag: tar.TypeDir}, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "d"}), DefaultLimits)
	if !errors.Is(err, ErrInvalid) {
		t.Errorf("hard link to a directory: got %v", err)
	}
	// Symbolic links that make a path ever deeper.
	var deep []tar.Header
	step := strings.Repeat("a/", 500)
	for i := range 10 {
		from := step
		if i > 0 {
			from = fmt.Sprintf("l%d/%s", i-1, step)
		}
		deep = append(deep, tar.Header{Name: from, Typeflag: tar.TypeDir}, tar.Header{Name: fmt.Sprintf("l%d", i), Typeflag: tar.TypeSymlink, Linkname: from})
	}
	if _, err := unpack(t, tarOf(t, deep...), DefaultLimits); !errors.Is(err, ErrInvalid) {
		t.Errorf("paths made longer by symbolic links: got %v", err)
	}
}

func TestLimits(t *testing.T) {
	var many []tar.Header
	for i := range 100 {
		many = append(many, tar.Header{Name: fmt.Sprint(i)})
	}
	if _, err := unpack(t, tarOf(t, many...), Limits{Metadata: 50 * nodeCost, Content: 1}); !errors.Is(err, ErrInvalid) {
		t.Errorf("many files: got %v", err)
	}
	parents := tarOf(t, tar.Header{Name: strings.Repeat("p/", 100) + "x"})
	if _, err := unpack(t, parents, Limits{Metadata: 50 * nodeCost, Content: 1}); !errors.Is(err, ErrInvalid) {
		t.Errorf("many parents: got %v", err)
	}
}

func TestDamaged(t *testing.T) {
	good := tarOf(t, tar.Header{Name: "a", Size: 5000}, tar.Header{Name: "b", Size: 5000})
	for name, data := range map[string][]byte{
		"cut in a file": good[:3000], "cut in a header": good[:700], "no tar": bytes.Repeat([]byte("garbage "), 200),
	} {
		if _, err := unpack(t, data, DefaultLimits); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
}

func TestForgedMarks(t *testing.T) {
	root, err := unpack(t, tarOf(t, tar.Header{Name: "d/", Typeflag: tar.TypeDir, PAXRecords: map[string]string{
		"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.trusted.atoll.link": "/etc/shadow", "SCHILY.xattr.user.ok": "1",
	}}), DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	if got := root.Children["d"].Xattrs; len(got) != 1 || got["user.ok"] != "1" {
		t.Errorf("got attributes %v", got)
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := FromTar(ctx, bytes.NewReader(tarOf(t, tar.Header{Name: "a"})), nil, DefaultLimits)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestLinkToLowerLayer covers what containerd's overlayfs unpack refuses.
func TestLinkToLowerLayer(t *testing.T) {
	layer := func(h ...tar.Header) *erofs.Node {
		n, err := unpack(t, tarOf(t, h...), DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	base := func() *erofs.Node { return layer(tar.Header{Name: "dir/a", Size: 100, Uid: 5}) }
	root, err := Merge([]*erofs.Node{base(), layer(tar.Header{Name: "b", Typeflag: tar.TypeLink, Linkname: "dir/a"}, tar.Header{Name: "c", Typeflag: tar.TypeLink, Linkname: "b"})})
	if err != nil {
		t.Fatal(err)
	}
	a := root.Children["dir"].Children["a"]
	if root.Children["b"] != a || root.Children["c"] != a || a.UID != 5 {
		t.Error("the names do not share an inode")
	}
	if _, err := Merge([]*erofs.Node{base(), layer(tar.Header{Name: "b", Typeflag: tar.TypeLink, Linkname: "nothing"})}); !errors.Is(err, ErrInvalid) {
		t.Errorf("link to nothing: got %v", err)
	}
	if _, err := Merge([]*erofs.Node{layer(tar.Header{Name: "x", Typeflag: tar.TypeLink, Linkname: "y"}, tar.Header{Name: "y", Typeflag: tar.TypeLink, Linkname: "x"})}); !errors.Is(err, ErrInvalid) {
		t.Errorf("links to each other: got %v", err)
	}
}

// TestWhiteoutThenDirectory: the new directory is empty whatever the order.
// containerd's overlayfs unpack gets this wrong when the whiteout comes first.
func TestWhiteoutThenDirectory(t *testing.T) {
	base := func() []byte { return tarOf(t, tar.Header{Name: "d/old"}) }
	w, d, n := tar.Header{Name: ".wh.d"}, tar.Header{Name: "d/", Typeflag: tar.TypeDir}, tar.Header{Name: "d/new"}
	for name, top := range map[string][]tar.Header{"first": {w, d, n}, "last": {d, n, w}, "without header": {w, n}} {
		lower, err := unpack(t, base(), DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		upper, err := unpack(t, tarOf(t, top...), DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		root, err := Merge([]*erofs.Node{lower, upper})
		if err != nil {
			t.Fatal(err)
		}
		got := root.Children["d"]
		if len(got.Children) != 1 || got.Children["new"] == nil || len(got.Xattrs) != 0 {
			t.Errorf("whiteout %s: got %v", name, got)
		}
	}
}

func TestFinal(t *testing.T) {
	for name, tt := range map[string]struct {
		h    tar.Header
		want bool
	}{
		"file at the top": {tar.Header{Name: "x"}, true},
		"whiteout":        {tar.Header{Name: ".wh.x"}, false},
		"implied parent":  {tar.Header{Name: "d/x"}, false},
		"opaque":          {tar.Header{Name: ".wh..wh..opq"}, false},
		"lower link":      {tar.Header{Name: "x", Typeflag: tar.TypeLink, Linkname: "y"}, false},
	} {
		n, err := unpack(t, tarOf(t, tt.h), DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		if got := Final(n); got != tt.want {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

// FuzzFromTar checks that any tar gives an error or a tree that can be
// written, read back and merged.
func FuzzFromTar(f *testing.F) {
	at := time.Unix(1e9, 5)
	f.Add(tarOf(f,
		tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: at},
		tar.Header{Name: "d/f", Size: 5000, Uid: 7, PAXRecords: map[string]string{"SCHILY.xattr.user.k": "v"}},
		tar.Header{Name: "d/l", Typeflag: tar.TypeSymlink, Linkname: "../d"}, tar.Header{Name: "d/l/x"},
		tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "d/f"}, tar.Header{Name: "lower", Typeflag: tar.TypeLink, Linkname: "low"},
		tar.Header{Name: ".wh.gone"}, tar.Header{Name: "e/.wh..wh..opq"}, tar.Header{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}))
	f.Fuzz(checkLayer)
}

// FuzzEntries is FuzzFromTar with well-formed tars: each line of the input is
// an entry, its type, name and link target.
func FuzzEntries(f *testing.F) {
	f.Add("5 d\n0 d/f\n2 d/l ../d\n0 d/l/x\n1 h d/f\n1 lower low\n0 .wh.gone\n0 e/.wh..wh..opq\n3 c\n2 x x\n0 x/y")
	f.Add("0 d\n5 d\n0 .wh.d\n5 .wh.d/x\n1 d low\n1 low low\n2 low d")
	f.Fuzz(func(t *testing.T, text string) {
		var headers []tar.Header
		for line := range strings.SplitSeq(text, "\n") {
			fields := strings.SplitN(line, " ", 3)
			if len(fields) < 2 || len(fields[0]) != 1 || strings.Contains(line, "\x00") {
				continue
			}
			h := tar.Header{Typeflag: fields[0][0], Name: fields[1], Format: tar.FormatPAX}
			if len(fields) == 3 {
				h.Linkname = fields[2]
			}
			if err := tar.NewWriter(io.Discard).WriteHeader(&h); err == nil {
				headers = append(headers, h)
			}
		}
		checkLayer(t, tarOf(t, headers...))
	})
}

// checkLayer unpacks a layer and merges it with a lower one.
func checkLayer(t *testing.T, data []byte) {
	limits := Limits{Metadata: 1 << 20, Content: 1 << 22}
	upper, err := unpack(t, data, limits)
	if err != nil {
		if !errors.Is(err, ErrInvalid) {
			t.Fatalf("error %v does not match ErrInvalid", err)
		}
		return
	}
	lower, err := unpack(t, tarOf(t, tar.Header{Name: "low"}, tar.Header{Name: "d/f"}, tar.Header{Name: "gone"}), limits)
	if err != nil {
		t.Fatal(err)
	}
	root, err := Merge([]*erofs.Node{lower, upper})
	if err == nil && !Final(root) {
		t.Fatal("marks are left in a merged tree")
	}
}
