package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
)

func emptyTree(t *testing.T) *tree {
	t.Helper()
	tr, err := newTree(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tr.close() })
	return tr
}

func mustPut(t *testing.T, tr *tree, entries ...string) {
	t.Helper()
	for _, entry := range entries {
		var err error
		switch name, target, isLink := strings.Cut(entry, " -> "); {
		case isLink:
			err = tr.put(name, &node{kind: tar.TypeSymlink, mode: 0o777, target: target, modTime: fixedTime})
		case strings.HasSuffix(entry, "/"):
			err = tr.put(entry, &node{kind: tar.TypeDir, mode: 0o755, modTime: fixedTime})
		default:
			err = tr.putBytes(entry, []byte("content of "+entry), 0o644)
		}
		if err != nil {
			t.Fatalf("%s: %v", entry, err)
		}
	}
}

// listing writes the tree as a layer and reads it back, one line per entry.
func listing(t *testing.T, tr *tree) []string {
	t.Helper()
	var layer bytes.Buffer
	if err := tr.writeTar(&layer); err != nil {
		t.Fatal(err)
	}
	var lines []string
	reader := tar.NewReader(&layer)
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(reader)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("%c %o %s%s %s", header.Typeflag, header.Mode, header.Name, header.Linkname, content))
	}
}

func TestLayerIsSortedAndComplete(t *testing.T) {
	tr := emptyTree(t)
	mustPut(t, tr, "/z", "/a/b/c", "/a-b", "/l -> a/b")
	want := []string{
		"5 755 a/ ",
		"0 644 a-b content of /a-b",
		"5 755 a/b/ ",
		"0 644 a/b/c content of /a/b/c",
		"2 777 la/b ",
		"0 644 z content of /z",
	}
	if got := listing(t, tr); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestPathsFollowLinksOfTheTree(t *testing.T) {
	tr := emptyTree(t)
	mustPut(t, tr, "/usr/bin/", "/bin -> usr/bin", "/var/run -> /run", "/out -> ../../../etc", "/bin/sh", "/var/run/pid", "/out/x", "/bin/")
	for _, name := range []string{"usr/bin/sh", "run/pid", "etc/x"} {
		if _, ok := tr.nodes[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
	if tr.nodes["bin"].kind != tar.TypeSymlink {
		t.Error("a directory replaced the link to a directory")
	}
}

func TestTreeRefuses(t *testing.T) {
	tr := emptyTree(t)
	mustPut(t, tr, "/file", "/dir/", "/loop -> loop", "/a -> b", "/b -> a")
	for name, want := range map[string]string{
		"/file/x": "not a directory",
		"/loop/x": "too many symbolic links",
		"/a/x":    "too many symbolic links",
		"/dir":    "is a directory already",
		"/":       "root of the image",
	} {
		if err := tr.putBytes(name, nil, 0o644); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", name, err, want)
		}
	}
}

func TestContentIsBounded(t *testing.T) {
	tr := emptyTree(t)
	tr.limit = 10
	if err := tr.putBytes("/a", []byte("0123456789"), 0o644); err != nil {
		t.Error(err)
	}
	if err := tr.putBytes("/b", []byte("x"), 0o644); err == nil || !strings.Contains(err.Error(), "more than 10 bytes") {
		t.Errorf("got %v", err)
	}
}

func TestHardLinksStayHardLinks(t *testing.T) {
	var source bytes.Buffer
	tw := tar.NewWriter(&source)
	for _, header := range []*tar.Header{
		{Typeflag: tar.TypeReg, Name: "./usr/z", Mode: 0o4755, Size: 3, Uid: 5},
		{Typeflag: tar.TypeLink, Name: "./usr/a", Linkname: "./usr/z"},
	} {
		if err := tw.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if header.Size > 0 {
			if _, err := tw.Write([]byte("abc")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	tr := emptyTree(t)
	if err := tr.addTar(&source); err != nil {
		t.Fatal(err)
	}
	want := []string{"5 755 usr/ ", "0 4755 usr/a abc", "1 4755 usr/zusr/a "}
	if got := listing(t, tr); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestRemoveTakesWhatIsBelow(t *testing.T) {
	tr := emptyTree(t)
	mustPut(t, tr, "/usr/share/locale/de/x", "/usr/share/locale/fr/y", "/usr/share/locale.alias", "/usr/lib/z")
	if got := tr.remove("/usr/share/locale/*"); got != 4 {
		t.Errorf("removed %d paths, want 4", got)
	}
	if _, ok := tr.nodes["usr/share/locale"]; !ok {
		t.Error("the parent is gone")
	}
	if got := tr.remove("/nothing/*"); got != 0 {
		t.Errorf("removed %d paths, want none", got)
	}
}

func FuzzAddTar(f *testing.F) {
	var seed bytes.Buffer
	tw := tar.NewWriter(&seed)
	_ = tw.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "../b"})
	_ = tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "a/c"})
	_ = tw.Close()
	f.Add(seed.Bytes())
	tr, err := newTree(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = tr.close() })
	f.Fuzz(func(t *testing.T, data []byte) {
		tr.nodes, tr.end, tr.limit = map[string]*node{}, 0, 1<<20
		if tr.addTar(bytes.NewReader(data)) != nil {
			return
		}
		for key, n := range tr.nodes {
			if key == "" || strings.HasPrefix(key, "/") || slices.Contains(strings.Split(key, "/"), "..") {
				t.Errorf("path %q left the tree", key)
			}
			if n.kind == tar.TypeReg && n.offset+n.size > tr.end {
				t.Errorf("%q reaches beyond the spool", key)
			}
		}
	})
}
