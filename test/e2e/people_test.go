//go:build e2e

package e2e

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// person is somebody with a home directory and a password, on a machine of their own.
type person struct {
	t              *testing.T
	name, password string
	home           string
}

// newPerson makes a user that goes with the test.
func newPerson(t *testing.T, name string, groups ...string) *person {
	t.Helper()
	p := &person{t: t, name: name, password: "a password of " + strings.ToUpper(fmt.Sprintf("%x", name)), home: t.TempDir()}
	args := []string{"user", "create", name, "--must-change=false", "--password-stdin"}
	for _, g := range groups {
		args = append(args, "--group", g)
	}
	t.Cleanup(func() { _, _ = asRoot("", "user", "delete", name) })
	if out, err := asRoot(p.password+"\n", args...); err != nil {
		t.Fatalf("making %s: %v\n%s", name, err, out)
	}
	return p
}

// asRoot runs atoll on the host, with the administrator's kubeconfig.
func asRoot(stdin string, args ...string) (string, error) {
	cmd := exec.Command(suite.atoll, append(args, "--data-dir", suite.dataDir)...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "KUBECONFIG=")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// atoll runs a command as the person, who has nothing but a home directory.
func (p *person) atoll(stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(p.t.Context(), suite.atoll, args...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = []string{"HOME=" + p.home, "PATH=" + os.Getenv("PATH"), "ATOLL_DATA_DIR=" + filepath.Join(p.home, "none")}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

// kubectl runs kubectl with the kubeconfig that the login wrote.
func (p *person) kubectl(args ...string) (string, error) {
	return p.atoll("", append([]string{"kubectl"}, args...)...)
}

// login logs in, checking the certificate by its fingerprint.
func (p *person) login() {
	p.t.Helper()
	began := time.Now()
	eventually(p.t, "logging in as "+p.name, func() error {
		out, err := p.atoll(p.password+"\n", "login", "--server", portalAddress(p.t), "--user", p.name, "--password-stdin", "--fingerprint", hostFingerprint(p.t))
		if err != nil && !strings.Contains(out, "too many failed logins") { // by attackers beside us, from the same address
			p.t.Fatalf("logging in as %s: %v\n%s", p.name, err, out)
		}
		return err
	})
	p.t.Logf("login of %s: %s", p.name, time.Since(began).Round(time.Millisecond))
}

func hostFingerprint(t *testing.T) string {
	t.Helper()
	out, err := asRoot("", "login", "fingerprint")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return strings.TrimSpace(out)
}

// portalAddress is where the suite's portal is.
func portalAddress(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(suite.dataDir, "settings.json"))
	if err != nil {
		t.Fatal(err)
	}
	var settings struct {
		PortalPort int `json:"portalPort"`
	}
	if err := json.Unmarshal(b, &settings); err != nil {
		t.Fatal(err)
	}
	ip := strings.TrimSpace(run(t, "", "get", "nodes", "-o", `jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}`))
	return fmt.Sprintf("%s:%d", ip, settings.PortalPort)
}

// TestPeopleLogIn: an administrator makes a user, who logs in, sees what is theirs, and nothing else.
func TestPeopleLogIn(t *testing.T) {
	if out, err := asRoot("", "group", "create", "e2e-developers"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Cleanup(func() { _, _ = asRoot("", "group", "delete", "e2e-developers") })
	anna := newPerson(t, "e2e-anna", "e2e-developers")
	n := newNamespace(t)
	run(t, "", "label", "namespace", n.name, "atoll.dev/supervisor-namespace="+n.name)
	run(t, fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: atoll-edit, namespace: %[1]s, labels: {atoll.dev/supervisor-namespace: %[1]s}}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "sso:e2e-developers@atoll.local"}]
`, n.name), "apply", "-f", "-")

	anna.login()
	config := filepath.Join(anna.home, ".kube", "config")
	if info, err := os.Stat(config); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	text, err := os.ReadFile(config)
	if err != nil || strings.Contains(string(text), "eyJ") || strings.Contains(string(text), anna.password) {
		t.Errorf("a secret is in the kubeconfig:\n%s", text)
	}
	if out, err := anna.kubectl("config", "current-context"); err != nil || strings.TrimSpace(out) != n.name {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := anna.kubectl("create", "configmap", "mine", "--from-literal=a=b"); err != nil {
		t.Errorf("in the own namespace: %v\n%s", err, out)
	}
	for _, args := range [][]string{
		{"get", "pods", "-n", "kube-system"},
		{"get", "users"},
		{"get", "secrets", "-n", "atoll-system"},
		{"patch", "group", "administrators", "--type=merge", "-p", `{"spec":{"members":["e2e-anna"]}}`},
		{"create", "clusterrolebinding", "x", "--clusterrole=cluster-admin", "--user=sso:e2e-anna@atoll.local"},
	} {
		if out, err := anna.kubectl(args...); err == nil || !strings.Contains(out, "orbidden") {
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
	if out, err := anna.kubectl("get", "configmaps", "-n", n.name); err == nil {
		t.Errorf("after the logout: %s", out)
	}
}

// checkPlugin asks what kubectl vsphere login asks.
func checkPlugin(t *testing.T, p *person, namespace string) {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // as the plug-in may
	ask := func(method, path, body string, credentials func(*http.Request)) string {
		req, err := http.NewRequestWithContext(t.Context(), method, "https://"+portalAddress(t)+path, strings.NewReader(body))
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
		if err != nil || resp.StatusCode != http.StatusOK {
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
	cmd := exec.CommandContext(t.Context(), suite.atoll, "kubectl", "--kubeconfig=/dev/null", "--server=https://"+strings.Split(portalAddress(t), ":")[0]+":6443",
		"--insecure-skip-tls-verify", "--token="+session.ID, "get", "configmap", "mine", "-n", namespace)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("with the session id: %v\n%s", err, out)
	}
}

// TestPeopleAreStopped: what ends a session does so within seconds, guessing locks, and the way out works.
func TestPeopleAreStopped(t *testing.T) {
	ben := newPerson(t, "e2e-ben")
	works := func() error {
		_, err := ben.kubectl("auth", "whoami")
		return err
	}
	stops := func(what string) {
		t.Helper()
		began := time.Now()
		eventually(t, what, func() error {
			if works() == nil {
				return errors.New("still works")
			}
			return nil
		})
		t.Logf("%s: counts after %s", what, time.Since(began).Round(100*time.Millisecond))
	}
	ben.login()
	if err := works(); err != nil {
		t.Fatal(err)
	}
	if out, err := asRoot("", "user", "revoke", ben.name); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	stops("revoked")
	ben.login()
	if out, err := asRoot("", "user", "disable", ben.name); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	stops("disabled")
	if out, err := asRoot("", "user", "enable", ben.name); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	right := ben.password
	for range 5 {
		out, err := ben.atoll("wrong\n", "login", "--server", portalAddress(t), "--user", ben.name, "--password-stdin")
		if err == nil || !strings.Contains(out, "wrong user name or password") {
			t.Errorf("%s, %v", out, err)
		}
	}
	if out, err := ben.atoll(right+"\n", "login", "--server", portalAddress(t), "--user", ben.name, "--password-stdin"); err == nil || !strings.Contains(out, "too many failed logins") {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := asRoot("", "user", "ls"); err != nil || !strings.Contains(out, "Locked until") {
		t.Errorf("%s, %v", out, err)
	}
	out, err := asRoot("", "user", "reset-password", ben.name)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, made, _ := strings.Cut(out, "(shown this once): ")
	made = strings.TrimSpace(made)
	if out, err := ben.atoll(made+"\n", "login", "--server", portalAddress(t), "--user", ben.name, "--password-stdin"); err == nil || !strings.Contains(out, "must be changed") {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := ben.atoll(made+"\n"+right+"!\n", "user", "passwd", "--server", portalAddress(t), "--user", ben.name, "--password-stdin"); err != nil {
		t.Errorf("%s, %v", out, err)
	}
	ben.password = right + "!"
	ben.login()
	if out, err := ben.atoll(ben.password+"\n", "login", "--server", portalAddress(t), "--user", ben.name, "--password-stdin", "--ca-file", "/dev/null"); err == nil {
		t.Errorf("without an authority: %s", out)
	}
}
