//go:build e2e

package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/stream"
)

// crane is the client of that name, as a library: the address of the cluster, its authority, a name and a password, and
// nothing else. It speaks HTTP/2 and asks for tokens by itself.
type crane struct {
	t    *testing.T
	opts []remote.Option
}

func newCrane(t *testing.T, user, password string) *crane {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(clusterCA(t)) {
		t.Fatal("no certificate of the authority")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &crane{t: t, opts: []remote.Option{
		remote.WithContext(t.Context()), remote.WithTransport(transport), remote.WithAuth(&authn.Basic{Username: user, Password: password}),
	}}
}

// ref is an image by the address of the cluster.
func ref(t *testing.T, image string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(nodeAddress(t) + "/" + image)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (c *crane) write(image string, img v1.Image) error {
	return remote.Write(ref(c.t, image), img, c.opts...)
}

func (c *crane) read(image string) (v1.Image, error) { return remote.Image(ref(c.t, image), c.opts...) }

// must is for what has to work.
func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// says wants an error in words that a person can do something with.
func says(t *testing.T, what string, err error, wants ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s worked", what)
		return
	}
	for _, w := range wants {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

// TestRegistryClient pushes, pulls, copies, lists, attaches, goes on and deletes.
func TestRegistryClient(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", "")
	c, viewer := newCrane(t, n.editor.name, n.editor.password), newCrane(t, n.viewer.name, n.viewer.password)
	img := runnable(t)
	digest := must(img.Digest())(t)
	if err := c.write(n.name+"/app:1", img); err != nil {
		t.Fatal(err)
	}
	if err := remote.Tag(ref(t, n.name+"/app:second").(name.Tag), img, c.opts...); err != nil {
		t.Fatal(err)
	}
	equal(t, "tags", strings.Join(must(remote.List(ref(t, n.name+"/app").Context(), c.opts...))(t), " "), "1 second")
	equal(t, "digest", must(must(viewer.read(n.name+"/app:1"))(t).Digest())(t).String(), digest.String())

	// To another repository, layers are mounted; an index of two images.
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: must(c.read(n.name + "/app:1"))(t)}, mutate.IndexAddendum{Add: must(random.Image(1000, 1))(t)})
	if err := remote.WriteIndex(ref(t, n.name+"/deep/er/copy:1"), index, c.opts...); err != nil {
		t.Fatal(err)
	}
	catalog := must(remote.Catalog(t.Context(), ref(t, n.name+"/app").Context().Registry, viewer.opts...))(t)
	equal(t, "catalog", strings.Join(within(catalog, n.name), " "), n.name+"/app "+n.name+"/deep/er/copy")

	// What is attached to an image is found by it, as `oras attach` and `oras discover` do.
	subject := must(remote.Head(ref(t, n.name+"/app:1"), c.opts...))(t)
	attached := mutate.Subject(mutate.ConfigMediaType(must(random.Image(100, 1))(t), "application/x.sbom"), *subject).(v1.Image)
	if err := c.write(n.name+"/app@"+must(attached.Digest())(t).String(), attached); err != nil {
		t.Fatal(err)
	}
	found := must(must(remote.Referrers(ref(t, n.name+"/app").Context().Digest(digest.String()), viewer.opts...))(t).IndexManifest())(t)
	if len(found.Manifests) != 1 || found.Manifests[0].Digest != must(attached.Digest())(t) || found.Manifests[0].ArtifactType != "application/x.sbom" {
		t.Errorf("attached: %+v", found.Manifests)
	}

	// It runs, by the address as by the name.
	for pod, registry := range map[string]string{"by-name": registryHost, "by-address": nodeAddress(t)} {
		n.editor.apply(n.name, strings.Replace(script(pod, "echo runs"), "image: busybox", "image: "+registry+"/"+n.name+"/app:second", 1))
		equal(t, pod, n.ended(pod), "Succeeded")
	}

	resume(t, n)

	if err := remote.Delete(ref(t, n.name+"/app:second"), c.opts...); err != nil {
		t.Fatal(err)
	}
	_, err := c.read(n.name + "/app:second")
	says(t, "pulling what was deleted", err, "MANIFEST_UNKNOWN")
}

// within are the repositories of one project.
func within(catalog []string, project string) []string {
	var out []string
	for _, c := range catalog {
		if strings.HasPrefix(c, project+"/") {
			out = append(out, c)
		}
	}
	return out
}

// runnable is ownImage as the library has it.
func runnable(t *testing.T) v1.Image {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("tar", "-C", dir, "-xf", ownImage()).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	index := must(must(layout.FromPath(dir))(t).ImageIndex())(t)
	return must(index.Image(must(index.IndexManifest())(t).Manifests[0].Digest))(t)
}

// TestRegistryRefusals: what a client prints says who may not do what, and what to do about it.
func TestRegistryRefusals(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", `"registry": {"quota": "8Mi", "immutableTags": ["fixed:*"]}`)
	other := newTenant(t, "-other", "")
	stranger := newCrane(t, other.owner.name, other.owner.password)
	c, viewer := newCrane(t, n.editor.name, n.editor.password), newCrane(t, n.viewer.name, n.viewer.password)
	robotName, robotPassword := n.robot("ci")
	robot := newCrane(t, robotName, robotPassword)
	img := must(random.Image(1<<20, 1))(t)
	for _, image := range []string{"/robot:1", "/fixed:1"} {
		if err := robot.write(n.name+image, img); err != nil {
			t.Fatal(err)
		}
	}
	another := must(random.Image(1000, 1))(t)
	role := "in namespace " + n.name
	says(t, "a viewer's push", viewer.write(n.name+"/app:1", img), "DENIED", n.viewer.name, "may not push", "role Edit "+role)
	says(t, "a stranger's push", stranger.write(n.name+"/app:1", img), "DENIED", other.owner.name, "may not push", "role Edit "+role)
	_, err := stranger.read(n.name + "/robot:1")
	says(t, "a stranger's pull", err, "DENIED", "may not pull", "role View "+role)
	says(t, "a robot's push to another project", robot.write(other.name+"/app:1", img), "DENIED", robotName, "its own namespace, "+n.name)
	says(t, "a robot's delete", remote.Delete(ref(t, n.name+"/robot:1"), robot.opts...), "DENIED", "robot accounts do not delete")
	says(t, "a push to the library", c.write("library/app:1", img), "DENIED", "administrators")
	says(t, "a push to no namespace", c.write("app:1", img), "NAMESPACE/NAME")
	says(t, "a push to an immutable tag", c.write(n.name+"/fixed:1", another), "DENIED", "immutable", "push another tag")
	says(t, "a delete of an immutable tag", remote.Delete(ref(t, n.name+"/fixed:1"), c.opts...), "DENIED", "immutable")
	_, err = newCrane(t, n.editor.name, "not "+n.editor.password).read(n.name + "/robot:1")
	says(t, "a wrong password", err, "UNAUTHORIZED", "the password is wrong")

	// Pods are told, too.
	other.editor.apply(other.name, strings.Replace(script("thief", "true"), "image: busybox", "image: "+registryHost+"/"+n.name+"/robot:1", 1))
	other.pullFails("thief", "403 Forbidden", "pods pull from the project of their own namespace")

	// Too much, midway in a stream whose length nobody knows. What had come of it is not counted afterwards.
	big := must(mutate.AppendLayers(empty.Image, stream.NewLayer(io.NopCloser(io.LimitReader(rand.Reader, 12<<20)))))(t)
	says(t, "too large a push", c.write(n.name+"/big:1", big), "DENIED", "quota 8 MiB", "atoll registry rm", "spec.registry.quota of SupervisorNamespace "+n.name)
	if err := c.write(n.name+"/more:1", must(random.Image(4<<20, 1))(t)); err != nil {
		t.Errorf("a push after one that was too large: %v", err)
	}
}

// resume is an upload in pieces, which goes on where it was broken off.
func resume(t *testing.T, n *tenant) {
	t.Helper()
	d := n.editor.docker()
	repository := n.name + "/pieces"
	blob := make([]byte, 3<<20)
	_, _ = rand.Read(blob)
	sum := sha256.Sum256(blob)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	token := d.token("repository:" + repository + ":pull,push")
	resp, text := d.send(http.MethodPost, "/v2/"+repository+"/blobs/uploads/", token, nil)
	if resp.StatusCode != http.StatusAccepted {
		t.Fatalf("beginning: %s %s", resp.Status, text)
	}
	location := resp.Header.Get("Location")
	send := func(method string, from, to int, query string) *http.Response {
		t.Helper()
		u := must(url.Parse(location))(t)
		if query != "" {
			u.RawQuery += "&" + query
		}
		resp, text := d.send(method, u.RequestURI(), d.token("repository:"+repository+":pull,push"), blob[from:to],
			"Content-Type", "application/octet-stream", "Content-Range", fmt.Sprintf("%d-%d", from, to-1))
		if resp.StatusCode/100 == 2 && method == http.MethodPatch {
			location = resp.Header.Get("Location")
		} else if resp.StatusCode/100 != 2 {
			t.Log(text)
		}
		return resp
	}
	if resp := send(http.MethodPatch, 0, 1<<20, ""); resp.StatusCode != http.StatusAccepted {
		t.Fatalf("the first piece: %s", resp.Status)
	}
	if resp := send(http.MethodPatch, 2<<20, 3<<20, ""); resp.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("a piece that leaves one out: %s", resp.Status)
	}
	// Where it is, which a client asks when it comes back.
	u := must(url.Parse(location))(t)
	resp, text = d.send(http.MethodGet, u.RequestURI(), d.token("repository:"+repository+":pull,push"), nil)
	if resp.StatusCode != http.StatusNoContent || resp.Header.Get("Range") != "0-1048575" {
		t.Fatalf("where it is: %s %s %s", resp.Status, resp.Header.Get("Range"), text)
	}
	location = resp.Header.Get("Location")
	if resp := send(http.MethodPatch, 1<<20, 2<<20, ""); resp.StatusCode != http.StatusAccepted {
		t.Fatalf("the second piece: %s", resp.Status)
	}
	if resp := send(http.MethodPut, 2<<20, 3<<20, url.Values{"digest": {digest}}.Encode()); resp.StatusCode != http.StatusCreated {
		t.Fatalf("the end: %s", resp.Status)
	}
	if resp, text := d.with(repository, "pull", http.MethodGet, "blobs/"+digest, nil); resp.StatusCode != http.StatusOK || !bytes.Equal([]byte(text), blob) {
		t.Errorf("what came of it: %s, %d bytes", resp.Status, len(text))
	}
}
