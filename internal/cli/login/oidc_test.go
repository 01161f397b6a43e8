package login

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/identity"
	wire "atoll.dev/atoll/internal/identity/login"
)

// issuer hands out ID tokens that nobody checks here.
type issuer struct {
	*httptest.Server
	mu sync.Mutex
	// nonce and challenge are those of the login that was begun; asked counts questions about the device.
	nonce, challenge string
	asked            int
	life             time.Duration
	grants           []string
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{life: time.Hour}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /device", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"device_code":"d","user_code":"WXYZ","verification_uri":"https://issuer/activate","expires_in":60,"interval":1}`)
	})
	mux.HandleFunc("POST /token", i.token)
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	return i
}

func (i *issuer) token(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := r.ParseForm(); err != nil {
		http.Error(w, "form", http.StatusBadRequest)
		return
	}
	grant := r.PostForm.Get("grant_type")
	i.grants = append(i.grants, grant)
	sum := sha256.Sum256([]byte(r.PostForm.Get("code_verifier")))
	w.Header().Set("Content-Type", "application/json")
	switch {
	case grant == "authorization_code" && (r.PostForm.Get("code") != "c" || base64.RawURLEncoding.EncodeToString(sum[:]) != i.challenge):
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"error":"invalid_grant"}`)
		return
	case strings.HasSuffix(grant, "device_code"):
		if i.asked++; i.asked == 1 {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, `{"error":"authorization_pending"}`)
			return
		}
	}
	payload, _ := json.Marshal(map[string]any{"exp": time.Now().Add(i.life).Unix(), "nonce": i.nonce, "grant": grant})
	_ = json.NewEncoder(w).Encode(map[string]any{
		"access_token": "a", "token_type": "Bearer", "refresh_token": "r", "expires_in": 3600,
		"id_token": "eyJ." + base64.RawURLEncoding.EncodeToString(payload) + ".x",
	})
}

// supervisorOf knows the issuer, and passes on what goes through it when it is proxied.
func supervisorOf(t *testing.T, i *issuer, proxied bool) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /login/info", func(w http.ResponseWriter, _ *http.Request) {
		p := wire.Issuer{
			Name: "corp", Issuer: i.URL, ClientID: "atoll", Scopes: []string{"openid"}, Authorization: i.URL + "/auth", Token: i.URL + "/token", Device: i.URL + "/device",
			CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw})), Proxied: proxied,
		}
		if proxied {
			p.CA, p.Token, p.Device = "", "https://127.0.0.1:1/token", "https://127.0.0.1:1/device"
		}
		_ = json.NewEncoder(w).Encode(wire.Info{APIServer: "https://192.0.2.1:6443", CA: "PEM", Providers: []wire.Issuer{p}})
	})
	mux.HandleFunc("POST /login/oidc/corp/{endpoint}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("endpoint") == "token" {
			i.token(w, r)
			return
		}
		i.Config.Handler.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/device", nil))
	})
	mux.HandleFunc("GET /login/whoami", func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer eyJ.") {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_ = json.NewEncoder(w).Encode(wire.Who{User: "sso:dora@corp.example"})
	})
	mux.HandleFunc("GET /login/namespaces", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode([]identity.Access{})
	})
	s := httptest.NewTLSServer(mux)
	t.Cleanup(s.Close)
	return s
}

// terminal is what the person reads; answer is called with it until it returns true.
type terminal struct {
	mu     sync.Mutex
	buf    bytes.Buffer
	answer func(text string) bool
}

func (t *terminal) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(b)
	if t.answer != nil && t.answer(t.buf.String()) {
		t.answer = nil
	}
	return len(b), nil
}

func loginForeign(t *testing.T, s *httptest.Server, home string, screen *terminal, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := loginCommand(Config{
		App: command.App{In: strings.NewReader(""), Out: &out, ErrOut: screen}, Home: home, Getenv: func(string) string { return "" },
	})
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs(append([]string{"--server", s.Listener.Addr().String(), "--provider", "corp", "--fingerprint", fingerprint(s.Certificate()), "--no-browser"}, args...))
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func TestDeviceFlow(t *testing.T) {
	for _, proxied := range []bool{false, true} {
		t.Run(fmt.Sprintf("proxied=%v", proxied), func(t *testing.T) {
			i := newIssuer(t)
			i.life = 10 * time.Second // so that it must be refreshed at once
			s := supervisorOf(t, i, proxied)
			home, screen := t.TempDir(), &terminal{}
			out, err := loginForeign(t, s, home, screen, "--flow", "device")
			if err != nil || !strings.Contains(out, "Logged in as dora@corp.example") || !strings.Contains(screen.buf.String(), "WXYZ") {
				t.Fatalf("%s, %s, %v", out, screen.buf.String(), err)
			}
			c := newCommand(Config{App: command.App{In: strings.NewReader("")}, Home: home})
			files, err := c.logins("")
			if err != nil || len(files) != 1 {
				t.Fatalf("%v, %v", files, err)
			}
			i.life = time.Hour
			out, err = run(t, home, "", "login", "credential", "--cache", files[0])
			if err != nil || !strings.Contains(out, `"token":"eyJ.`) || i.grants[len(i.grants)-1] != "refresh_token" {
				t.Errorf("%s, %v, %v", out, i.grants, err)
			}
			if out, err := run(t, home, "", "logout"); err != nil {
				t.Errorf("%s, %v", out, err)
			}
		})
	}
}

func TestBrowserFlow(t *testing.T) {
	for name, tt := range map[string]struct {
		tamper func(q url.Values)
		nonce  string
		want   string
	}{
		"works":         {},
		"refused":       {tamper: func(q url.Values) { q.Del("code"); q.Set("error", "access_denied") }, want: "access_denied"},
		"stolen code":   {tamper: func(q url.Values) { q.Set("code", "other") }, want: "invalid_grant"},
		"another login": {nonce: "other", want: "the token of another login"},
	} {
		t.Run(name, func(t *testing.T) {
			i := newIssuer(t)
			s := supervisorOf(t, i, false)
			address := regexp.MustCompile(`https://\S+/auth\?\S+`)
			var visits sync.WaitGroup
			screen := &terminal{answer: func(text string) bool {
				at := address.FindString(text)
				if at == "" {
					return false
				}
				u, err := url.Parse(at)
				if err != nil {
					t.Error(err)
					return true
				}
				asked := u.Query()
				i.mu.Lock()
				i.nonce, i.challenge = asked.Get("nonce"), asked.Get("code_challenge")
				if tt.nonce != "" {
					i.nonce = tt.nonce
				}
				i.mu.Unlock()
				visits.Go(func() { visit(t, asked, tt.tamper) })
				return true
			}}
			out, err := loginForeign(t, s, t.TempDir(), screen, "--flow", "browser")
			visits.Wait()
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s, %v", out, err)
			}
		})
	}
}

// visit is the browser coming back from the issuer: first somebody else's page, then the right one.
func visit(t *testing.T, asked url.Values, tamper func(url.Values)) {
	forged := url.Values{"state": {"forged"}, "code": {"c"}}
	if resp, err := http.Get(asked.Get("redirect_uri") + "?" + forged.Encode()); err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a forged state: %v", errors.Join(err))
	}
	q := url.Values{"state": {asked.Get("state")}, "code": {"c"}}
	if tamper != nil {
		tamper(q)
	}
	resp, err := http.Get(asked.Get("redirect_uri") + "?" + q.Encode())
	if err != nil {
		t.Error(err)
		return
	}
	_ = resp.Body.Close()
}
