//go:build integration

package library

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	ociregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"atoll.dev/atoll/internal/storage/diskimage"
)

// layer is a tar of files.
func layer(t *testing.T, files map[string][]byte) v1.Layer {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, b := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(out.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestOCI: disks come from layers of images and from artifacts, over a connection that breaks once for each blob, from
// a registry that refuses ranges without an end.
func TestOCI(t *testing.T) {
	good := content(t, source(t))
	var broken sync.Map
	inner := ociregistry.New(ociregistry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			if _, again := broken.LoadOrStore(r.URL.Path, true); !again {
				w = &cutting{ResponseWriter: w, left: 100, sent: &atomic.Int64{}}
			}
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	push := func(tag string, base v1.Image, adds ...mutate.Addendum) string {
		t.Helper()
		image, err := mutate.Append(base, adds...)
		if err != nil {
			t.Fatal(err)
		}
		ref, err := name.ParseReference(host + "/disks/test:" + tag)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, image); err != nil {
			t.Fatal(err)
		}
		return ref.String()
	}
	disk := mutate.Addendum{Layer: layer(t, map[string][]byte{"disk/debian.qcow2": good})}
	other := mutate.Addendum{Layer: layer(t, map[string][]byte{"etc/hello": []byte("hello"), "disk/.wh.x": nil})}
	containerDisk := push("image", empty.Image, disk, other)
	artifact := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.example.disk")
	blob := static.NewLayer(good, "application/vnd.example.qcow2")
	plain := push("artifact", artifact, mutate.Addendum{Layer: blob, Annotations: map[string]string{titleAnnotation: "x.qcow2"}, MediaType: "application/vnd.example.qcow2"})
	none := push("none", empty.Image, other)

	for ref, file := range map[string]string{containerDisk: "debian.qcow2", "oci://" + plain: "x.qcow2"} {
		l := newLibrary(t)
		var i Item
		for try := 0; ; try++ {
			var err error
			if i, err = l.Fetch(t.Context(), "item", Source{OCI: &OCI{Reference: ref}}, nil); err == nil {
				break
			}
			if try == 3 || Permanent(err) {
				t.Fatalf("%s: %v", ref, err)
			}
		}
		if i.FileName != file || i.Disks[0].Info.Format != diskimage.QCOW2 || i.SHA256 != sha(good).Value {
			t.Errorf("%+v", i)
		}
		holds(t, l, "item", 0)
	}
	l := newLibrary(t)
	for ref, text := range map[string]string{none: "no file below /disk", host + "/disks/test:gone": "gone", "NOT A REF": "reference"} {
		if _, err := l.Fetch(t.Context(), "bad", Source{OCI: &OCI{Reference: ref}}, nil); !errors.Is(err, ErrSource) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", ref, err)
		}
	}
}
