//go:build integration

package containerd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"atoll.dev/atoll/internal/kube/containerd/images"
)

// testPull pulls by tag and by digest from a registry that wants a password
// and that only hosts.toml says how to reach.
func (b *daemonBench) testPull(t *testing.T) {
	const user, password = "puller", "secret"
	handler := registry.New()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	defer server.Close()
	digest := push(t, server.URL, "team/app", "1", user, password, b.base)

	const alias = "registry.example.com"
	conf := filepath.Join(b.config.RegistryDir, alias, "hosts.toml")
	if err := os.MkdirAll(filepath.Dir(conf), 0o700); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", server.URL, server.URL)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	auth := images.Auth{Username: user, Password: password}
	if _, err := b.images.Pull(t.Context(), alias+"/team/app:1", images.Auth{}); err == nil || !strings.Contains(err.Error(), "authorization") {
		t.Errorf("without the password: got %v", err)
	}
	for _, ref := range []string{alias + "/team/app:1", alias + "/team/app@" + digest} {
		i, err := b.images.Pull(t.Context(), ref, auth)
		if err != nil {
			t.Fatal(err)
		}
		if len(i.Names) != 2 && !strings.Contains(ref, "@") || !strings.Contains(strings.Join(i.Names, " "), digest) {
			t.Errorf("pulled %s: got names %v", ref, i.Names)
		}
	}
	b.owned(t, alias+"/team/app:1", true)
	b.owned(t, alias+"/team/app@"+digest, true)
	kubelet := func(name string) {
		t.Helper()
		_, err := cri.NewImageServiceClient(b.client.Conn().(*grpc.ClientConn)).PullImage(t.Context(), &cri.PullImageRequest{
			Image: &cri.ImageSpec{Image: alias + "/team/" + name}, Auth: &cri.AuthConfig{Username: user, Password: password},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// The same bytes under another name are the kubelet's, which changes nothing for the administrator's name, and nor does
	// pulling that again.
	push(t, server.URL, "team/own", "1", user, password, b.base)
	kubelet("own:1")
	b.owned(t, alias+"/team/own:1", false)
	kubelet("app:1")
	b.owned(t, alias+"/team/app:1", true)
	// Other bytes under the administrator's name are not the administrator's.
	push(t, server.URL, "team/app", "1", user, password, layerTar(t, map[string]string{"file": "other"}, nil))
	kubelet("app:1")
	b.owned(t, alias+"/team/app:1", false)
	b.owned(t, alias+"/team/app@"+digest, true)
	if _, err := b.images.Pull(t.Context(), alias+"/team/nothing:1", auth); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("missing image: got %v", err)
	}
}

// push puts an image of one layer into a registry, by HTTP, and returns its
// digest.
func push(t *testing.T, server, repo, tag, user, password string, layer []byte) string {
	t.Helper()
	send := func(method, path, mediaType string, body []byte) {
		req, err := http.NewRequestWithContext(t.Context(), method, server+"/v2/"+repo+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth(user, password)
		req.Header.Set("Content-Type", mediaType)
		r, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != http.StatusCreated {
			t.Fatalf("%s %s: %s", method, path, r.Status)
		}
	}
	blob := func(mediaType string, b []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		send(http.MethodPost, "/blobs/uploads/?digest="+d.Digest.String(), "application/octet-stream", b)
		return d
	}
	asJSON := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Layers: []ocispec.Descriptor{blob(ocispec.MediaTypeImageLayer, layer)},
		Config: blob(ocispec.MediaTypeImageConfig, asJSON(ocispec.Image{
			Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
			RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
		})),
	}
	b := asJSON(m)
	send(http.MethodPut, "/manifests/"+tag, m.MediaType, b)
	return digest.FromBytes(b).String()
}
