//go:build integration

package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/identity/login"
	"atoll.dev/atoll/internal/identity/password"
)

const personPassword = "correct horse battery"

// people is a running server with an administrator's client and a client of the portal.
type people struct {
	t     *testing.T
	cfg   Config
	admin client.Client
	http  *http.Client
}

// TestPeople goes through what people do at a portal, against a real API server.
func TestPeople(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	process := mustStart(t, cfg)
	p := newPeople(t, cfg)
	p.make("anna", "developers")
	p.make("root2", api.AdministratorsGroup)
	anna := p.login("anna", personPassword)

	t.Run("Names", func(t *testing.T) { p.checkNames(t, anna) })
	t.Run("Rights", func(t *testing.T) { p.checkRights(t, anna) })
	t.Run("Namespaces", func(t *testing.T) { p.checkNamespaces(t, anna) })
	t.Run("Groups", func(t *testing.T) { p.checkGroups(t, anna) })
	t.Run("Tokens", func(t *testing.T) { p.checkTokens(t, anna) })
	t.Run("SessionsSurviveARestart", func(t *testing.T) {
		process.stop(syscall.SIGTERM)
		process = mustStart(p.t, cfg)
		p.within(t, "the session goes on", func() bool { name, _, err := p.review(anna); return err == nil && name == "sso:anna@atoll.local" })
	})
	t.Run("Revoke", func(t *testing.T) { p.checkRevoke(t, anna) })
	t.Run("LockOut", func(t *testing.T) { p.checkLockOut(t) })
	t.Run("Issuers", func(t *testing.T) { p.checkIssuers(t) })
	t.Run("BadRequests", func(t *testing.T) { p.checkBadRequests(t) })
	process.stop(syscall.SIGTERM)
	if strings.Contains(process.output.String(), personPassword) {
		t.Error("a password is in the log")
	}
}

func newPeople(t *testing.T, cfg Config) *people {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", cfg.AdminKubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	kinds := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, api.AddToScheme} {
		if err := add(kinds); err != nil {
			t.Fatal(err)
		}
	}
	admin, err := client.New(config, client.Options{Scheme: kinds})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(pki.Files{Dir: cfg.PKIDir}.CACert(pki.ClusterCA))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &people{t: t, cfg: cfg, admin: admin, http: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}}
}

// within waits for something: what counts comes through caches.
func (p *people) within(t *testing.T, what string, is func() bool) {
	t.Helper()
	began := time.Now()
	err := wait.PollUntilContextTimeout(t.Context(), 100*time.Millisecond, patience, true, func(context.Context) (bool, error) { return is(), nil })
	if err != nil {
		t.Fatalf("%s: not within %s", what, patience)
	}
	t.Logf("%s: after %s", what, time.Since(began).Round(10*time.Millisecond))
}

// make makes a user with the password of all of them, in a group.
func (p *people) make(name, group string) {
	p.t.Helper()
	ctx := p.t.Context()
	u := &api.User{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if err := p.admin.Create(ctx, u); err != nil {
		p.t.Fatal(err)
	}
	hash, err := password.Hash(personPassword)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := identity.StorePassword(ctx, p.admin, u, hash, false, time.Now()); err != nil {
		p.t.Fatal(err)
	}
	g := &api.Group{ObjectMeta: metav1.ObjectMeta{Name: group}}
	if err := p.admin.Get(ctx, client.ObjectKeyFromObject(g), g); err != nil {
		if err := p.admin.Create(ctx, g); err != nil {
			p.t.Fatal(err)
		}
	}
	g.Spec.Members = append(g.Spec.Members, name)
	if err := p.admin.Update(ctx, g); err != nil {
		p.t.Fatal(err)
	}
}

// ask talks to the portal.
func (p *people) ask(method, path, user, secret, token, body string) (int, string) {
	p.t.Helper()
	req, err := http.NewRequest(method, fmt.Sprintf("https://127.0.0.1:%d%s", p.cfg.Ports.Portal, path), strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, secret)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := p.http.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode, strings.TrimSpace(string(text))
}

// login is what kubectl vsphere login does.
func (p *people) login(user, secret string) string {
	p.t.Helper()
	began := time.Now()
	code, body := p.ask("POST", "/wcp/login", user, secret, "", "{}")
	var session login.WCPSession
	if err := json.Unmarshal([]byte(body), &session); err != nil || code != 200 || session.SessionID == "" {
		p.t.Fatalf("login of %s: %d %s", user, code, body)
	}
	p.t.Logf("login of %s: %s", user, time.Since(began).Round(time.Millisecond))
	return session.SessionID
}

// as is a client with a token.
func (p *people) as(token string) *kubernetes.Clientset {
	p.t.Helper()
	c, err := kubernetes.NewForConfig(&rest.Config{
		Host: apiURL("127.0.0.1", p.cfg.Ports.API), BearerToken: token, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAFile: pki.Files{Dir: p.cfg.PKIDir}.CACert(pki.ClusterCA)},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

// review is what the API server takes a token's owner for.
func (p *people) review(token string) (string, []string, error) {
	r, err := p.as(token).AuthenticationV1().SelfSubjectReviews().Create(p.t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return "", nil, err
	}
	return r.Status.UserInfo.Username, r.Status.UserInfo.Groups, nil
}

func (p *people) checkNames(t *testing.T, anna string) {
	p.within(t, "who the token belongs to is known", func() bool {
		name, groups, err := p.review(anna)
		return err == nil && name == "sso:anna@atoll.local" && slices.Equal(groups, []string{"sso:developers@atoll.local", "system:authenticated"})
	})
	if code, body := p.ask("GET", "/login/whoami", "", "", anna, ""); code != 200 || !strings.Contains(body, `"sso:anna@atoll.local"`) {
		t.Errorf("%d %s", code, body)
	}
	for _, bad := range []string{"Anna", "a@b", "system:admin", "a:b", strings.Repeat("a", 64)} {
		err := p.admin.Create(t.Context(), &api.User{ObjectMeta: metav1.ObjectMeta{Name: bad}})
		if !apierrors.IsInvalid(err) {
			t.Errorf("user %s: %v", bad, err)
		}
		err = p.admin.Create(t.Context(), &api.Group{ObjectMeta: metav1.ObjectMeta{Name: bad}})
		if !apierrors.IsInvalid(err) {
			t.Errorf("group %s: %v", bad, err)
		}
	}
}

// checkRights: who is no administrator changes nothing about people, and who is one may do everything.
func (p *people) checkRights(t *testing.T, anna string) {
	ctx := t.Context()
	raw := func(c *kubernetes.Clientset, method, path, body string) error {
		return c.RESTClient().Verb(method).AbsPath(path).SetHeader("Content-Type", "application/merge-patch+json").Body([]byte(body)).Do(ctx).Error()
	}
	c := p.as(anna)
	for _, r := range [][3]string{
		{"GET", "/apis/atoll.dev/v1alpha1/users", ""},
		{"PATCH", "/apis/atoll.dev/v1alpha1/groups/" + api.AdministratorsGroup, `{"spec":{"members":["anna"]}}`},
		{"PATCH", "/apis/atoll.dev/v1alpha1/users/root2", `{"spec":{"disabled":true}}`},
		{"PATCH", "/apis/atoll.dev/v1alpha1/users/anna/status", `{"status":{"failedLogins":0}}`},
		{"GET", "/apis/atoll.dev/v1alpha1/identityproviders", ""},
		{"GET", "/api/v1/namespaces/" + api.IdentityNamespace + "/secrets/user-root2", ""},
		{"GET", "/api/v1/namespaces/" + api.IdentityNamespace + "/secrets", ""},
	} {
		if err := raw(c, r[0], r[1], r[2]); !apierrors.IsForbidden(err) {
			t.Errorf("%s %s: %v", r[0], r[1], err)
		}
	}
	// Headers that mean something to others mean nothing here.
	for header, value := range map[string]string{"Impersonate-User": "sso:root2@atoll.local", "Impersonate-Group": "system:masters"} {
		err := c.RESTClient().Get().AbsPath("/api/v1/namespaces").SetHeader(header, value).Do(ctx).Error()
		if !apierrors.IsForbidden(err) && !apierrors.IsInternalError(err) && !apierrors.IsBadRequest(err) {
			t.Errorf("%s: %v", header, err)
		}
	}
	if err := c.RESTClient().Get().AbsPath("/api/v1/namespaces").SetHeader("X-Remote-User", "atoll-admin").SetHeader("X-Remote-Group", "system:masters").Do(ctx).Error(); !apierrors.IsForbidden(err) {
		t.Errorf("X-Remote-User: %v", err)
	}
	root := p.as(p.login("root2@atoll.local", personPassword))
	p.within(t, "an administrator sees users", func() bool { return raw(root, "GET", "/apis/atoll.dev/v1alpha1/users", "") == nil })
	for user, want := range map[string]bool{pki.IdentityUser: true, pki.SnapshotControllerUser: false, "sso:anna@atoll.local": false} {
		if got := allowed(t, adminClient(t, p.cfg), user, "get", "secrets", api.IdentityNamespace); got != want {
			t.Errorf("%s may read the hashes: %v", user, got)
		}
	}
	if allowed(t, adminClient(t, p.cfg), pki.IdentityUser, "get", "secrets", "kube-system") || allowed(t, adminClient(t, p.cfg), pki.IdentityUser, "create", "users.atoll.dev", "") {
		t.Error("the identity may do too much")
	}
}

func (p *people) checkNamespaces(t *testing.T, anna string) {
	ctx := t.Context()
	for _, name := range []string{"shop", "lab"} {
		labels := map[string]string{api.SupervisorNamespaceLabel: name}
		if err := p.admin.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}); err != nil {
			t.Fatal(err)
		}
		if name == "lab" {
			continue
		}
		err := p.admin.Create(ctx, &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "atoll-edit", Labels: labels},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "edit"},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "Group", Name: "sso:developers@atoll.local"}},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	p.within(t, "the binding counts", func() bool {
		code, body := p.ask("GET", "/login/namespaces", "", "", anna, "")
		return code == 200 && body == `[{"namespace":"shop","role":"edit"}]`
	})
	root := p.login("root2", personPassword)
	if code, body := p.ask("GET", "/login/namespaces", "", "", root, ""); code != 200 || body != `[{"namespace":"lab","role":"administrator"},{"namespace":"shop","role":"administrator"}]` {
		t.Errorf("%d %s", code, body)
	}
	want := fmt.Sprintf(`[{"namespace":"shop","master_host":"127.0.0.1","control_plane_api_server_port":"%[1]d","conrol_plane_api_server_port":"%[1]d","control_plane_dns_names":[]}]`, p.cfg.Ports.API)
	if code, body := p.ask("GET", "/wcp/workloads", "anna", personPassword, "", ""); code != 200 || body != want {
		t.Errorf("%d %s", code, body)
	}
	p.within(t, "the binding counts for the API server", func() bool {
		_, err := p.as(anna).CoreV1().Pods("shop").List(ctx, metav1.ListOptions{})
		return err == nil
	})
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "trap"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 443}}, ExternalIPs: []string{p.cfg.NodeIP.String()}}}
	if _, err := p.as(anna).CoreV1().Services("shop").Create(ctx, service, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("the port of the portal at the host's address: %v", err)
	}
	if _, err := p.as(anna).CoreV1().Pods("lab").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("in another namespace: %v", err)
	}
}

// checkGroups: what is changed about a group counts for a session that goes on.
func (p *people) checkGroups(t *testing.T, anna string) {
	g := &api.Group{ObjectMeta: metav1.ObjectMeta{Name: "staff"}, Spec: api.GroupSpec{Groups: []string{"developers"}}}
	if err := p.admin.Create(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	p.within(t, "in the group", func() bool {
		_, groups, err := p.review(anna)
		return err == nil && slices.Contains(groups, "sso:staff@atoll.local")
	})
	if err := p.admin.Delete(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	p.within(t, "out of the group", func() bool {
		_, groups, err := p.review(anna)
		return err == nil && !slices.Contains(groups, "sso:staff@atoll.local")
	})
}

// checkTokens: what is not a token of a session is nobody's.
func (p *people) checkTokens(t *testing.T, anna string) {
	parts := strings.Split(anna, ".")
	for name, text := range map[string]string{
		"cut": anna[:len(anna)-2], "unsigned": parts[0] + "." + parts[1] + ".", "nonsense": "nonsense",
		"no algorithm": "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0." + parts[1] + ".",
	} {
		if who, _, err := p.review(text); !apierrors.IsUnauthorized(err) {
			t.Errorf("%s: %s, %v", name, who, err)
		}
	}
	code, body := p.ask("POST", "/login/session", "anna", personPassword, "", "")
	var session login.Session
	if err := json.Unmarshal([]byte(body), &session); err != nil || code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	if _, _, err := p.review(session.RefreshToken); !apierrors.IsUnauthorized(err) {
		t.Errorf("a refresh token: %v", err)
	}
	if _, _, err := p.review(session.Token); err != nil {
		t.Errorf("an access token: %v", err)
	}
	if code, body := p.ask("POST", "/login/refresh", "", "", session.RefreshToken, ""); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	if code, body := p.ask("POST", "/login/logout", "", "", session.Token, ""); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	p.within(t, "the token is worth nothing after the logout", func() bool { _, _, err := p.review(session.Token); return apierrors.IsUnauthorized(err) })
	if code, _ := p.ask("POST", "/login/refresh", "", "", session.RefreshToken, ""); code != 401 {
		t.Errorf("refreshed after the logout: %d", code)
	}
}

func (p *people) checkRevoke(t *testing.T, anna string) {
	u := &api.User{}
	if err := p.admin.Get(t.Context(), client.ObjectKey{Name: "anna"}, u); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.review(anna); err != nil {
		t.Fatal(err)
	}
	if err := identity.Revoke(t.Context(), p.admin, u); err != nil {
		t.Fatal(err)
	}
	p.within(t, "the token is revoked", func() bool { _, _, err := p.review(anna); return apierrors.IsUnauthorized(err) })
	again := p.login("anna", personPassword)
	if code, body := p.ask("POST", "/login/password", "anna", personPassword, "", `{"newPassword":"another horse battery"}`); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	p.within(t, "the token is worth nothing with another password", func() bool { _, _, err := p.review(again); return apierrors.IsUnauthorized(err) })
	if code, _ := p.ask("POST", "/wcp/login", "anna", personPassword, "", ""); code != 401 {
		t.Errorf("the old password: %d", code)
	}
	again = p.login("anna", "another horse battery")
	if err := p.admin.Get(t.Context(), client.ObjectKey{Name: "anna"}, u); err != nil {
		t.Fatal(err)
	}
	u.Spec.Disabled = true
	if err := p.admin.Update(t.Context(), u); err != nil {
		t.Fatal(err)
	}
	p.within(t, "a disabled user is out", func() bool { _, _, err := p.review(again); return apierrors.IsUnauthorized(err) })
}

func (p *people) checkLockOut(t *testing.T) {
	p.make("carl", "developers")
	for range 5 {
		if code, _ := p.ask("POST", "/wcp/login", "carl", "wrong", "", ""); code != 401 {
			t.Errorf("wrong password: %d", code)
		}
	}
	if code, body := p.ask("POST", "/wcp/login", "carl", personPassword, "", ""); code != 429 {
		t.Errorf("locked: %d %s", code, body)
	}
	u := &api.User{}
	if err := p.admin.Get(t.Context(), client.ObjectKey{Name: "carl"}, u); err != nil || u.Status.FailedLogins != 5 || u.Status.LockedUntil == nil {
		t.Errorf("%+v, %v", u.Status, err)
	}
	if err := identity.Unlock(t.Context(), p.admin, "carl"); err != nil {
		t.Fatal(err)
	}
	p.login("carl", personPassword)
}

// allowed asks the authorizer about somebody.
func allowed(t *testing.T, c *kubernetes.Clientset, user, verb, resource, namespace string) bool {
	t.Helper()
	resource, group, _ := strings.Cut(resource, ".")
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: user, ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: verb, Group: group, Resource: resource, Namespace: namespace},
	}}
	got, err := c.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), review, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return got.Status.Allowed
}
