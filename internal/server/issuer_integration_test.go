//go:build integration

package server

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

// issuer is an OIDC issuer.
type issuer struct {
	*httptest.Server
	key *rsa.PrivateKey
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{key: key}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]any{
			"issuer": i.URL, "jwks_uri": i.URL + "/keys", "token_endpoint": i.URL + "/token", "authorization_endpoint": i.URL + "/auth",
			"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"RS256"},
		})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]any{"keys": []any{map[string]any{
			"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "k",
			"n": base64.RawURLEncoding.EncodeToString(key.N.Bytes()),
			"e": base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes()),
		}}})
	})
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	return i
}

// ca is the PEM of its certificate.
func (i *issuer) ca() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}))
}

// token makes an ID token; claims replace the usual ones.
func (i *issuer) token(t *testing.T, claims map[string]any) string {
	t.Helper()
	all := map[string]any{
		"iss": i.URL, "aud": "atoll", "sub": "1", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	}
	maps.Copy(all, claims)
	head, _ := json.Marshal(map[string]string{"alg": "RS256", "kid": "k", "typ": "JWT"})
	body, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	text := base64.RawURLEncoding.EncodeToString(head) + "." + base64.RawURLEncoding.EncodeToString(body)
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// checkIssuers: tokens of a foreign issuer count once it is known, bad issuers do no harm, and no token makes a local
// user.
func (p *people) checkIssuers(t *testing.T) {
	ctx := t.Context()
	good := newIssuer(t)
	provider := func(name, domain, url, ca string) *api.IdentityProvider {
		return &api.IdentityProvider{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec:       api.IdentityProviderSpec{Domain: domain, IssuerURL: url, ClientID: "atoll", CertificateAuthority: ca},
		}
	}
	for _, o := range []*api.IdentityProvider{
		provider("corp", "corp.example", good.URL, good.ca()),
		provider("away", "away.example", "https://127.0.0.1:1", ""),
		provider("bad", "bad.example", "https://bad.example", "no certificate"),
	} {
		if err := p.admin.Create(ctx, o); err != nil {
			t.Fatal(err)
		}
	}
	for domain, want := range map[string]string{"atoll.local": "domain of local users", "x.atoll.local": "domain of local users", "Corp": "domain"} {
		if err := p.admin.Create(ctx, provider("refused", domain, "https://x.example", "")); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("domain %s: %v", domain, err)
		}
	}
	for name, want := range map[string]string{"corp": "Accepted", "away": "IssuerUnreachable", "bad": "InvalidConfiguration"} {
		p.within(t, name+" is "+want, func() bool {
			got := &api.IdentityProvider{}
			if err := p.admin.Get(ctx, client.ObjectKey{Name: name}, got); err != nil {
				t.Fatal(err)
			}
			c := meta.FindStatusCondition(got.Status.Conditions, api.IdentityProviderReady)
			return c != nil && c.Reason == want
		})
	}
	dora := good.token(t, map[string]any{"preferred_username": "dora@corp.example", "groups": []string{"dev", "administrators@atoll.local", "system:masters"}})
	var name string
	var groups []string
	p.within(t, "the issuer's token is taken", func() bool {
		var err error
		name, groups, err = p.review(dora)
		return err == nil
	})
	if name != "sso:dora@corp.example" || !slices.Equal(groups, []string{"sso:dev@corp.example", "system:authenticated"}) {
		t.Errorf("%s, %v", name, groups)
	}
	if code, body := p.ask("GET", "/login/whoami", "", "", dora, ""); code != 200 || !strings.Contains(body, "sso:dora@corp.example") {
		t.Errorf("%d %s", code, body)
	}
	for what, claims := range map[string]map[string]any{
		"a local user":       {"preferred_username": "administrator@atoll.local"},
		"a system user":      {"preferred_username": "system:admin"},
		"a prefix":           {"preferred_username": "sso:administrator"},
		"another client":     {"preferred_username": "dora", "aud": "other"},
		"expired":            {"preferred_username": "dora", "exp": time.Now().Add(-time.Hour).Unix()},
		"nobody":             {},
		"the issuer of ours": {"preferred_username": "dora", "iss": "https://portal.atoll.local"},
	} {
		if who, _, err := p.review(good.token(t, claims)); !apierrors.IsUnauthorized(err) {
			t.Errorf("%s: %s, %v", what, who, err)
		}
	}
	if code, body := p.ask("GET", "/login/info", "", "", "", ""); code != 200 || !strings.Contains(body, `"corp.example"`) || strings.Contains(body, `"away.example"`) {
		t.Errorf("%d %s", code, body)
	}
	if err := p.admin.Delete(ctx, provider("corp", "", "", "")); err != nil {
		t.Fatal(err)
	}
	p.within(t, "the issuer is gone", func() bool { _, _, err := p.review(dora); return apierrors.IsUnauthorized(err) })
	file, err := os.ReadFile(filepath.Join(p.cfg.StateDir, "authentication.yaml"))
	if err != nil || strings.Contains(string(file), "jwt") {
		t.Errorf("%s, %v", file, err)
	}
}

func (p *people) checkBadRequests(t *testing.T) {
	for _, tt := range []struct {
		method, path, user, body string
		want                     int
	}{
		{"POST", "/wcp/login", "root2", "{" + strings.Repeat(" ", 1<<20), 400},
		{"POST", "/wcp/login", strings.Repeat("a", 5000), "{}", 401},
		{"POST", "/wcp/login", "root2", `{"guest_cluster_name":"c"}`, 501},
		{"POST", "/wcp/login", "", "{}", 401},
		{"POST", "/wcp/../login/session", "", "{}", 404},
		{"GET", "/healthz", "", "", 200},
		{"GET", "/", "", "", 404},
	} {
		if code, body := p.ask(tt.method, tt.path, tt.user, personPassword, "", tt.body); code != tt.want && (tt.want != 404 || code < 300) {
			t.Errorf("%s %s as %.10s: %d %s", tt.method, tt.path, tt.user, code, body)
		}
	}
	req, err := http.NewRequest("GET", fmt.Sprintf("https://127.0.0.1:%d/healthz", p.cfg.Ports.Portal), nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Long", strings.Repeat("x", 1<<20))
	if resp, err := p.http.Do(req); err == nil {
		_ = resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Errorf("a header of a megabyte: %d", resp.StatusCode)
		}
	}
}
