package login

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/identity"
	wire "atoll.dev/atoll/internal/identity/login"
)

func TestParseServer(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1": "192.0.2.1:443", "https://sv.example/": "sv.example:443", "sv.example:8443": "sv.example:8443", "[2001:db8::1]": "[2001:db8::1]:443",
		"http://x": "", "": "", "https://u:p@x": "", "x/y": "", "x:0": "", "x:99999": "", "x?y": "", "https://": "",
	} {
		got, err := parseServer(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func login(user string) cached { return cached{Server: "192.0.2.1:443", User: user} }

func TestMerge(t *testing.T) {
	config := clientcmdapi.NewConfig()
	config.Clusters["other"] = &clientcmdapi.Cluster{Server: "https://other"}
	config.Contexts["shop"] = &clientcmdapi.Context{Cluster: "other", AuthInfo: "me"}
	e := entry{
		login: login("anna@atoll.local"), file: "/c.json", apiServer: "https://192.0.2.1:6443", ca: "PEM", executable: "/bin/atoll",
		namespaces: []identity.Access{{Namespace: "shop"}, {Namespace: "lab"}},
	}
	if got := merge(config, e); !slices.Equal(got, []string{"192.0.2.1", "shop-192.0.2.1", "lab"}) {
		t.Errorf("contexts %v", got)
	}
	if config.CurrentContext != "192.0.2.1" || config.Contexts["shop"].Cluster != "other" || config.Contexts["lab"].Namespace != "lab" {
		t.Errorf("%+v", config)
	}
	if got := cacheOf(config, "lab"); got != "/c.json" || cacheOf(config, "shop") != "" {
		t.Errorf("cache %q", got)
	}
	e.namespaces = e.namespaces[:1]
	merge(config, e)
	if config.Contexts["lab"] != nil || config.CurrentContext != "shop-192.0.2.1" {
		t.Errorf("a namespace that is not there any more: %+v", config.Contexts)
	}
	b := e
	b.login.User = "ben@atoll.local"
	merge(config, b)
	if config.Contexts["shop-192.0.2.1"].AuthInfo != "atoll:192.0.2.1:443:ben@atoll.local" {
		t.Errorf("%+v", config.Contexts["shop-192.0.2.1"])
	}
	remove(config, b.login)
	remove(config, e.login)
	if len(config.Contexts) != 1 || len(config.Clusters) != 1 || len(config.AuthInfos) != 0 || config.CurrentContext != "" {
		t.Errorf("something is left: %+v", config)
	}
}

// supervisor is a portal that knows anna.
func supervisor(t *testing.T) *httptest.Server {
	t.Helper()
	refreshed := 0
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }
	session := func(token string) wire.Session {
		return wire.Session{User: "sso:anna@atoll.local", Token: token, Expires: time.Now().Add(10 * time.Second), RefreshToken: "r", SessionExpires: time.Now().Add(time.Hour)}
	}
	mux.HandleFunc("GET /login/info", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, wire.Info{APIServer: "https://192.0.2.1:6443", CA: "PEM"})
	})
	mux.HandleFunc("POST /login/session", func(w http.ResponseWriter, r *http.Request) {
		if _, password, _ := r.BasicAuth(); password != "right" {
			w.WriteHeader(http.StatusUnauthorized)
			answer(w, wire.Failure{Error: "wrong user name or password"})
			return
		}
		answer(w, session("t0"))
	})
	mux.HandleFunc("POST /login/refresh", func(w http.ResponseWriter, _ *http.Request) {
		refreshed++
		if refreshed > 1 {
			w.WriteHeader(http.StatusUnauthorized)
			answer(w, wire.Failure{Error: "no"})
			return
		}
		answer(w, session("t1"))
	})
	mux.HandleFunc("POST /login/logout", func(w http.ResponseWriter, _ *http.Request) { answer(w, struct{}{}) })
	mux.HandleFunc("GET /login/whoami", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, wire.Who{User: "sso:anna@atoll.local", Groups: []string{"g"}})
	})
	mux.HandleFunc("GET /login/namespaces", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, []identity.Access{{Namespace: "shop", Role: "edit"}})
	})
	s := httptest.NewTLSServer(mux)
	t.Cleanup(s.Close)
	return s
}

// run runs a command line in a home directory.
func run(t *testing.T, home, input string, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cfg := Config{
		App: command.App{In: strings.NewReader(input), Out: &out, ErrOut: io.Discard}, Home: home, Getenv: func(string) string { return "" },
	}
	for _, cmd := range Commands(cfg) {
		if cmd.Name() != args[0] {
			continue
		}
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		cmd.SetArgs(args[1:])
		err := cmd.ExecuteContext(context.Background())
		return out.String(), err
	}
	return "", errors.New("no such command")
}

func TestLoginLogout(t *testing.T) {
	s := supervisor(t)
	home, address := t.TempDir(), s.Listener.Addr().String()
	shown := fingerprint(s.Certificate())
	for name, args := range map[string][]string{
		"unknown authority":  {"--password-stdin"},
		"wrong fingerprint":  {"--password-stdin", "--fingerprint", "SHA256:x"},
		"no password":        {"--fingerprint", shown},
		"contradiction":      {"--insecure-skip-tls-verify", "--fingerprint", shown},
		"a provider as well": {"--provider", "corp"},
	} {
		if out, err := run(t, t.TempDir(), "right\n", append([]string{"login", "--server", address, "--user", "anna"}, args...)...); err == nil {
			t.Errorf("%s: %s", name, out)
		}
	}
	if _, err := run(t, home, "wrong\n", "login", "--server", address, "--user", "anna", "--password-stdin", "--fingerprint", shown); err == nil || err.Error() != "wrong user name or password" {
		t.Errorf("error %v", err)
	}
	out, err := run(t, home, "right\n", "login", "--server", "https://"+address+"/", "--user", "anna", "--password-stdin", "--fingerprint", shown)
	if err != nil || !strings.Contains(out, "Logged in as anna@atoll.local") || !strings.Contains(out, "shop") {
		t.Fatalf("%s, %v", out, err)
	}
	file := filepath.Join(home, ".kube", "config")
	config, err := clientcmd.LoadFromFile(file)
	if err != nil || config.CurrentContext != "shop" || config.AuthInfos["atoll:"+address+":anna@atoll.local"].Token != "" {
		t.Fatalf("%+v, %v", config, err)
	}
	cache := cacheOf(config, "shop")
	for _, f := range []string{file, cache} {
		if info, err := os.Stat(f); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, info, err)
		}
	}
	if text, _ := os.ReadFile(file); strings.Contains(string(text), "t0") || strings.Contains(string(text), "right") {
		t.Errorf("a secret is in the kubeconfig:\n%s", text)
	}
	// The token is good for ten seconds only, so it is refreshed; the second time the session has ended.
	out, err = run(t, home, "", "login", "credential", "--cache", cache)
	if err != nil || !strings.Contains(out, `"token":"t1"`) || !strings.Contains(out, `"kind":"ExecCredential"`) {
		t.Errorf("%s, %v", out, err)
	}
	if _, err = run(t, home, "", "login", "credential", "--cache", cache); err == nil || !strings.Contains(err.Error(), "atoll login --server") {
		t.Errorf("error %v", err)
	}
	if out, err = run(t, home, "", "logout"); err != nil {
		t.Errorf("%s, %v", out, err)
	}
	config, err = clientcmd.LoadFromFile(file)
	if err != nil || len(config.Contexts)+len(config.AuthInfos)+len(config.Clusters) != 0 {
		t.Errorf("%+v, %v", config, err)
	}
	if _, err := os.Stat(cache); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the login is left: %v", err)
	}
	if _, err := run(t, home, "", "whoami"); err == nil || !strings.Contains(err.Error(), "not logged in") {
		t.Errorf("error %v", err)
	}
}

// TestAnotherServer: a server that was confirmed must not become another one.
func TestAnotherServer(t *testing.T) {
	s := supervisor(t)
	home, address := t.TempDir(), s.Listener.Addr().String()
	other := `-----BEGIN CERTIFICATE-----
` // not a certificate: nothing verifies against it
	c := newCommand(Config{App: command.App{In: strings.NewReader(""), ErrOut: io.Discard}, Home: home})
	if err := os.MkdirAll(filepath.Dir(c.knownFile(address)), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.knownFile(address), []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := run(t, home, "right\n", "login", "--server", address, "--user", "anna", "--password-stdin", "--fingerprint", fingerprint(s.Certificate()))
	if err == nil || !strings.Contains(err.Error(), "another certificate than before") {
		t.Errorf("error %v", err)
	}
	ca := filepath.Join(home, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run(t, home, "right\n", "login", "--server", address, "--user", "anna", "--password-stdin", "--ca-file", ca); err != nil {
		t.Errorf("%s, %v", out, err)
	}
}

func TestLockedKubeconfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file+".lock", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := changeKubeconfig(file, func(*clientcmdapi.Config) {}); err == nil || !strings.Contains(err.Error(), "another program") {
		t.Errorf("error %v", err)
	}
}
