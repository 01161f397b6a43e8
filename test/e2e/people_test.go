//go:build e2e

package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// fingerprint is what people are told of the portal's certificate.
func fingerprint(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(host(t, "", "login", "fingerprint"))
}

// TestPeopleLogIn: an administrator makes a user, who logs in, sees what is theirs, and nothing else.
func TestPeopleLogIn(t *testing.T) {
	host(t, "", "group", "create", "e2e-developers")
	t.Cleanup(func() { _, _ = tryHost(context.Background(), "", "group", "delete", "e2e-developers") })
	n := boundedNamespace(t, "peoplelogin", "--edit", "group:e2e-developers")
	anna := newActor(t, "e2e-anna", "e2e-developers")
	anna.login("--fingerprint", fingerprint(t))
	text, err := os.ReadFile(anna.kubeconfig)
	if err != nil || strings.Contains(string(text), "eyJ") || strings.Contains(string(text), anna.password) {
		t.Errorf("a secret is in the kubeconfig:\n%s", text)
	}
	if out, err := anna.try("", "config", "current-context"); err != nil || strings.TrimSpace(out) != n.name {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := anna.try("", "create", "configmap", "mine", "--from-literal=a=b"); err != nil {
		t.Errorf("in the own namespace: %v\n%s", err, out)
	}
	for _, args := range [][]string{
		{"get", "pods", "-n", "kube-system"},
		{"get", "users"},
		{"get", "secrets", "-n", "atoll-system"},
		{"patch", "group", "administrators", "--type=merge", "-p", `{"spec":{"members":["e2e-anna"]}}`},
		{"create", "clusterrolebinding", "x", "--clusterrole=cluster-admin", "--user=sso:e2e-anna@atoll.local"},
	} {
		if out, err := anna.try("", args...); err == nil || !strings.Contains(out, "orbidden") {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	if out, err := anna.atoll("", "whoami", "-o", "json"); err != nil || !strings.Contains(out, `"sso:e2e-developers@atoll.local"`) {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := anna.atoll("", "user", "ls"); err == nil || !strings.Contains(out, "only administrators") {
		t.Errorf("%s, %v", out, err)
	}
	checkPlugin(t, anna, n.name)
	if out, err := anna.atoll("", "logout"); err != nil {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := anna.try("", "get", "configmaps", "-n", n.name); err == nil {
		t.Errorf("after the logout: %s", out)
	}
}

// checkPlugin asks what kubectl vsphere login asks.
func checkPlugin(t *testing.T, p *actor, namespace string) {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // as the plug-in may
	t.Helper()
	want := http.StatusOK
	ask := func(method, path, body string, credentials func(*http.Request)) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "https://"+portal(t)+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if credentials != nil {
			credentials(req)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != want {
			t.Fatalf("%s %s: %s, %s, %v", method, path, resp.Status, text, err)
		}
		return string(text)
	}
	ask("GET", "/wcp/loginbanner", "", nil)
	var session struct {
		ID string `json:"session_id"`
	}
	answer := ask("POST", "/wcp/login", "{}", func(r *http.Request) { r.SetBasicAuth(p.name+"@atoll.local", p.password) })
	if err := json.Unmarshal([]byte(answer), &session); err != nil || strings.Count(session.ID, ".") != 2 {
		t.Fatalf("%s, %v", answer, err)
	}
	list := ask("GET", "/wcp/workloads", "", func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+session.ID) })
	contains(t, list, `"namespace":"`+namespace+`"`)
	want = http.StatusUnauthorized
	for name, password := range map[string]string{p.name: p.password + "x", p.name + "-nobody": p.password, "": ""} {
		if refused := ask("POST", "/wcp/login", "{}", func(r *http.Request) { r.SetBasicAuth(name+"@atoll.local", password) }); strings.Contains(refused, "session_id") {
			t.Errorf("a session for %q: %s", name, refused)
		}
	}
	ask("GET", "/wcp/workloads", "", func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+session.ID[:len(session.ID)-4]) })
	cmd := exec.CommandContext(t.Context(), suite.atoll, "kubectl", "--kubeconfig=/dev/null", "--server=https://"+strings.Split(portal(t), ":")[0]+":6443",
		"--insecure-skip-tls-verify", "--token="+session.ID, "get", "configmap", "mine", "-n", namespace)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("with the session id: %v\n%s", err, out)
	}
}

// guessed has somebody guess a person's password until it is locked. Then the right one is not taken, if it comes in time.
func (p *actor) guessed() {
	p.t.Helper()
	eventually(p.t, p.name+" to be locked", func() error {
		var ends time.Time
		for tries := 0; ends.IsZero(); tries++ {
			out, err := p.guess("wrong")
			if err == nil || tries == 30 {
				p.t.Fatalf("wrong password %d was taken, or locked nothing: %s", tries, out)
			}
			if _, at, found := strings.Cut(out, "try again after "); found {
				if ends, err = time.Parse(time.RFC3339, at[:min(len(at), len("2006-01-02T15:04:05Z"))]); err != nil {
					p.t.Fatal(err)
				}
			}
		}
		out, err := p.tryLogin(p.password)
		switch {
		case err == nil && time.Now().After(ends):
			return fmt.Errorf("it was over at %s", ends)
		case err == nil:
			p.t.Errorf("a locked user could log in: %s", out)
		}
		return nil
	})
}

// TestPeopleAreStopped: what ends a session does so within seconds, guessing locks, and the way out works.
func TestPeopleAreStopped(t *testing.T) {
	ben := newActor(t, "e2e-ben")
	stops := func(what string) {
		t.Helper()
		began := time.Now()
		eventually(t, what, func() error { return loggedOut(ben.try("", "auth", "whoami")) })
		t.Logf("%s: counts after %s", what, time.Since(began).Round(100*time.Millisecond))
	}
	ben.login("--fingerprint", fingerprint(t))
	ben.kubectl("auth", "whoami")
	host(t, "", "user", "revoke", ben.name)
	stops("revoked")
	ben.login()
	host(t, "", "user", "disable", ben.name)
	stops("disabled")
	host(t, "", "user", "enable", ben.name)
	right := ben.password
	eventually(t, "the user to be locked", func() error {
		for range 5 {
			out, err := ben.guess("wrong")
			if err == nil || !strings.Contains(out, "wrong user name or password") {
				t.Errorf("%s, %v", out, err)
			}
		}
		ends := (&namespace{t: t}).time("user/"+ben.name, ".status.lockedUntil")
		out, err := ben.atoll(right+"\n", "login", "--server", portal(t), "--user", ben.name, "--password-stdin")
		list := host(t, "", "user", "ls")
		if time.Now().After(ends) {
			host(t, "", "user", "unlock", ben.name)
			return errors.New("it was over before all was asked")
		}
		if err == nil || !strings.Contains(out, "too many failed logins") {
			t.Errorf("%s, %v", out, err)
		}
		contains(t, list, "Locked until")
		return nil
	})
	_, made, _ := strings.Cut(host(t, "", "user", "reset-password", ben.name), "(shown this once): ")
	made = strings.TrimSpace(made)
	if out, err := ben.atoll(made+"\n", "login", "--server", portal(t), "--user", ben.name, "--password-stdin"); err == nil || !strings.Contains(out, "must be changed") {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := ben.atoll(made+"\n"+right+"!\n", "user", "passwd", "--server", portal(t), "--user", ben.name, "--password-stdin"); err != nil {
		t.Errorf("%s, %v", out, err)
	}
	ben.password = right + "!"
	ben.login()
	if out, err := ben.atoll(ben.password+"\n", "login", "--server", portal(t), "--user", ben.name, "--password-stdin", "--ca-file", "/dev/null"); err == nil {
		t.Errorf("without an authority: %s", out)
	}
}
