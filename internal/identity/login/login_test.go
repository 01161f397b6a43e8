package login

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/identity/providers"
)

// fakePeople knows anna.
type fakePeople struct{ ended []string }

func (f *fakePeople) Login(_ context.Context, name, password string, whole bool) (identity.Tokens, error) {
	switch password {
	case "right":
		t := identity.Tokens{Person: identity.Person{Name: "sso:" + name + "@atoll.local"}, Access: "short", Refresh: "refresh", Expires: time.Unix(1, 0), SessionExpires: time.Unix(2, 0)}
		if whole {
			t.Access = "whole"
		}
		return t, nil
	case "old":
		return identity.Tokens{}, identity.ErrMustChange
	case "locked":
		return identity.Tokens{}, identity.LockedError{Until: time.Now().Add(time.Minute)}
	case "broken":
		return identity.Tokens{}, errors.New("secret detail")
	}
	return identity.Tokens{}, identity.ErrRefused
}

func (f *fakePeople) Refresh(_ context.Context, refresh string) (identity.Tokens, error) {
	if refresh != "refresh" {
		return identity.Tokens{}, identity.ErrNoSession
	}
	return identity.Tokens{Access: "next"}, nil
}

func (f *fakePeople) Logout(_ context.Context, token string) error {
	f.ended = append(f.ended, token)
	return nil
}

func (f *fakePeople) Bearer(_ context.Context, token string) (identity.Person, error) {
	if token != "short" && token != "whole" {
		return identity.Person{}, identity.ErrNoSession
	}
	return identity.Person{Name: "sso:anna@atoll.local"}, nil
}

func (f *fakePeople) ChangePassword(_ context.Context, _, old, wanted string) error {
	if old != "old" {
		return identity.ErrRefused
	}
	if wanted == "" {
		return identity.PasswordError{}
	}
	return nil
}

func (f *fakePeople) Namespaces(context.Context, identity.Person) ([]identity.Access, error) {
	return []identity.Access{{Namespace: "shop", Role: "edit"}}, nil
}

// fakeIssuers has one with a secret.
type fakeIssuers struct{ provider providers.Provider }

func (f fakeIssuers) Get(name string) (providers.Provider, bool) {
	return f.provider, name == f.provider.Object.Name
}
func (f fakeIssuers) List() []providers.Provider { return []providers.Provider{f.provider} }
func (f fakeIssuers) Secret(context.Context, providers.Provider) (string, error) {
	return "the-secret", nil
}

func server(t *testing.T, people People, p providers.Provider) *httptest.Server {
	t.Helper()
	h := New(Config{
		People: people, Issuers: fakeIssuers{p}, Banner: func(context.Context) string { return "be nice" },
		Host: "192.0.2.1", Names: []string{"supervisor.example"}, APIPort: 6443, CA: []byte("PEM"), Logger: slog.New(slog.DiscardHandler),
	})
	mux := http.NewServeMux()
	for pattern, answer := range h.Routes() {
		mux.HandleFunc(pattern, answer)
	}
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

func provider() providers.Provider {
	return providers.Provider{Object: &api.IdentityProvider{
		ObjectMeta: metav1.ObjectMeta{Name: "corp"},
		Spec:       api.IdentityProviderSpec{Domain: "corp.example", IssuerURL: "https://issuer", ClientID: "atoll", ClientSecretRef: &api.IdentityProviderSecretRef{Name: "s"}},
	}}
}

// ask returns status and body.
func ask(t *testing.T, s *httptest.Server, method, path, user, password, token, host, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, s.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	if token != "" {
		req.Header.Set("Authorization", "bearer "+token)
	}
	req.Host = host
	resp, err := s.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, strings.TrimSpace(string(text))
}

func TestRoutes(t *testing.T) {
	s := server(t, &fakePeople{}, provider())
	const wrong = `{"error":"wrong user name or password"}`
	for _, tt := range []struct {
		method, path, user, password, token, body string
		code                                      int
		want                                      string
	}{
		{"GET", "/wcp/loginbanner", "", "", "", "", 200, "be nice"},
		{"POST", "/wcp/login", "anna", "right", "", "{}", 200, `{"session_id":"whole"}`},
		{"POST", "/wcp/login", "anna", "right", "", "", 200, `{"session_id":"whole"}`},
		{"POST", "/wcp/login", "anna", "bad", "", "{}", 401, "wrong user name or password"},
		{"POST", "/wcp/login", "", "", "", "{}", 401, "wrong user name or password"},
		{"POST", "/wcp/login", "anna", "right", "", "{", 400, "the body is not JSON"},
		{"POST", "/wcp/login", "anna", "right", "", `{"guest_cluster_name":"c","guest_cluster_namespace":"n"}`, 501, "this supervisor has no guest clusters: log in without naming one"},
		{"POST", "/wcp/login", "anna", "old", "", "{}", 403, "the password must be changed before you can log in; do it with: atoll user passwd"},
		{"GET", "/wcp/login", "anna", "right", "", "", 405, "Method Not Allowed"},
		{"GET", "/wcp/workloads", "anna", "right", "", "", 200, `[{"namespace":"shop","master_host":"192.0.2.1","control_plane_api_server_port":"6443","conrol_plane_api_server_port":"6443","control_plane_dns_names":[]}]`},
		{"GET", "/wcp/workloads", "", "", "nonsense", "", 401, "you are not logged in: the token is unknown, expired or revoked"},
		{"POST", "/login/session", "anna", "right", "", "", 200, `{"user":"sso:anna@atoll.local","groups":[],"token":"short","expires":"1970-01-01T00:00:01Z","refreshToken":"refresh","sessionExpires":"1970-01-01T00:00:02Z"}`},
		{"POST", "/login/session", "anna", "bad", "", "", 401, wrong},
		{"POST", "/login/session", "anna", "old", "", "", 403, `{"error":"the password must be changed before you can log in; do it with: atoll user passwd","code":"mustChangePassword"}`},
		{"POST", "/login/session", "anna", "broken", "", "", 500, `{"error":"the server could not answer; its log says why"}`},
		{"POST", "/login/refresh", "", "", "short", "", 401, `{"error":"you are not logged in: the token is unknown, expired or revoked"}`},
		{"POST", "/login/logout", "", "", "short", "", 200, "{}"},
		{"POST", "/login/password", "anna", "old", "", `{"newPassword":"x"}`, 200, "{}"},
		{"POST", "/login/password", "anna", "bad", "", `{"newPassword":"x"}`, 401, wrong},
		{"POST", "/login/password", "anna", "old", "", `x`, 400, `{"error":"the body must be {\"newPassword\": \"...\"}"}`},
		{"GET", "/login/namespaces", "", "", "short", "", 200, `[{"namespace":"shop","role":"edit"}]`},
		{"GET", "/login/whoami", "", "", "", "", 401, `{"error":"you are not logged in: the token is unknown, expired or revoked"}`},
		{"POST", "/login/oidc/none/token", "", "", "", "", 400, `{"error":"grant_type must be one of authorization_code, refresh_token, urn:ietf:params:oauth:grant-type:device_code"}`},
	} {
		code, body := ask(t, s, tt.method, tt.path, tt.user, tt.password, tt.token, "", tt.body)
		if code != tt.code || body != tt.want {
			t.Errorf("%s %s as %s/%s: %d %s", tt.method, tt.path, tt.user, tt.password, code, body)
		}
	}
	if code, _ := ask(t, s, "POST", "/login/session", "anna", "locked", "", "", ""); code != 429 {
		t.Errorf("locked: %d", code)
	}
}

func TestWCPLeavesNoSession(t *testing.T) {
	people := &fakePeople{}
	s := server(t, people, provider())
	ask(t, s, "GET", "/wcp/workloads", "anna", "right", "", "", "")
	ask(t, s, "POST", "/wcp/login", "anna", "right", "", "", `{"guest_cluster_name":"c"}`)
	if len(people.ended) != 2 {
		t.Errorf("ended %v", people.ended)
	}
}

func TestHost(t *testing.T) {
	s := server(t, &fakePeople{}, provider())
	for host, want := range map[string]string{"supervisor.example:443": "supervisor.example", "evil.example": "192.0.2.1", "": "192.0.2.1"} {
		_, body := ask(t, s, "GET", "/login/info", "", "", "", host, "")
		var info Info
		if err := json.Unmarshal([]byte(body), &info); err != nil || info.APIServer != "https://"+want+":6443" || strings.Contains(body, "secret") {
			t.Errorf("%s: %s, %v", host, body, err)
		}
	}
}

// TestProxy: the secret goes to the issuer, and only what a person approved can be asked for.
func TestProxy(t *testing.T) {
	var got url.Values
	issuer := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		got = r.PostForm
		_, _ = io.WriteString(w, `{"id_token":"x"}`)
	}))
	defer issuer.Close()
	p := provider()
	p.Endpoints = providers.Endpoints{Token: issuer.URL + "/token"}
	p.Object.Spec.CertificateAuthority = pemOf(issuer)
	s := server(t, &fakePeople{}, p)
	post := func(path string, form url.Values) (int, string) {
		resp, err := http.PostForm(s.URL+path, form)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	code, body := post("/login/oidc/corp/token", url.Values{"grant_type": {"authorization_code"}, "code": {"c"}, "redirect_uri": {"http://127.0.0.1:1/callback"}, "client_id": {"other"}, "audience": {"x"}})
	if code != 200 || body != `{"id_token":"x"}` || got.Get("client_secret") != "the-secret" || got.Get("client_id") != "atoll" || got.Has("audience") {
		t.Errorf("%d %s, %v", code, body, got)
	}
	for _, form := range []url.Values{
		{"grant_type": {"client_credentials"}},
		{"grant_type": {"password"}, "username": {"a"}},
		{"grant_type": {"authorization_code"}, "redirect_uri": {"https://evil.example/"}},
		{"grant_type": {"authorization_code"}, "redirect_uri": {"http://127.0.0.1@evil.example/"}},
	} {
		if code, _ := post("/login/oidc/corp/token", form); code != 400 {
			t.Errorf("%v: %d", form, code)
		}
	}
	if code, _ := post("/login/oidc/corp/device", url.Values{}); code != 404 {
		t.Errorf("no device endpoint: %d", code)
	}
}

func FuzzBearer(f *testing.F) {
	f.Add("Bearer x")
	f.Add("Basic eDp5")
	f.Fuzz(func(t *testing.T, header string) {
		r := &http.Request{Header: http.Header{"Authorization": {header}}}
		if text := bearer(r); text != "" && !strings.Contains(header, text) {
			t.Errorf("%q from %q", text, header)
		}
	})
}

func pemOf(s *httptest.Server) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}
