//go:build e2e

package e2e

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// issuerSecret is that of Atoll's client, as in the example.
const issuerSecret = "the-secret-from-the-issuer"

// issuer is an OIDC issuer with the device grant and a page for browsers, at which somebody always approves.
type issuer struct {
	*httptest.Server
	t   *testing.T
	key *rsa.PrivateKey

	mu     sync.Mutex
	person map[string]any // claims of who approves
	life   time.Duration
	closed bool // nobody gets a token any more
	grants []string
	nonce  string // of who came with a browser
	proof  string // what such a login must know
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{t: t, key: key, life: time.Hour}
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{
			"issuer": i.URL, "jwks_uri": i.URL + "/keys", "token_endpoint": i.URL + "/token", "device_authorization_endpoint": i.URL + "/device", "authorization_endpoint": i.URL + "/authorize",
			"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"RS256"},
		})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"keys": []any{map[string]any{
			"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "k",
			"n": base64.RawURLEncoding.EncodeToString(key.N.Bytes()), "e": base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes()),
		}}})
	})
	mux.HandleFunc("GET /authorize", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("client_id") != "atoll" || q.Get("response_type") != "code" || q.Get("code_challenge_method") != "S256" {
			http.Error(w, "that is no question of Atoll", http.StatusBadRequest)
			return
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		i.nonce, i.proof = q.Get("nonce"), q.Get("code_challenge")
		http.Redirect(w, r, q.Get("redirect_uri")+"?"+url.Values{"code": {"c"}, "state": {q.Get("state")}}.Encode(), http.StatusFound)
	})
	mux.HandleFunc("POST /device", i.client(func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"device_code": "d", "user_code": "WXYZ", "verification_uri": i.URL + "/activate", "expires_in": 600, "interval": 1})
	}))
	mux.HandleFunc("POST /token", i.client(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		grant := r.PostForm.Get("grant_type")
		i.grants = append(i.grants, grant)
		known := sha256.Sum256([]byte(r.PostForm.Get("code_verifier")))
		byCode := r.PostForm.Get("code") == "c" && base64.RawURLEncoding.EncodeToString(known[:]) == i.proof
		if i.closed || r.PostForm.Get("device_code") != "d" && r.PostForm.Get("refresh_token") != "r" && !byCode {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, `{"error":"invalid_grant"}`)
			return
		}
		if byCode {
			i.person = maps.Clone(i.person)
			i.person["nonce"] = i.nonce
		}
		answer(w, map[string]any{"access_token": "a", "token_type": "Bearer", "refresh_token": "r", "expires_in": 3600, "id_token": i.token(i.person, time.Now().Add(i.life))})
	}))
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	return i
}

// client lets only Atoll's client in.
func (i *issuer) client(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.ParseForm() != nil || r.PostForm.Get("client_id") != "atoll" || r.PostForm.Get("client_secret") != issuerSecret {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"error":"invalid_client"}`)
			return
		}
		next(w, r)
	}
}

// is says who approves from now on, for how long tokens are good, and whether there are any.
func (i *issuer) is(person map[string]any, life time.Duration, closed bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.person, i.life, i.closed = person, life, closed
}

// token is an ID token with more claims.
func (i *issuer) token(claims map[string]any, expires time.Time) string {
	all := map[string]any{"iss": i.URL, "aud": "atoll", "sub": "1", "iat": time.Now().Add(-time.Minute).Unix(), "exp": expires.Unix()}
	maps.Copy(all, claims)
	body, err := json.Marshal(all)
	if err != nil {
		i.t.Error(err)
	}
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","kid":"k","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(body)
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, sum[:])
	if err != nil {
		i.t.Error(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// example reads a file of examples/ with something else in it.
func example(t *testing.T, name string, replacements ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(suite.atoll)), "examples", name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for i := 0; i < len(replacements); i += 2 {
		if !strings.Contains(text, replacements[i]) {
			t.Fatalf("examples/%s has no %q", name, replacements[i])
		}
		text = strings.ReplaceAll(text, replacements[i], replacements[i+1])
	}
	return text
}

// introduce applies the example with this issuer in it and waits until the API server takes its tokens. The namespace
// is called branch.
func (i *issuer) introduce() *namespace {
	i.t.Helper()
	i.t.Cleanup(func() {
		ctx := context.Background()
		_, _ = kubectl(ctx, "", "annotate", "svns", "branch", "atoll.dev/delete-contents=true", "--overwrite")
		for _, args := range [][]string{{"svns", "branch"}, {"identityprovider", "corp"}, {"secret", "corp-client", "-n", "atoll-system"}} {
			if _, err := kubectl(ctx, "", append([]string{"delete", "--ignore-not-found", timeout(longPatience)}, args...)...); err != nil {
				i.t.Error(err)
			}
		}
	})
	ca, err := json.Marshal(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw})))
	if err != nil {
		i.t.Fatal(err)
	}
	run(i.t, example(i.t, "people/identity-provider.yaml", "issuerURL: https://login.corp.example/realms/main", "issuerURL: "+i.URL+"\n  certificateAuthority: "+string(ca)), "apply", "-f", "-")
	run(i.t, "", "wait", "identityprovider/corp", "--for=condition=Ready", timeout(patience))
	run(i.t, "", "wait", "svns/branch", "--for=condition=Ready", timeout(patience))
	return &namespace{t: i.t, name: "branch"}
}

// visitor logs in at the issuer with claims, by a code.
func (i *issuer) visitor(name string, claims map[string]any) *actor {
	i.t.Helper()
	p := account(i.t, name)
	i.is(claims, time.Hour, false)
	eventually(i.t, "logging in as "+name+" of the issuer", func() error {
		out, err := p.atoll("", "login", "--server", portal(i.t), "--provider", "corp", "--flow", "device", "--ca-file", portalCA(i.t))
		if err == nil && (!strings.Contains(out, "type the code WXYZ") || !strings.Contains(out, "Logged in as "+name+"@corp.example")) {
			i.t.Errorf("the login says: %s", out)
		}
		return err
	})
	return p
}

// browses has somebody log in at the issuer with a browser, which is a script that follows where it is led.
func (i *issuer) browses(p *actor) {
	i.t.Helper()
	bin := i.t.TempDir()
	for name, text := range map[string]string{
		"xdg-open": "#!/bin/sh\nexec curl -sS -L --cacert " + bin + "/ca.pem \"$1\" >" + bin + "/page 2>&1\n",
		"ca.pem":   string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw})),
	} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte(text), 0o700); err != nil { //nolint:gosec // one of them is a program
			i.t.Fatal(err)
		}
	}
	env := []string{"HOME=" + p.home, "KUBECONFIG=" + p.kubeconfig, "ATOLL_DATA_DIR=" + filepath.Join(p.home, "none"), "PATH=" + bin + ":" + os.Getenv("PATH")}
	eventually(i.t, "logging in with a browser", func() error {
		out, err := combined(i.t.Context(), "", env, "login", "--server", portal(i.t), "--provider", "corp", "--flow", "browser", "--ca-file", portalCA(i.t))
		page, _ := os.ReadFile(filepath.Join(bin, "page"))
		if err != nil || !strings.Contains(out, "Log in with a browser on this machine at") || !strings.Contains(out, "Logged in as "+p.name+"@corp.example") {
			return errors.Join(err, fmt.Errorf("%s\nthe browser shows: %s", out, page))
		}
		return nil
	})
	i.mu.Lock()
	defer i.mu.Unlock()
	if last := i.grants[len(i.grants)-1]; last != "authorization_code" {
		i.t.Errorf("the last question to the issuer was %s", last)
	}
}

// TestPeopleOfAnIssuer: people of an OpenID Connect issuer log in there, have the role of their access list, in their own
// name or by a group, in the API as in the registry, until their token has expired or the issuer is gone.
func TestPeopleOfAnIssuer(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	n := i.introduce()
	claims := func(name string, groups ...string) map[string]any {
		return map[string]any{"preferred_username": name, "groups": groups}
	}
	dora := i.visitor("dora", claims("dora@corp.example"))
	emil := i.visitor("emil", claims("emil", "developers", "administrators@atoll.local", "system:masters"))
	mallory := i.visitor("mallory", claims("mallory", "others"))
	namesake := newActor(t, "dora") // another one, of atoll.local

	for _, p := range []*actor{dora, emil} {
		equal(t, "context of "+p.name, p.kubectl("config", "current-context"), n.name)
		out, err := p.atoll("", "whoami", "-o", "json")
		if err != nil || !strings.Contains(out, `"sso:`+p.name+`@corp.example"`) || strings.Contains(out, "atoll.local") || strings.Contains(out, "system:masters") {
			t.Errorf("%s, %v", out, err)
		}
		image := registryHost + "/" + n.name + "/app:" + p.name
		if out, err := p.push(image); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		p.apply(n.name, strings.Replace(script(p.name, "echo runs"), "image: busybox", "image: "+image, 1))
		equal(t, "the pod of "+p.name, n.ended(p.name), "Succeeded")
	}
	dora.kubectl("get", "secrets", "-n", n.name)
	fred := account(t, "fred")
	i.is(claims("fred", "developers"), time.Hour, false)
	i.browses(fred)
	fred.kubectl("get", "secrets", "-n", n.name)
	if out, err := fred.atoll("", "whoami", "-o", "json"); err != nil || !strings.Contains(out, `"sso:fred@corp.example"`) {
		t.Errorf("%s, %v", out, err)
	}
	dora.mayCreate("supervisornamespaces.atoll.dev")
	if emil.can("create", "supervisornamespaces.atoll.dev") {
		t.Error("only the owner may make namespaces")
	}
	for _, p := range []*actor{mallory, namesake} {
		p.denied([]string{"get", "pods", "-n", n.name}, "forbidden", "sso:"+p.name+"@")
		if out, err := p.push(registryHost + "/" + n.name + "/app:" + p.name); err == nil || !strings.Contains(out, "may not push") {
			t.Errorf("%s pushes: %v\n%s", p.name, err, out)
		}
	}
	i.tokens(dora, claims("dora"))

	// Who is about to expire gets another token, until the issuer gives none.
	login := func() {
		t.Helper()
		i.is(claims("dora"), 25*time.Second, false) // less than a token must still be good for to be used
		eventually(t, "logging in for a short time", func() error {
			_, err := dora.atoll("", "login", "--server", portal(t), "--provider", "corp", "--flow", "device", "--ca-file", portalCA(t))
			return err
		})
	}
	login()
	i.is(claims("dora"), time.Hour, false)
	dora.kubectl("get", "pods")
	i.mu.Lock()
	if last := i.grants[len(i.grants)-1]; last != "refresh_token" {
		t.Errorf("the last question to the issuer was %s", last)
	}
	i.mu.Unlock()
	login()
	i.is(nil, time.Hour, true)
	dora.denied([]string{"get", "pods"}, "the login of dora@corp.example", "has ended", "atoll login --server")

	run(t, "", "delete", "identityprovider", "corp")
	eventually(t, "the issuer's tokens to end with it", func() error {
		return loggedOut(emil.try("", "get", "pods"))
	})
	if out, err := emil.atoll("", "login", "--server", portal(t), "--provider", "corp", "--ca-file", portalCA(t)); err == nil || !strings.Contains(out, "it has: none") {
		t.Errorf("without the provider: %v\n%s", err, out)
	}
}

// tokens tries such that are almost right.
func (i *issuer) tokens(p *actor, claims map[string]any) {
	i.t.Helper()
	try := func(token string) error {
		_, err := p.bearer(token, "get", "pods", "-n", "branch")
		return err
	}
	ends := time.Now().Add(30 * time.Second)
	short := i.token(claims, ends)
	if err := try(short); err != nil && time.Now().Before(ends) {
		i.t.Errorf("a token that is good: %v", err)
	}
	with := func(key string, value any) map[string]any {
		out := map[string]any{key: value}
		for k, v := range claims {
			if k != key {
				out[k] = v
			}
		}
		return out
	}
	hour := time.Now().Add(time.Hour)
	good := i.token(claims, hour)
	for what, token := range map[string]string{
		"expired":                i.token(claims, time.Now().Add(-time.Minute)),
		"for another client":     i.token(with("aud", "other"), hour),
		"of another issuer":      i.token(with("iss", "https://portal.atoll.local"), hour),
		"of an administrator":    i.token(with("preferred_username", "administrator@atoll.local"), hour),
		"of the system":          i.token(with("preferred_username", "system:admin"), hour),
		"with another signature": good[:strings.LastIndex(good, ".")] + short[strings.LastIndex(short, "."):],
	} {
		if err := try(token); err == nil || !strings.Contains(err.Error(), "nauthorized") {
			i.t.Errorf("a token %s: %v", what, err)
		}
		if resp, text := newDocker(i.t, p.name, token).with("branch/app", "pull", http.MethodGet, "tags/list", nil); resp.StatusCode != http.StatusUnauthorized {
			i.t.Errorf("the registry takes a token %s: %s %s", what, resp.Status, text)
		}
	}
	if resp, text := newDocker(i.t, p.name, good).with("branch/app", "pull", http.MethodGet, "tags/list", nil); resp.StatusCode != http.StatusOK {
		i.t.Errorf("the registry does not take a good one: %s %s", resp.Status, text)
	}
	eventually(i.t, "a token to expire", func() error {
		if try(short) == nil {
			return fmt.Errorf("it still counts, and was to end at %s", ends)
		}
		return nil
	})
}
