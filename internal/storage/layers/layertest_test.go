package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An entry is one tar entry with defaults for what a test does not care about.
type entry struct {
	name    string
	typ     byte // tar.TypeReg unless set
	content string
	link    string
	mode    int64 // 0644, or 0755 for directories
	uid     int
	mtime   time.Time
	xattrs  map[string]string
	major   int64
	minor   int64
}

// at is the modification time of entries that set none.
var at = time.Unix(1_700_000_000, 123456789)

func layerTar(t testing.TB, entries []entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{
			Name: e.name, Typeflag: e.typ, Linkname: e.link, Mode: e.mode, Uid: e.uid, Gid: e.uid,
			ModTime: e.mtime, Size: int64(len(e.content)), Devmajor: e.major, Devminor: e.minor,
			Format: tar.FormatPAX,
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(e.name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if h.ModTime.IsZero() {
			h.ModTime = at
		}
		for k, v := range e.xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("entry %q: %v", e.name, err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatalf("entry %q: %v", e.name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// A bench is a snapshotter and a differ over a fresh directory.
type bench struct {
	root   string
	store  content.Store
	sn     *Snapshotter
	differ *Differ
}

func newBench(t testing.TB) *bench {
	t.Helper()
	dir := t.TempDir()
	store, err := local.NewStore(dir + "/content")
	if err != nil {
		t.Fatal(err)
	}
	sn, err := New(Config{Root: dir + "/atoll"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sn.Close() })
	return &bench{dir + "/atoll", store, sn, NewDiffer(store)}
}

func (b *bench) blob(t testing.TB, data []byte) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
	err := content.WriteBlob(t.Context(), b.store, desc.Digest.String(), bytes.NewReader(data), desc)
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

// unpack does what containerd does for one layer and returns the committed
// name.
func (b *bench) unpack(ctx context.Context, t testing.TB, name, parent string, desc ocispec.Descriptor) error {
	t.Helper()
	key := "k8s.io/1/" + snapshots.UnpackKeyPrefix + "-1 " + chainID(name)
	mounts, err := b.sn.Prepare(ctx, key, parent)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.differ.Apply(ctx, desc, mounts); err != nil {
		if err := b.sn.Remove(ctx, key); err != nil {
			t.Fatal(err)
		}
		return err
	}
	return b.sn.Commit(ctx, name, key)
}

// image unpacks layers, lowest first, and returns the name of the chain.
func (b *bench) image(t testing.TB, layers ...[]byte) string {
	t.Helper()
	parent := ""
	for _, l := range layers {
		desc := b.blob(t, l)
		name := "k8s.io/2/" + digest.FromString(parent+desc.Digest.String()).String()
		if _, err := b.sn.Stat(t.Context(), name); err == nil {
			parent = name
			continue
		}
		if err := b.unpack(t.Context(), t, name, parent, desc); err != nil {
			t.Fatal(err)
		}
		parent = name
	}
	return parent
}

// container prepares a container snapshot and returns its mount.
func (b *bench) container(t testing.TB, key, parent string) mount.Mount {
	t.Helper()
	mounts, err := b.sn.Prepare(t.Context(), key, parent)
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) != 1 {
		t.Fatalf("got %d mounts, want 1: %v", len(mounts), mounts)
	}
	return mounts[0]
}
