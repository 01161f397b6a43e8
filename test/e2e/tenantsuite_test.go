//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// actor is somebody with an account, a session and a kubeconfig of their own. Nothing that they do uses the
// administrator's.
type actor struct {
	t          *testing.T
	name       string
	password   string
	home       string
	kubeconfig string
}

// newActor makes a local user, who logs in. The user goes with the test.
func newActor(t *testing.T, name string, groups ...string) *actor {
	t.Helper()
	p := account(t, name)
	p.password = rand.Text()
	p.create(groups...)
	t.Cleanup(func() {
		if out, err := tryHost(context.Background(), "", "user", "delete", name); err != nil {
			t.Errorf("removing the user: %v\n%s", err, out)
		}
	})
	p.login()
	return p
}

// account is a person with a home, and nothing in it.
func account(t *testing.T, name string) *actor {
	t.Helper()
	home := t.TempDir()
	return &actor{t: t, name: name, home: home, kubeconfig: filepath.Join(home, ".kube", "config")}
}

// create makes the user.
func (p *actor) create(groups ...string) {
	p.t.Helper()
	args := []string{"user", "create", p.name, "--must-change=false", "--password-stdin"}
	for _, g := range groups {
		args = append(args, "--group", g)
	}
	host(p.t, p.password+"\n", args...)
}

// login gets a new session; trust are the flags that say how the certificate is checked.
func (p *actor) login(trust ...string) {
	p.t.Helper()
	eventually(p.t, "logging in as "+p.name, func() error {
		out, err := p.tryLogin(p.password, trust...)
		if err != nil && strings.Contains(out, "wrong user name or password") {
			p.t.Fatalf("%v\n%s", err, out)
		}
		return err
	})
	for _, file := range append([]string{p.kubeconfig}, p.sessions()...) {
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			p.t.Errorf("%s of %s: %v %v, want mode 0600", file, p.name, info, err)
		}
	}
}

// sessions are the files of logins.
func (p *actor) sessions() []string {
	files, err := filepath.Glob(filepath.Join(p.home, ".kube", "atoll", "*.json"))
	if err != nil {
		p.t.Fatal(err)
	}
	return files
}

func (p *actor) tryLogin(password string, trust ...string) (string, error) {
	if len(trust) == 0 {
		trust = []string{"--ca-file", portalCA(p.t)}
	}
	return p.atoll(password+"\n", p.loginArgs(trust...)...)
}

func (p *actor) loginArgs(trust ...string) []string {
	return append([]string{"login", "--server", portal(p.t), "--user", p.name, "--password-stdin"}, trust...)
}

// atoll runs a command as this person would at home, where no supervisor is.
func (p *actor) atoll(stdin string, args ...string) (string, error) {
	return combined(p.t.Context(), stdin, p.env(), args...)
}

func (p *actor) env() []string {
	return []string{"HOME=" + p.home, "KUBECONFIG=" + p.kubeconfig, "ATOLL_DATA_DIR=" + filepath.Join(p.home, "none")}
}

// try is kubectl as this person.
func (p *actor) try(stdin string, args ...string) (string, error) {
	return p.atoll(stdin, append([]string{"kubectl"}, args...)...)
}

// kubectl is for what must succeed.
func (p *actor) kubectl(args ...string) string {
	p.t.Helper()
	out, err := p.try("", args...)
	if err != nil {
		p.t.Fatalf("as %s: %v", p.name, err)
	}
	return out
}

func (p *actor) apply(namespace, yaml string) {
	p.t.Helper()
	if _, err := p.try(yaml, "-n", namespace, "apply", "-f", "-"); err != nil {
		p.t.Fatalf("as %s: %v", p.name, err)
	}
}

// applySoon is apply of what a change of the namespace allows: admission hears of it a moment after the status has it.
func (p *actor) applySoon(namespace, yaml string) {
	p.t.Helper()
	eventually(p.t, p.name+" to be allowed to apply", func() error {
		_, err := p.try(yaml, "-n", namespace, "apply", "-f", "-")
		return err
	})
}

// refusedSoon is refused for what such a change forbids.
func (p *actor) refusedSoon(namespace, yaml string, wants ...string) {
	p.t.Helper()
	eventually(p.t, p.name+" to be refused", func() error {
		out, err := p.try(yaml, "-n", namespace, "apply", "--dry-run=server", "-f", "-")
		for _, want := range wants {
			if err == nil || !strings.Contains(out, want) {
				return fmt.Errorf("%q is not in: %s", want, out)
			}
		}
		return nil
	})
	p.refused(namespace, yaml, wants...)
}

// refused applies what must be refused for the reason given.
func (p *actor) refused(namespace, yaml string, wants ...string) {
	p.t.Helper()
	out, err := p.try(yaml, "-n", namespace, "apply", "-f", "-")
	if err == nil {
		p.t.Errorf("%s was allowed to apply:\n%s", p.name, yaml)
		return
	}
	p.says(out, wants...)
}

// denied runs kubectl, which must be refused for the reason given.
func (p *actor) denied(args []string, wants ...string) {
	p.t.Helper()
	out, err := p.try("", args...)
	if err == nil {
		p.t.Errorf("%s was allowed to: kubectl %s\n%s", p.name, strings.Join(args, " "), out)
		return
	}
	p.says(out, wants...)
}

func (p *actor) says(got string, wants ...string) {
	p.t.Helper()
	for _, want := range wants {
		if !strings.Contains(got, want) {
			p.t.Errorf("as %s: %q is not in: %s", p.name, want, got)
		}
	}
}

// can asks the API server what `kubectl auth can-i` asks it; where is -n NAMESPACE, or -A, or nothing.
func (p *actor) can(verb, resource string, where ...string) bool {
	p.t.Helper()
	namespace := ""
	if len(where) == 2 {
		namespace = where[1]
	}
	resource, group, _ := strings.Cut(resource, ".")
	resource, sub, _ := strings.Cut(resource, "/")
	body, err := json.Marshal(map[string]any{
		"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
		"spec": map[string]any{"resourceAttributes": map[string]string{"namespace": namespace, "verb": verb, "group": group, "resource": resource, "subresource": sub}},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	var answer struct{ Status struct{ Allowed bool } }
	if code := p.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body, &answer); code != http.StatusCreated {
		p.t.Fatalf("asking what %s may: status %d", p.name, code)
	}
	return answer.Status.Allowed
}

// mayCreate waits until somebody can make what a controller lets them make.
func (p *actor) mayCreate(resource string, where ...string) {
	p.t.Helper()
	eventually(p.t, p.name+" to be allowed to create "+resource, func() error {
		return is(fmt.Sprint(p.can("create", resource, where...)), "true")
	})
}

// loggedOut is nil if kubectl was refused because nobody knows any more whose token it has.
func loggedOut(out string, err error) error {
	for _, text := range []string{"nauthorized", "must be logged in", " has ended; run: atoll login"} {
		if err != nil && strings.Contains(out, text) {
			return nil
		}
	}
	return fmt.Errorf("%w: %s", err, out)
}

// token is that of the session, and another one when it is about to expire.
func (p *actor) token() string {
	p.t.Helper()
	var login struct {
		Token   string
		Expires time.Time
	}
	eventually(p.t, "a token of "+p.name, func() error {
		for _, file := range p.sessions() {
			if b, err := os.ReadFile(file); err != nil || json.Unmarshal(b, &login) != nil {
				p.t.Fatalf("reading the session of %s: %v", p.name, err)
			}
		}
		if time.Until(login.Expires) > 30*time.Second {
			return nil
		}
		_, err := p.atoll("", "whoami") // gets another one from there on
		return errors.Join(err, fmt.Errorf("it expires at %s", login.Expires))
	})
	return login.Token
}

// post sends an object to the API server as this person.
func (p *actor) post(path string, body []byte, into any) (code int) {
	p.t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(clusterCA(p.t))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(p.t.Context(), http.MethodPost, "https://"+net.JoinHostPort(nodeAddress(p.t), "6443")+path, bytes.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+p.token())
	req.Header.Set("Content-Type", "application/json")
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode
}

// tenant is a SupervisorNamespace with an owner, somebody with the role Edit and a viewer.
type tenant struct {
	*namespace
	owner, editor, viewer *actor

	administrator *actor // who declares it; nil is the administrator of the host
}

// newTenant makes one; spec is more of the object's spec, as members of a JSON object.
func newTenant(t *testing.T, suffix, spec string) *tenant {
	t.Helper()
	n := people(t, suffix)
	n.begin(spec)
	return n
}

// administered is a tenant that an administrator has declared who has logged in like everybody else.
func administered(t *testing.T, spec string) *tenant {
	t.Helper()
	n := people(t, "")
	n.administrator = newActor(t, n.name+"-administrator", "administrators")
	n.begin(spec)
	return n
}

// people are those of a tenant that is still to be declared.
func people(t *testing.T, suffix string) *tenant {
	t.Helper()
	name := strings.ToLower(strings.TrimPrefix(strings.ReplaceAll(t.Name(), "/", "-"), "Test"))
	name = strings.TrimRight(name[:min(len(name), 40)], "-") + suffix
	n := &tenant{namespace: &namespace{t: t, name: name}}
	n.owner, n.editor, n.viewer = newActor(t, name+"-owner"), newActor(t, name+"-editor"), newActor(t, name+"-viewer")
	return n
}

// begin declares the SupervisorNamespace, which goes with the test.
func (n *tenant) begin(spec string) {
	n.t.Helper()
	n.declare(spec)
	n.t.Cleanup(func() {
		if n.t.Failed() {
			n.describe()
			out, _ := kubectl(context.Background(), "", "get", "supervisornamespace", n.name, "-o", "yaml")
			n.t.Log(out)
		}
		n.remove()
	})
	n.account()
	n.editor.mayCreate("pods", "-n", n.name)
}

// declare makes the SupervisorNamespace what the spec says, and waits until it is in place.
func (n *tenant) declare(spec string) {
	n.t.Helper()
	n.want(spec)
	n.settled()
}

// want makes the SupervisorNamespace what the spec says.
func (n *tenant) want(spec string) {
	n.t.Helper()
	access := fmt.Sprintf(`[{"subjectType": "User", "subject": %q, "role": "Owner"}, {"subjectType": "User", "subject": %q, "role": "Edit"}, {"subjectType": "User", "subject": %q, "role": "View"}]`,
		n.owner.name, n.editor.name, n.viewer.name)
	if spec != "" {
		spec = ", " + spec
	}
	object := fmt.Sprintf(`{"apiVersion": "atoll.dev/v1alpha1", "kind": "SupervisorNamespace", "metadata": {"name": %q}, "spec": {"accessList": %s%s}}`, n.name, access, spec)
	if n.administrator != nil {
		n.administrator.apply("default", object)
		return
	}
	run(n.t, object, "apply", "-f", "-")
}

// settled waits until the controller has seen the latest spec and put it in place.
func (n *tenant) settled() {
	n.t.Helper()
	eventually(n.t, "SupervisorNamespace "+n.name+" to be ready", func() error {
		s, err := n.tryStatus()
		if err != nil {
			return err
		}
		if s.Metadata.Generation != s.Status.ObservedGeneration {
			return fmt.Errorf("it has seen generation %d of %d", s.Status.ObservedGeneration, s.Metadata.Generation)
		}
		if c := s.condition("Ready"); c.Status != "True" {
			return fmt.Errorf("condition Ready is %+v", c)
		}
		return nil
	})
}

// remove deletes it with what is in it.
func (n *tenant) remove() {
	n.t.Helper()
	for _, args := range [][]string{
		{"annotate", "--overwrite", "supervisornamespace", n.name, "atoll.dev/delete-contents=true"},
		{"delete", "supervisornamespace", n.name, "--wait=true", timeout(longPatience)},
	} {
		if out, err := kubectl(context.Background(), "", args...); err != nil && !strings.Contains(out, "NotFound") {
			n.t.Errorf("removing the namespace: %v", err)
		}
	}
}

// tenantStatus is what the tests read of a SupervisorNamespace.
type tenantStatus struct {
	Metadata struct {
		Generation int64 `json:"generation"`
	} `json:"metadata"`
	Status struct {
		ObservedGeneration int64             `json:"observedGeneration"`
		Conditions         []tenantCondition `json:"conditions"`
		RegistryProject    string            `json:"registryProject"`
		Usage              []struct {
			Resource string `json:"resource"`
			Used     string `json:"used"`
			Limit    string `json:"limit"`
		} `json:"usage"`
		Top []struct {
			Resource, Kind, Name string
		} `json:"top"`
	} `json:"status"`
}

type tenantCondition struct{ Type, Status, Reason, Message string }

func (n *tenant) tryStatus() (s tenantStatus, err error) {
	out, err := kubectl(n.t.Context(), "", "get", "supervisornamespace", n.name, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &s)
	}
	return s, err
}

func (n *tenant) status() tenantStatus {
	n.t.Helper()
	s, err := n.tryStatus()
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

func (s tenantStatus) condition(kind string) tenantCondition {
	for _, c := range s.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return tenantCondition{}
}

// used is what the status says of a resource, used/limit.
func (s tenantStatus) used(resource string) string {
	for _, u := range s.Status.Usage {
		if u.Resource == resource {
			return u.Used + "/" + u.Limit
		}
	}
	return ""
}

// is waits for a condition of the SupervisorNamespace; its message holds the text.
func (n *tenant) is(kind, status, text string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("condition %s of %s to be %s", kind, n.name, status), func() error {
		s, err := n.tryStatus()
		if c := s.condition(kind); err != nil || c.Status != status || !strings.Contains(c.Message, text) {
			return fmt.Errorf("it is %+v, want %q in the message, %w", c, text, err)
		}
		return nil
	})
}

// combined runs atoll and returns both outputs together.
func combined(ctx context.Context, stdin string, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, suite.atoll, args...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("atoll %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return out.String(), err
}

// tryHost runs atoll as the administrator of the host.
func tryHost(ctx context.Context, stdin string, args ...string) (string, error) {
	return combined(ctx, stdin, []string{"KUBECONFIG="}, append(args, "--data-dir", suite.dataDir)...)
}

func host(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, err := tryHost(t.Context(), stdin, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
