//go:build integration

package containerd

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimespec "github.com/opencontainers/runtime-spec/specs-go"

	"atoll.dev/atoll/internal/storage/layers"
)

type testImage struct {
	Names        []string
	Layers       [][]byte
	Entrypoint   []string
	Architecture string
}

func layerTar(t *testing.T, files, links map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	put := func(h *tar.Header, content string) {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		put(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(files[name]))}, files[name])
	}
	for _, name := range slices.Sorted(maps.Keys(links)) {
		put(&tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: links[name]}, "")
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// writeArchive writes an OCI archive.
func writeArchive(t *testing.T, path string, img testImage) {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	put := func(name string, b []byte) {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(mediaType string, b []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		put("blobs/sha256/"+d.Digest.Encoded(), b)
		return d
	}
	asJSON := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	put("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	if img.Architecture == "" {
		img.Architecture = "amd64"
	}
	config := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: img.Architecture},
		Config:   ocispec.ImageConfig{Entrypoint: img.Entrypoint}, RootFS: ocispec.RootFS{Type: "layers"},
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range img.Layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
		m.Layers = append(m.Layers, blob(ocispec.MediaTypeImageLayer, l))
	}
	m.Config = blob(ocispec.MediaTypeImageConfig, asJSON(config))
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	desc := blob(ocispec.MediaTypeImageManifest, asJSON(m))
	for _, name := range img.Names {
		d := desc
		d.Annotations = map[string]string{"io.containerd.image.name": name, ocispec.AnnotationRefName: "latest"}
		index.Manifests = append(index.Manifests, d)
	}
	put("index.json", asJSON(index))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// createAsCRI prepares a container's snapshot and its spec with a user by
// name, the way the CRI plugin does.
func createAsCRI(ctx context.Context, cl *client.Client, img client.Image, user string) (*runtimespec.Spec, *containers.Container, error) {
	c := &containers.Container{ID: strings.Repeat("ab", 32), Snapshotter: layers.Name}
	if err := client.WithNewSnapshot(c.ID, img)(ctx, cl, c); err != nil {
		return nil, nil, err
	}
	spec, err := oci.GenerateSpec(ctx, cl, c, oci.WithUser(user), oci.WithAdditionalGIDs(user))
	return spec, c, err
}

// syncBuffer collects logs of several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
