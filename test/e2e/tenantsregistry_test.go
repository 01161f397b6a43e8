//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
)

const registryHost = "registry.atoll.local"

// portal is the address that people log in at and push to.
func portal(t *testing.T) string {
	t.Helper()
	return net.JoinHostPort(nodeAddress(t), "443")
}

func nodeAddress(t *testing.T) string {
	t.Helper()
	if suite.address == "" {
		t.Fatal("the node has no address")
	}
	return suite.address
}

// clusterCA is the certificate of the cluster's authority, in PEM.
func clusterCA(t *testing.T) []byte {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", suite.dataDir+"/admin.kubeconfig")
	if err != nil {
		t.Fatal(err)
	}
	return config.CAData
}

// portalCA is the same in a file.
func portalCA(t *testing.T) string {
	t.Helper()
	return writeFile(t, string(clusterCA(t)))
}

// docker is a client of the registry that does what the test says and nothing by itself.
type docker struct {
	t              *testing.T
	user, password string
	client         *http.Client
}

func newDocker(t *testing.T, user, password string) *docker {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(clusterCA(t)) {
		t.Fatal("no certificate of the authority")
	}
	address := portal(t)
	dialer := ownDialer()
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, address)
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &docker{t: t, user: user, password: password, client: &http.Client{Transport: transport, Timeout: patience}}
}

// ownDialer connects to this host from an address that nobody else has: who sends too many wrong passwords locks it.
func ownDialer() *net.Dialer {
	b := make([]byte, 3)
	_, _ = rand.Read(b)
	return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, b[0]|1, b[1], b[2]&0x7f|1)}}
}

// guess tries to log in with a password that is wrong, by a proxy, so that it comes from an address of its own.
func (p *actor) guess(password string) (string, error) {
	p.t.Helper()
	proxy := httptest.NewServer(http.HandlerFunc(tunnel))
	defer proxy.Close()
	env := append(p.env(), "HTTPS_PROXY="+proxy.URL, "NO_PROXY=", "no_proxy=")
	return combined(p.t.Context(), password+"\n", env, p.loginArgs("--ca-file", portalCA(p.t))...)
}

// tunnel is a proxy of CONNECT.
func tunnel(w http.ResponseWriter, req *http.Request) {
	there, err := ownDialer().DialContext(req.Context(), "tcp", req.Host)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer there.Close()
	here, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer here.Close()
	_, _ = io.WriteString(here, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		_, _ = io.Copy(there, here)
		_ = there.Close()
	}()
	_, _ = io.Copy(here, there)
}

// token asks for rights; what it gives may be less than what was asked for. It asks again while it is told to.
func (d *docker) token(scopes ...string) string {
	d.t.Helper()
	q := url.Values{"service": {registryHost}, "scope": scopes}
	req := d.request(http.MethodGet, "/registry/token?"+q.Encode(), nil)
	if d.user != "" {
		req.SetBasicAuth(d.user, d.password)
	}
	var body []byte
	eventually(d.t, "the registry to say who has which rights", func() error {
		resp, text := d.do(req)
		if body = text; resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable {
			return fmt.Errorf("%s: %s", resp.Status, text)
		}
		return nil
	})
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	_ = json.Unmarshal(body, &answer)
	if answer.Token == "" {
		answer.Token = answer.AccessToken
	}
	return answer.Token
}

func (d *docker) request(method, path string, body []byte) *http.Request {
	d.t.Helper()
	req, err := http.NewRequestWithContext(d.t.Context(), method, "https://"+registryHost+path, bytes.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	return req
}

func (d *docker) do(req *http.Request) (*http.Response, []byte) {
	d.t.Helper()
	resp, err := d.client.Do(req)
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return resp, body
}

// send is a request with the rights of a token.
func (d *docker) send(method, path, token string, body []byte, header ...string) (*http.Response, string) {
	d.t.Helper()
	req := d.request(method, path, body)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, text := d.do(req)
	return resp, string(text)
}

// with asks for a token for a repository and sends one request with it.
func (d *docker) with(repository, actions, method, path string, body []byte, header ...string) (*http.Response, string) {
	d.t.Helper()
	token := d.token("repository:" + repository + ":" + actions)
	return d.send(method, "/v2/"+repository+"/"+path, token, body, header...)
}

// upload sends one blob to a repository and returns the status of the end.
func (d *docker) upload(repository string, blob []byte) (digest string, code int, answer string) {
	d.t.Helper()
	sum := sha256.Sum256(blob)
	digest = "sha256:" + hex.EncodeToString(sum[:])
	token := d.token("repository:" + repository + ":pull,push")
	resp, text := d.send(http.MethodPost, "/v2/"+repository+"/blobs/uploads/", token, nil)
	if resp.StatusCode != http.StatusAccepted {
		return digest, resp.StatusCode, text
	}
	location, err := resp.Location()
	if err != nil {
		d.t.Fatal(err)
	}
	q := location.Query()
	q.Set("digest", digest)
	location.RawQuery = q.Encode()
	resp, text = d.send(http.MethodPut, location.RequestURI(), token, blob, "Content-Type", "application/octet-stream")
	return digest, resp.StatusCode, text
}

// artifact pushes a small image of one random layer, tagged 1, and returns the digests of manifest and layer.
func (d *docker) artifact(repository string, size int) (manifest, layer string) {
	d.t.Helper()
	content := make([]byte, size)
	_, _ = rand.Read(content)
	layer, code, text := d.upload(repository, content)
	if code != http.StatusCreated {
		d.t.Fatalf("uploading a layer: %d %s", code, text)
	}
	config, code, text := d.upload(repository, []byte("{}"))
	if code != http.StatusCreated {
		d.t.Fatalf("uploading a configuration: %d %s", code, text)
	}
	body := ociManifest(config, 2, layer, size)
	resp, text := d.with(repository, "pull,push", http.MethodPut, "manifests/1", body, "Content-Type", ociManifestType)
	if resp.StatusCode != http.StatusCreated {
		d.t.Fatalf("uploading a manifest: %s %s", resp.Status, text)
	}
	return resp.Header.Get("Docker-Content-Digest"), layer
}

const ociManifestType = "application/vnd.oci.image.manifest.v1+json"

func ociManifest(config string, configSize int, layer string, size int) []byte {
	return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":%d}]}`,
		ociManifestType, config, configSize, layer, size)
}

// docker is a person's client of the registry.
func (p *actor) docker() *docker { return newDocker(p.t, p.name, p.password) }

// push is `atoll image push` of an image that is like busybox.
func (p *actor) push(target string) (string, error) {
	return p.atoll("", "image", "push", ownImage(), target)
}

// ownImage is the archive with busybox: the same to the byte as what was loaded for everybody, which stays everybody's when
// a namespace pulls it from its project.
func ownImage() string {
	return filepath.Join(filepath.Dir(filepath.Dir(suite.atoll)), "build", "images", "busybox.tar")
}

// TestTenantRegistry: a project of its own, rights by role, its images in its pods, and a quota.
func TestTenantRegistry(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", `"registry": {"quota": "8Mi", "immutableTags": ["fixed:*"]}`)
	stranger := newActor(t, n.name+"-stranger")
	project := registryHost + "/" + n.name
	equal(t, "the project", n.status().Status.RegistryProject, project)
	for _, p := range []*actor{n.owner, n.editor} {
		if out, err := p.push(project + "/app:" + p.name[len(p.name)-5:]); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	if out, err := n.viewer.push(project + "/app:viewer"); err == nil || !strings.Contains(out, "role Edit") {
		t.Errorf("a viewer pushed: %v\n%s", err, out)
	}
	if out, err := stranger.push(project + "/app:stranger"); err == nil {
		t.Errorf("a stranger pushed: %s", out)
	}
	// Pulled by whoever may see the namespace, and by its pods without any secret.
	if resp, text := n.viewer.docker().with(n.name+"/app", "pull", http.MethodGet, "manifests/owner", nil, "Accept", ociManifestType); resp.StatusCode != http.StatusOK {
		t.Errorf("a viewer pulls: %s %s", resp.Status, text)
	}
	token, err := n.viewer.atoll("", "registry", "token") // a session is a password as well
	if err != nil {
		t.Fatalf("%v\n%s", err, token)
	}
	if resp, text := newDocker(t, n.viewer.name, strings.TrimSpace(token)).with(n.name+"/app", "pull", http.MethodGet, "tags/list", nil); resp.StatusCode != http.StatusOK {
		t.Errorf("a viewer with the token of a session: %s %s", resp.Status, text)
	}
	if resp, _ := stranger.docker().with(n.name+"/app", "pull", http.MethodGet, "manifests/owner", nil); resp.StatusCode/100 != 4 {
		t.Errorf("a stranger pulls: %s", resp.Status)
	}
	n.editor.apply(n.name, strings.Replace(sleeper, "image: busybox, imagePullPolicy: IfNotPresent", "image: "+project+"/app:owner, imagePullPolicy: Always", 1))
	n.ready("box")
	n.library(stranger)
	// The quota holds, also midway, and says so.
	d := n.editor.docker()
	d.artifact(n.name+"/small", 1<<20)
	_, code, text := d.upload(n.name+"/big", make([]byte, 9<<20))
	if code/100 != 4 || !strings.Contains(strings.ToLower(text), "quota") {
		t.Errorf("9 MiB into a project of 8: %d %s", code, text)
	}
	eventually(t, "the status to count the images", func() error {
		s, err := n.tryStatus()
		if got := s.used("registry"); got == "" || strings.HasPrefix(got, "0/") {
			return fmt.Errorf("registry: %q, %w", got, err)
		}
		return nil
	})
	// Tags that must stay stay.
	d.artifact(n.name+"/fixed", 100)
	config, _, _ := d.upload(n.name+"/fixed", []byte("{}"))
	layer, _, _ := d.upload(n.name+"/fixed", []byte("another"))
	if resp, text := d.with(n.name+"/fixed", "pull,push", http.MethodPut, "manifests/1", ociManifest(config, 2, layer, 7), "Content-Type", ociManifestType); resp.StatusCode/100 != 4 {
		t.Errorf("an immutable tag was pushed twice: %s %s", resp.Status, text)
	}
	if resp, text := d.with(n.name+"/fixed", "pull,delete", http.MethodDelete, "manifests/1", nil); resp.StatusCode/100 != 4 {
		t.Errorf("an immutable tag was deleted: %s %s", resp.Status, text)
	}
}

// robot makes a robot account that may pull and push, and returns its name and password.
func (n *tenant) robot(name string) (user, password string) {
	n.t.Helper()
	n.owner.apply(n.name, fmt.Sprintf(`{"apiVersion": "atoll.dev/v1alpha1", "kind": "RobotAccount", "metadata": {"name": %q}, "spec": {"permissions": ["pull", "push"]}}`, name))
	n.owner.kubectl("-n", n.name, "wait", "--for=condition=Ready", "robotaccount/"+name, timeout(longPatience))
	secret := n.owner.kubectl("-n", n.name, "get", "robotaccount", name, "-o", "jsonpath={.status.secretName}")
	encoded := n.owner.kubectl("-n", n.name, "get", "secret", secret, "-o", `jsonpath={.data.\.dockerconfigjson}`)
	text, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		n.t.Fatal(err)
	}
	var config struct {
		Auths map[string]struct{ Username, Password string }
	}
	if err := json.Unmarshal(text, &config); err != nil || config.Auths[registryHost].Password == "" {
		n.t.Fatalf("the Secret of a robot account: %v", err)
	}
	login := config.Auths[registryHost]
	eventually(n.t, "the registry to know the robot account", func() error {
		if newDocker(n.t, login.Username, login.Password).token("repository:"+n.name+"/app:pull") == "" {
			return errors.New("it gives no token")
		}
		return nil
	})
	return login.Username, login.Password
}
