//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// The account of the registry.
const registryUser, registryPassword = "puller", "open sesame"

// registry serves images on this host to whoever knows the password. It is read-only.
type registry struct {
	t     *testing.T
	host  string            // address and port
	blobs map[string][]byte // by digest; configurations and manifests too
	tags  map[string]string // digest by repository:tag
	base  manifest          // of an image for this host
}

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int    `json:"size"`
}

type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        descriptor   `json:"config"`
	Layers        []descriptor `json:"layers"`
}

// newRegistry starts a registry with the layers of the busybox image and no name for them.
func newRegistry(t *testing.T) *registry {
	t.Helper()
	r := &registry{t: t, blobs: map[string][]byte{}, tags: map[string]string{}}
	archive, err := os.Open(filepath.Join("..", "..", "build", "images", "busybox.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	var index struct{ Manifests []descriptor }
	for in := tar.NewReader(archive); ; {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		r.add(b)
		if header.Name == "index.json" {
			r.decode(b, &index)
		}
	}
	r.decode(r.blobs[index.Manifests[0].Digest], &r.base)
	server := httptest.NewServer(r)
	t.Cleanup(server.Close)
	r.host = strings.TrimPrefix(server.URL, "http://")
	return r
}

// image is what an image has other than the base.
type image struct {
	arch    string            // "" for that of the base
	volumes []string          // that the image declares
	files   map[string]string // programs, by path
}

// push names an image and returns its digest. Nobody else has an image of the same configuration, so
// the node can forget it after the test.
func (r *registry) push(name string, i image) (digest string) {
	r.t.Helper()
	var config struct {
		Architecture string         `json:"architecture"`
		OS           string         `json:"os"`
		Author       string         `json:"author"`
		Config       map[string]any `json:"config"`
		RootFS       struct {
			Type    string   `json:"type"`
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	r.decode(r.blobs[r.base.Config.Digest], &config)
	config.Author = r.host
	config.Architecture = cmp.Or(i.arch, config.Architecture)
	volumes := map[string]struct{}{}
	for _, v := range i.volumes {
		volumes[v] = struct{}{}
	}
	config.Config = map[string]any{"Volumes": volumes}
	layer := r.layer(i.files)
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, layer.Digest)
	m := r.base
	m.Layers = append(slices.Clone(m.Layers), layer)
	b := r.encode(config)
	m.Config.Digest, m.Config.Size = r.add(b), len(b)
	r.tags[name] = r.add(r.encode(m))
	r.t.Cleanup(func() {
		// It is not there when it was never pulled.
		_ = exec.Command(suite.atoll, "image", "rm", "--data-dir", suite.dataDir, r.host+"/"+name).Run()
	})
	return r.tags[name]
}

// pushIndex names a list with one image of another architecture.
func (r *registry) pushIndex(name, arch, digest string) {
	r.t.Helper()
	index := map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []any{map[string]any{
		"mediaType": r.base.MediaType, "digest": digest, "size": len(r.blobs[digest]), "platform": map[string]any{"os": "linux", "architecture": arch},
	}}}
	r.tags[name] = r.add(r.encode(index))
}

// layer makes an uncompressed layer.
func (r *registry) layer(files map[string]string) descriptor {
	r.t.Helper()
	var b bytes.Buffer
	out := tar.NewWriter(&b)
	for name, text := range files {
		if err := out.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text))}); err != nil {
			r.t.Fatal(err)
		}
		if _, err := io.WriteString(out, text); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := out.Close(); err != nil {
		r.t.Fatal(err)
	}
	return descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: r.add(b.Bytes()), Size: b.Len()}
}

func (r *registry) add(b []byte) (digest string) {
	sum := sha256.Sum256(b)
	digest = "sha256:" + hex.EncodeToString(sum[:])
	r.blobs[digest] = b
	return digest
}

func (r *registry) decode(b []byte, into any) {
	r.t.Helper()
	if err := json.Unmarshal(b, into); err != nil {
		r.t.Fatal(err)
	}
}

func (r *registry) encode(v any) []byte {
	r.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// ServeHTTP answers GET and HEAD of /v2/REPOSITORY/{blobs,manifests}/{TAG,DIGEST}.
func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if user, password, _ := req.BasicAuth(); user != registryUser || password != registryPassword {
		w.Header().Set("WWW-Authenticate", `Basic realm="e2e"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	digest := path.Base(req.URL.Path)
	repository, kind := path.Split(path.Dir(strings.TrimPrefix(req.URL.Path, "/v2/")))
	if kind == "manifests" && !strings.HasPrefix(digest, "sha256:") {
		digest = r.tags[strings.TrimSuffix(repository, "/")+":"+digest]
	}
	b, ok := r.blobs[digest]
	if !ok {
		http.NotFound(w, req)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if kind == "manifests" {
		var m manifest
		r.decode(b, &m)
		w.Header().Set("Content-Type", m.MediaType)
	}
	w.Header().Set("Docker-Content-Digest", digest)
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(b))
}
