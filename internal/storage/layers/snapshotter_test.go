package layers

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/layers/changeset"
	"atoll.dev/atoll/internal/storage/layers/erofs"
)

func users(names string) []entry {
	return []entry{{name: "etc/"}, {name: "etc/passwd", content: names}, {name: "etc/group", content: "g:" + names}}
}

func readTree(t *testing.T, image string) *erofs.Node {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	root, err := loadTree(f)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// TestImages unpacks every case and reads the result back, which needs no
// root; the comparison with overlayfs is in the integration test.
func TestImages(t *testing.T) {
	for name, ls := range cases {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			var tars [][]byte
			for _, l := range ls {
				tars = append(tars, layerTar(t, l))
			}
			root := readTree(t, handover.ImagePath(b.container(t, "k8s.io/9/c", b.image(t, tars...)).Options))
			if !changeset.Final(root) {
				t.Error("the image holds marks of layers")
			}
		})
	}
}

func TestContainerMounts(t *testing.T) {
	b := newBench(t)
	one := b.image(t, layerTar(t, users("one")))
	two := b.image(t, layerTar(t, users("one")), layerTar(t, users("two")))
	linked := b.image(t, layerTar(t, []entry{
		{name: "etc/"},
		{name: "etc/passwd", typ: tar.TypeSymlink, link: "/usr/share/users"},
		{name: "usr/"},
		{name: "usr/share/"},
		{name: "usr/share/users", content: "linked"},
		{name: "etc/group/"},
	}))
	none := b.image(t, layerTar(t, []entry{{name: "x"}}))
	for i, tt := range []struct{ parent, file, passwd, group string }{
		{one, layerFile, "one", "g:one"},
		{two, imageFile, "two", "g:two"},
		{linked, layerFile, "linked", ""},
		{none, layerFile, "", ""},
		{"", "empty.erofs", "", ""},
	} {
		m := b.container(t, fmt.Sprintf("k8s.io/9/c%d", i), tt.parent)
		if m.Type != "bind" || filepath.Base(m.Source) != "meta" || m.Options[0] != "rbind" || m.Options[1] != "ro" {
			t.Errorf("case %d: mount %v", i, m)
		}
		if image := handover.ImagePath(m.Options); filepath.Base(image) != tt.file || !exists(image) {
			t.Errorf("case %d: image %q, want a %s", i, image, tt.file)
		}
		for name, want := range map[string]string{"passwd": tt.passwd, "group": tt.group} {
			got, err := os.ReadFile(filepath.Join(m.Source, "etc", name))
			if string(got) != want || want != "" && err != nil {
				t.Errorf("case %d: %s is %q, %v; want %q", i, name, got, err, want)
			}
		}
		again, err := b.sn.Mounts(t.Context(), fmt.Sprintf("k8s.io/9/c%d", i))
		if err != nil || fmt.Sprint(again) != fmt.Sprint([]mount.Mount{m}) {
			t.Errorf("case %d: Mounts gives %v, %v after %v", i, again, err, m)
		}
	}
}

// TestMergeReuse: an image below that is merged already stands for its layers.
func TestMergeReuse(t *testing.T) {
	b := newBench(t)
	tars := [][]byte{layerTar(t, users("a")), layerTar(t, users("b")), layerTar(t, []entry{{name: "top", content: "x"}})}
	lower, upper := b.image(t, tars[:2]...), b.image(t, tars...)
	b.container(t, "k8s.io/9/lower", lower)
	c, err := b.sn.chain(t.Context(), upper)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(b.sn.path(c.ids[2], layerFile)); err != nil { // must not be needed
		t.Fatal(err)
	}
	root := readTree(t, handover.ImagePath(b.container(t, "k8s.io/9/upper", upper).Options))
	for path, want := range map[string]string{"etc/passwd": "b", "top": "x"} {
		got, err := erofs.Lookup(root, path, true).ReadAll(100)
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", path, got, err, want)
		}
	}
}

func TestView(t *testing.T) {
	b := newBench(t)
	mounts, err := b.sn.View(t.Context(), "k8s.io/9/v", b.image(t, layerTar(t, users("v"))))
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) != 1 || mounts[0].Type != "erofs" || filepath.Base(mounts[0].Source) != layerFile || fmt.Sprint(mounts[0].Options) != "[ro loop]" {
		t.Errorf("got %v", mounts)
	}
}

func TestUsage(t *testing.T) {
	b := newBench(t)
	name := b.image(t, layerTar(t, []entry{{name: "big", content: repeat(100000)}}))
	u, err := b.sn.Usage(t.Context(), name)
	if err != nil || u.Size < 100000 || u.Inodes < 1 {
		t.Errorf("committed: %v, %v", u, err)
	}
	m := b.container(t, "k8s.io/9/c", name)
	file := handover.LayerUsage(m.Source)
	for _, tt := range []struct {
		content string
		want    snapshots.Usage
		bad     bool
	}{
		{"", snapshots.Usage{}, false},
		{`{"bytes":12345,"inodes":6}`, snapshots.Usage{Size: 12345, Inodes: 6}, false},
		{`{"bytes":-5}`, snapshots.Usage{}, false},
		{"{", snapshots.Usage{}, true},
		{strings.Repeat(" ", 10000), snapshots.Usage{}, true},
	} {
		if tt.content != "" {
			if err := os.WriteFile(file, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if u, err := b.sn.Usage(t.Context(), "k8s.io/9/c"); u != tt.want || (err != nil) != tt.bad {
			t.Errorf("usage file %.20q: got %v, %v", tt.content, u, err)
		}
	}
}

func TestConcurrentFirstUse(t *testing.T) {
	b := newBench(t)
	name := b.image(t, layerTar(t, manyFiles(2000)), layerTar(t, users("u")))
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if i%3 == 0 {
				cancel() // must not spoil it for the others
			}
			_, err := b.sn.Prepare(ctx, fmt.Sprintf("k8s.io/9/c%d", i), name)
			if i%3 != 0 && err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	c, err := b.sn.chain(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(b.sn.path(c.ids[0], "*"+newSuffix)); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestRemoveAndCleanup(t *testing.T) {
	b := newBench(t)
	name := b.image(t, layerTar(t, users("a")), layerTar(t, users("b")))
	b.container(t, "k8s.io/9/c", name)
	if err := b.sn.Remove(t.Context(), name); err == nil {
		t.Error("removed an image in use")
	}
	dirs := filepath.Join(b.root, "snapshots")
	if err := os.MkdirAll(filepath.Join(dirs, "999", "meta"), 0o755); err != nil { // as if left by a crash
		t.Fatal(err)
	}
	c, err := b.sn.chain(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	lower, err := b.sn.Stat(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.sn.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exists(filepath.Join(dirs, "999")) || !exists(b.sn.imagePath(c.ids[0])) {
		t.Error("Cleanup removed the wrong directories")
	}
	for _, key := range []string{"k8s.io/9/c", name, lower.Parent} {
		if err := b.sn.Remove(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(dirs); len(left) != 0 {
		t.Errorf("directories left: %v", left)
	}
	if _, err := b.sn.Prepare(t.Context(), "k8s.io/9/d", name); !errdefs.IsNotFound(err) {
		t.Errorf("container of a removed image: got %v, want not found", err)
	}
}

// TestLeftovers: what a crash leaves in a directory is no obstacle.
func TestLeftovers(t *testing.T) {
	b := newBench(t)
	name := b.image(t, layerTar(t, users("a")), layerTar(t, users("b")))
	c, err := b.sn.chain(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{imageFile + newSuffix, etcDir + newSuffix + "/passwd"} {
		path := b.sn.path(c.ids[0], n)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("half written"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The directory of the next snapshot, from a transaction that was lost.
	if err := os.MkdirAll(b.sn.path("3", "meta", "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	m := b.container(t, "k8s.io/9/c", name)
	if got, _ := os.ReadFile(filepath.Join(m.Source, "etc/passwd")); string(got) != "b" {
		t.Errorf("passwd is %q", got)
	}
	if erofs.Lookup(readTree(t, handover.ImagePath(m.Options)), "etc/group", false) == nil {
		t.Error("the image is incomplete")
	}
}

func TestReopen(t *testing.T) {
	b := newBench(t)
	name := b.image(t, layerTar(t, users("a")), layerTar(t, users("b")))
	m := b.container(t, "k8s.io/9/c", name)
	if err := b.sn.Close(); err != nil {
		t.Fatal(err)
	}
	sn, err := New(Config{Root: b.root})
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	got, err := sn.Mounts(t.Context(), "k8s.io/9/c")
	if err != nil || fmt.Sprint(got) != fmt.Sprint([]mount.Mount{m}) {
		t.Errorf("got %v, %v; want %v", got, err, m)
	}
}

// TestHalfUnpacked: a layer being unpacked when the process dies takes no space
// after the next start, and cannot be committed.
func TestHalfUnpacked(t *testing.T) {
	b := newBench(t)
	key := "k8s.io/1/extract-1 x"
	mounts, err := b.sn.Prepare(t.Context(), key, "")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(mounts[0].Source, layerFile)
	for _, f := range []string{file, file + newSuffix} {
		if err := os.WriteFile(f, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.sn.Close()
	sn, err := New(Config{Root: b.root})
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	if exists(file) || exists(file+newSuffix) {
		t.Error("the files are still there")
	}
	if err := sn.Commit(t.Context(), "k8s.io/2/x", key); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit: got %v", err)
	}
	if err := sn.Remove(t.Context(), key); err != nil {
		t.Error(err)
	}
}

// TestImageVolume: the CRI plugin mounts an image that is a volume itself.
func TestImageVolume(t *testing.T) {
	b := newBench(t)
	m := b.container(t, "k8s.io/9//run/io.containerd.grpc.v1.cri/image-volumes/pod/abc", b.image(t, layerTar(t, users("v"))))
	if m.Type != "erofs" || !exists(m.Source) {
		t.Errorf("got %v", m)
	}
}

func TestCommitOfContainer(t *testing.T) {
	b := newBench(t)
	b.container(t, "k8s.io/9/c", b.image(t, layerTar(t, users("a"))))
	if err := b.sn.Commit(t.Context(), "x", "k8s.io/9/c"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v", err)
	}
}

func TestApply(t *testing.T) {
	b := newBench(t)
	plain := layerTar(t, users("a"))
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(plain)
	z.Close()
	apply := func(desc ocispec.Descriptor, key string) (ocispec.Descriptor, string, error) {
		mounts, err := b.sn.Prepare(t.Context(), "k8s.io/1/extract-"+key, "")
		if err != nil {
			t.Fatal(err)
		}
		d, err := b.differ.Apply(t.Context(), desc, mounts)
		return d, mounts[0].Source, err
	}
	gz := b.blob(t, zipped.Bytes())
	gz.MediaType = ocispec.MediaTypeImageLayerGzip
	// As some builders do: padding after the end of the archive counts.
	padded := append(bytes.Clone(plain), make([]byte, 20000)...)
	for name, tt := range map[string]struct {
		desc ocispec.Descriptor
		want []byte
	}{"plain": {b.blob(t, plain), plain}, "gzip": {gz, plain}, "padded": {b.blob(t, padded), padded}} {
		d, _, err := apply(tt.desc, name)
		if err != nil || d.Digest != digest.FromBytes(tt.want) || d.Size != int64(len(tt.want)) || d.MediaType != ocispec.MediaTypeImageLayer {
			t.Errorf("%s: got %v, %v", name, d, err)
		}
	}
	_, dir, err := apply(b.blob(t, []byte(strings.Repeat("no tar", 1000))), "bad")
	if !errors.Is(err, changeset.ErrInvalid) || !strings.Contains(err.Error(), "sha256:") {
		t.Errorf("bad layer: got %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("bad layer left %v", left)
	}
	short := b.blob(t, zipped.Bytes()[:zipped.Len()/2])
	short.MediaType = ocispec.MediaTypeImageLayerGzip
	if _, _, err := apply(short, "short"); err == nil {
		t.Error("a layer cut short was accepted")
	}
	strange := b.blob(t, plain)
	strange.MediaType = "application/vnd.example.layer"
	if _, _, err := apply(strange, "strange"); err == nil || errdefs.IsNotImplemented(err) {
		t.Errorf("unknown media type: got %v", err)
	}
	_, err = b.differ.Apply(t.Context(), gz, []mount.Mount{{Type: "overlay"}})
	if !errdefs.IsNotImplemented(err) {
		t.Errorf("mounts of another snapshotter: got %v", err)
	}
}
