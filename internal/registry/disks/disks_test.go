package disks

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/registry/store"
)

// fakeStore is a project shop with one repository.
type fakeStore struct {
	t         *testing.T
	tags      []store.Tag
	manifests map[string]*store.Manifest
	blobs     map[string][]byte
	broken    error
	reads     int
}

func (f *fakeStore) Repositories(project string) ([]store.Repository, error) {
	return []store.Repository{{Name: project + "/web", Tags: f.tags}}, nil
}

func (f *fakeStore) Manifest(_, digest string) (*store.Manifest, int64, error) {
	f.reads++
	m, ok := f.manifests[digest]
	if !ok {
		return nil, 0, &fs.PathError{Op: "stat", Path: digest, Err: fs.ErrNotExist}
	}
	return m, 1, f.broken
}

func (f *fakeStore) Blob(_, digest string) (*os.File, error) {
	path := filepath.Join(f.t.TempDir(), "blob")
	if err := os.WriteFile(path, f.blobs[digest], 0o600); err != nil {
		return nil, err
	}
	return os.Open(path)
}

const (
	ociConfig    = "application/vnd.oci.image.config.v1+json"
	dockerConfig = "application/vnd.docker.container.image.v1+json"
	titled       = "org.opencontainers.image.title"
)

// layer is a tar of files; names that end in / are directories.
func layer(t *testing.T, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range names {
		h := &tar.Header{Name: name, Mode: 0o644, Size: 3, Typeflag: tar.TypeReg}
		if strings.HasSuffix(name, "/") {
			h.Size, h.Typeflag = 0, tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte("abc")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstandard(t *testing.T, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

// image is the manifest of an image of layers.
func image(config string, layers ...string) *store.Manifest {
	m := &store.Manifest{Config: &store.Descriptor{MediaType: config}}
	for _, l := range layers {
		m.Layers = append(m.Layers, store.Descriptor{Digest: l})
	}
	return m
}

func artifact(titles ...string) *store.Manifest {
	m := &store.Manifest{ArtifactType: "application/x", Config: &store.Descriptor{MediaType: "application/vnd.oci.empty.v1+json"}}
	for _, title := range titles {
		m.Layers = append(m.Layers, store.Descriptor{Annotations: map[string]string{titled: title}})
	}
	return m
}

func TestFind(t *testing.T) {
	f := &fakeStore{t: t, blobs: map[string][]byte{
		"plain": layer(t, "disk/", "disk/.hidden", "disk/a.qcow2"), "gzip": gzipped(t, layer(t, "./disk/a.img")), "zstd": zstandard(t, layer(t, "disk/a.img")),
		"app": layer(t, "bin/", "bin/sh", "disk/a.img"), "none": nil, "junk": []byte("\x1f\x8bjunk"), "deep": layer(t, "disk/deep/a.img"),
	}, manifests: map[string]*store.Manifest{
		"d-plain": image(ociConfig, "plain"), "d-gzip": image(dockerConfig, "app", "gzip"), "d-zstd": image(ociConfig, "zstd"),
		"d-app": image(ociConfig, "app"), "d-none": image(ociConfig, "none"), "d-junk": image(ociConfig, "junk"), "d-deep": image(ociConfig, "deep"),
		"d-below":    image(ociConfig, "plain", "app", "app", "app", "app"),
		"d-artifact": artifact("notes.txt", "Disk.QCOW2.zst"), "d-two": artifact("a.img", "b.img"), "d-text": artifact("a.txt.gz"), "d-empty": {},
		"d-index": {Manifests: []store.Descriptor{
			{Digest: "d-app", Platform: &store.Platform{OS: "linux", Architecture: "none"}}, {Digest: "d-plain", Platform: &store.Platform{OS: "linux", Architecture: runtime.GOARCH}},
		}},
		"d-other": {Manifests: []store.Descriptor{{Digest: "d-plain", Platform: &store.Platform{OS: "linux", Architecture: "none"}}}},
		"d-loop":  {Manifests: []store.Descriptor{{Digest: "d-loop"}}},
	}}
	f.manifests["d-plain"].Annotations = map[string]string{api.ManifestFirmware: "efi", api.ManifestOSType: "debian12_64Guest", api.ManifestOSID: "a\nb"}
	f.manifests["d-gzip"].Annotations = map[string]string{api.ManifestFirmware: "pxe"}
	for digest := range f.manifests {
		f.tags = append(f.tags, store.Tag{Name: strings.TrimPrefix(digest, "d-"), Digest: digest})
	}
	f.tags = append(f.tags, store.Tag{Name: "gone", Digest: "d-gone"})
	finder := NewFinder(f)
	for range 2 {
		got, _, err := finder.Find(t.Context(), "shop")
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, d := range got {
			if d.Repository != "web" || d.Digest != "d-"+d.Tag {
				t.Errorf("%+v", d)
			}
			names = append(names, d.Tag)
		}
		if fmt.Sprint(names) != "[artifact gzip index plain zstd]" {
			t.Errorf("disks are %v", names)
		}
		if d := got[3]; d.Firmware != "efi" || d.OSType != "debian12_64Guest" || d.OSID != "" || got[1].Firmware != "" {
			t.Errorf("%+v", got)
		}
	}
	before := f.reads
	if _, _, err := finder.Find(t.Context(), "shop"); err != nil || f.reads != before+1 { // only what was not there is looked for again
		t.Errorf("%d reads, %v", f.reads-before, err)
	}
	f.broken = &fs.PathError{Op: "read", Path: "x", Err: errors.New("I/O error")}
	if _, _, err := NewFinder(f).Find(t.Context(), "shop"); err == nil {
		t.Error("a disk that fails went unnoticed")
	}
}

// TestMany: of very many tags the newest are looked at, and others who have as many do not have them read again.
func TestMany(t *testing.T) {
	f := &fakeStore{t: t, manifests: map[string]*store.Manifest{}}
	finder := NewFinder(f)
	fill := func(who string, n int) {
		f.tags = nil
		for i := range n {
			digest := fmt.Sprintf("%s-%d", who, i)
			f.manifests[digest] = artifact("a.img")
			f.tags = append(f.tags, store.Tag{Name: digest, Digest: digest, Pushed: time.Unix(int64(i), 0)})
		}
	}
	find := func() []Disk {
		got, unseen, err := finder.Find(t.Context(), "shop")
		if err != nil || len(got)+unseen != len(f.tags) {
			t.Fatalf("%d disks, %d unseen, %v", len(got), unseen, err)
		}
		return got
	}
	for _, other := range []string{"a", "b", "c", "d", "e", "f"} {
		fill("small", 3)
		find()
		fill(other, maxTags+100)
		for _, d := range find() {
			if d.Pushed.Unix() < 100 {
				t.Fatalf("an old one: %+v", d)
			}
		}
	}
	fill("small", 3)
	if before := f.reads; len(find()) != 3 || f.reads != before {
		t.Errorf("%d were read again", f.reads-before)
	}
	if len(finder.known) > maxKnown || finder.used.Len() != len(finder.known) {
		t.Errorf("%d are remembered", len(finder.known))
	}
}

// FuzzLayer: whatever a layer is, looking at it ends.
func FuzzLayer(f *testing.F) {
	f.Add([]byte("\x1f\x8b"))
	f.Add([]byte("\x28\xb5\x2f\xfd\x00"))
	f.Add(bytes.Repeat([]byte{0}, 2048))
	f.Fuzz(func(t *testing.T, b []byte) {
		found, err := hasDisk(bytes.NewReader(b))
		if found && err != nil {
			t.Error(err)
		}
	})
}
