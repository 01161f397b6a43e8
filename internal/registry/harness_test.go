package registry

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// cluster is an API server made of maps.
type cluster struct {
	mu            sync.Mutex
	namespaces    map[string]string
	settings      map[string]atoll.NamespaceRegistry
	robots        map[string]*atoll.RobotAccount
	unseen        int                 // looks for robots that find none, as a cache that lags does
	rights        map[string]bool     // user/verb/namespace
	tokens        map[string]Identity // audience/token
	ended         map[string]bool     // people who may not be logged in any more
	groups        map[string][]string // of people, where they have changed
	configuration atoll.RegistryConfigurationSpec
	asked         int
}

func (c *cluster) Review(_ context.Context, token, audience string) (Identity, bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id, ok := c.tokens[audience+"/"+token]
	return id, ok, nil
}

func (c *cluster) Allowed(_ context.Context, id Identity, verb, namespace string) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	for _, who := range append([]string{id.Name}, id.Groups...) {
		if c.rights[who+"/"+verb+"/"+namespace] || c.rights[who+"/*/*"] {
			return true, nil
		}
	}
	return false, nil
}

func (c *cluster) Namespace(name string) (string, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	uid, ok := c.namespaces[name]
	return uid, ok
}

func (c *cluster) Exists(name string) bool {
	_, ok := c.Namespace(name)
	return ok
}

func (c *cluster) Settings(project string) atoll.NamespaceRegistry {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.settings[project]
}

func (c *cluster) RobotHash(_ context.Context, namespace, name string) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.robots[namespace+"/"+name]; ok {
		return r.Status.SecretHash, nil
	}
	return "", nil
}

func (c *cluster) Robot(namespace, name string) (*atoll.RobotAccount, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unseen > 0 {
		c.unseen--
		return nil, false
	}
	r, ok := c.robots[namespace+"/"+name]
	return r.DeepCopy(), ok
}

func (c *cluster) Configuration() atoll.RegistryConfigurationSpec {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.configuration
}

func (c *cluster) Authenticate(_ context.Context, name, password string) (Identity, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id, ok := c.tokens["/"+password]; ok {
		return id, nil
	}
	if p, ok := passwords()[name]; !ok || p != password {
		return Identity{}, errCredentials
	}
	return Identity{Name: name, Groups: []string{"people"}}, nil
}

func (c *cluster) Stands(_ context.Context, id Identity) (Identity, bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if groups, ok := c.groups[id.Name]; ok {
		id.Groups = groups
	}
	return id, !c.ended[id.Name], nil
}

func (c *cluster) Known(_ context.Context, name string) bool {
	_, ok := passwords()[name]
	return ok
}

// change changes the cluster.
func (c *cluster) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

// may gives a user verbs in a namespace.
func (c *cluster) may(user, namespace string, verbs ...string) {
	c.change(func() {
		for _, v := range verbs {
			c.rights[user+"/"+v+"/"+namespace] = true
		}
	})
}

// webToken is what looks like a token for the registry.
func webToken(name string) string {
	payload := base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"` + name + `","aud":["` + atoll.RegistryAudience + `"]}`))
	return "eyJhbGciOiJSUzI1NiJ9." + payload + ".sig"
}

// robot makes a robot account of shop with a password.
func (c *cluster) robot(name, password string, permissions ...atoll.RobotPermission) {
	sum := sha256.Sum256([]byte(password))
	c.change(func() {
		c.robots["shop/"+name] = &atoll.RobotAccount{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name)},
			Spec:       atoll.RobotAccountSpec{Permissions: permissions},
			Status:     atoll.RobotAccountStatus{SecretHash: hex.EncodeToString(sum[:])},
		}
	})
}

// harness is a registry that is served.
type harness struct {
	*cluster
	t   *testing.T
	reg *Registry
	srv *httptest.Server
	dir string
}

// passwords are those of people.
func passwords() map[string]string {
	return map[string]string{"olga": "olga-password", "victor": "victor-password", "root": "root-password", "stranger": "stranger-password"}
}

// start serves a registry with two namespaces: shop, which olga may do everything in and victor pull from, and bank.
func start(t *testing.T, changes ...func(*Config)) *harness {
	t.Helper()
	h, err := open(t.TempDir(), changes...)
	if err != nil {
		t.Fatal(err)
	}
	h.t = t
	t.Cleanup(h.srv.Close)
	return h
}

// open serves the registry in a directory.
func open(dir string, changes ...func(*Config)) (*harness, error) {
	c := &cluster{
		namespaces: map[string]string{"shop": "uid-shop", "bank": "uid-bank"},
		settings:   map[string]atoll.NamespaceRegistry{}, robots: map[string]*atoll.RobotAccount{},
		rights: map[string]bool{"root/*/*": true}, tokens: map[string]Identity{}, ended: map[string]bool{}, groups: map[string][]string{},
	}
	c.may("olga", "shop", "get", "update", "delete", "list")
	c.may("victor", "shop", "get", "list")
	cfg := Config{Dir: dir, Authority: c, Directory: c, People: c, Reserve: 1}
	for _, change := range changes {
		change(&cfg)
	}
	reg, err := New(cfg)
	if err != nil {
		return nil, err
	}
	reg.lingerWithin = time.Minute
	return &harness{cluster: c, reg: reg, dir: cfg.Dir, srv: httptest.NewTLSServer(reg)}, nil
}

func (h *harness) host() string { return strings.TrimPrefix(h.srv.URL, "https://") }

func (h *harness) as(user string) []remote.Option {
	return h.login(user, passwords()[user])
}

func (h *harness) login(user, password string) []remote.Option {
	return []remote.Option{
		remote.WithAuth(&authn.Basic{Username: user, Password: password}), remote.WithTransport(h.srv.Client().Transport),
		remote.WithRetryBackoff(remote.Backoff{Duration: time.Millisecond, Steps: 1}),
	}
}

func (h *harness) ref(text string) name.Reference {
	h.t.Helper()
	ref, err := name.ParseReference(h.host() + "/" + text)
	if err != nil {
		h.t.Fatal(err)
	}
	return ref
}

// image makes an image of n layers of size bytes.
func (h *harness) image(size int64, n int) v1.Image {
	h.t.Helper()
	img, err := random.Image(size, int64(n))
	if err != nil {
		h.t.Fatal(err)
	}
	return img
}

func (h *harness) push(ref string, img v1.Image, opts []remote.Option) {
	h.t.Helper()
	if err := remote.Write(h.ref(ref), img, opts...); err != nil {
		h.t.Fatalf("pushing %s: %v", ref, err)
	}
}

// pull reads an image whole.
func (h *harness) pull(ref string, opts []remote.Option) error {
	img, err := remote.Image(h.ref(ref), opts...)
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
		_ = r.Close()
	}
	return nil
}

// refused wants an error that has all the texts.
func refused(t *testing.T, err error, texts ...string) {
	t.Helper()
	if err == nil {
		t.Error("it was not refused")
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("refused with %v, which does not say %q", err, text)
		}
	}
}

// token asks for a token and returns the answer.
func (h *harness) token(user, password string, scopes ...string) (status int, token string) {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), http.MethodGet, h.srv.URL+"/registry/token?service=registry.atoll.local", nil)
	if err != nil {
		h.t.Fatal(err)
	}
	q := req.URL.Query()
	for _, s := range scopes {
		q.Add("scope", s)
	}
	req.URL.RawQuery = q.Encode()
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	answer, err := h.srv.Client().Do(req)
	if err != nil {
		h.t.Fatal(err)
	}
	defer answer.Body.Close()
	var got struct{ Token string }
	_ = json.NewDecoder(answer.Body).Decode(&got)
	return answer.StatusCode, got.Token
}

// do sends a request with a token, and returns status, headers and body.
func (h *harness) do(method, path, token string, body io.Reader, headers map[string]string) (int, http.Header, string) {
	h.t.Helper()
	status, header, text, err := h.try(method, path, token, body, headers)
	if err != nil {
		h.t.Fatal(err)
	}
	return status, header, text
}

// try is for other goroutines than the test's.
func (h *harness) try(method, path, token string, body io.Reader, headers map[string]string) (int, http.Header, string, error) {
	req, err := http.NewRequestWithContext(h.t.Context(), method, h.srv.URL+path, body)
	if err != nil {
		return 0, nil, "", err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for k, v := range headers {
		req.Header.Set(k, v)
	}
	answer, err := h.srv.Client().Do(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return answer.StatusCode, maps.Clone(answer.Header), string(text), err
}

func quantity(n int64) *resource.Quantity { return resource.NewQuantity(n, resource.BinarySI) }

// plainLogin trusts whatever certificate a registry in another process has.
func (h *harness) plainLogin(user string) []remote.Option {
	return []remote.Option{
		remote.WithAuth(&authn.Basic{Username: user, Password: passwords()[user]}),
		remote.WithTransport(&http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}), //nolint:gosec // a test's own server
		remote.WithRetryBackoff(remote.Backoff{Duration: time.Millisecond, Steps: 1}),
	}
}
