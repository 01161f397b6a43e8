package registry

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

func TestRolesInAProject(t *testing.T) {
	h := start(t)
	img := h.image(4096, 2)
	h.push("shop/web:1", img, h.as("olga"))
	if err := h.pull("shop/web:1", h.as("victor")); err != nil {
		t.Errorf("who may view cannot pull: %v", err)
	}
	refused(t, remote.Write(h.ref("shop/web:2"), img, h.as("victor")...), "victor may not push", "namespace shop")
	refused(t, remote.Delete(h.ref("shop/web:1"), h.as("victor")...), "victor may not delete")
	refused(t, h.pull("shop/web:1", h.as("stranger")), "stranger may not pull")
	refused(t, h.pull("shop/web:1", h.login("olga", "wrong")), "UNAUTHORIZED")
	refused(t, remote.Write(h.ref("nowhere/web:1"), img, h.as("root")...), "there is no namespace nowhere")
	refused(t, remote.Write(h.ref("nowhere/web:1"), img, h.as("olga")...), "olga may not push", "role Edit in namespace nowhere")
	if err := remote.Delete(h.ref("shop/web:1"), h.as("olga")...); err != nil {
		t.Error(err)
	}
	refused(t, h.pull("shop/web:1", h.as("olga")), "MANIFEST_UNKNOWN")
}

func TestLibraryIsForAllToRead(t *testing.T) {
	h := start(t)
	img := h.image(1024, 1)
	refused(t, remote.Write(h.ref("library/base:1"), img, h.as("olga")...), "olga may not push", "for administrators to push to")
	h.push("library/base:1", img, h.as("root"))
	for _, who := range []string{"olga", "stranger"} {
		if err := h.pull("library/base:1", h.as(who)); err != nil {
			t.Errorf("%s cannot pull from the library: %v", who, err)
		}
	}
	// What is in the library can be mounted into a project.
	h.push("shop/base:1", img, h.as("olga"))
}

func TestAnonymousIsRefused(t *testing.T) {
	h := start(t)
	for _, path := range []string{"/v2/", "/v2/_catalog", "/v2/shop/web/tags/list", "/v2/library/base/manifests/1"} {
		status, header, _ := h.do(http.MethodGet, path, "", nil, nil)
		if status != http.StatusUnauthorized || !strings.Contains(header.Get("WWW-Authenticate"), `Bearer realm="`+h.srv.URL+`/registry/token"`) {
			t.Errorf("%s: %d %v", path, status, header)
		}
	}
	if status, _ := h.token("", "", "repository:library/base:pull"); status != http.StatusUnauthorized {
		t.Errorf("a token without credentials: %d", status)
	}
}

func TestScopesAreNotWidened(t *testing.T) {
	h := start(t)
	h.push("bank/vault:1", h.image(512, 1), h.as("root"))
	h.push("shop/web:1", h.image(512, 1), h.as("root"))
	// What is not granted is left out, and a token of one repository opens no other one.
	status, token := h.token("victor", passwords()["victor"], "repository:shop/web:pull,push,delete", "repository:bank/vault:pull repository:library/x:*")
	if status != http.StatusOK {
		t.Fatal(status)
	}
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{http.MethodGet, "/v2/shop/web/tags/list", http.StatusOK},
		{http.MethodGet, "/v2/shop/other/tags/list", http.StatusUnauthorized},
		{http.MethodGet, "/v2/bank/vault/tags/list", http.StatusForbidden},
		{http.MethodPost, "/v2/shop/web/blobs/uploads/", http.StatusForbidden},
		{http.MethodPost, "/v2/library/x/blobs/uploads/", http.StatusForbidden},
		{http.MethodDelete, "/v2/shop/web/manifests/1", http.StatusForbidden},
		{http.MethodGet, "/v2/shop/web/../../bank/vault/tags/list", http.StatusNotFound},
		{http.MethodGet, "/v2/shop/web/%2e%2e/%2e%2e/bank/vault/tags/list", http.StatusNotFound},
	} {
		if got, _, body := h.do(c.method, c.path, token, nil, nil); got != c.want {
			t.Errorf("%s %s: %d, want %d: %s", c.method, c.path, got, c.want, body)
		}
	}
	for _, scope := range []string{"repository:../etc:pull", "repository:shop:pull", "registry:catalog:*", "repository:Shop/web:pull", "::::", "repository:shop/web"} {
		if status, token := h.token("root", passwords()["root"], scope); status != http.StatusOK || token == "" {
			t.Errorf("scope %q: %d", scope, status)
		} else if got, _, _ := h.do(http.MethodGet, "/v2/shop/web/tags/list", token, nil, nil); got != http.StatusUnauthorized {
			t.Errorf("scope %q opened shop/web: %d", scope, got)
		}
	}
}

// TestHeadLeadsToAReason: an answer to HEAD has no body, so clients can only print a number.
func TestHeadLeadsToAReason(t *testing.T) {
	h := start(t)
	h.push("shop/web:1", h.image(512, 1), h.as("olga"))
	for _, c := range []struct {
		asked, path string
		want        int
	}{
		// Who only pulls sends GET when HEAD is refused.
		{"pull", "/v2/shop/web/manifests/1", http.StatusForbidden},
		// Who pushes goes on when nothing is there, and is refused with a reason then.
		{"pull,push", "/v2/shop/web/manifests/1", http.StatusNotFound},
		{"pull,push", "/v2/shop/web/blobs/sha256:" + strings.Repeat("0", 64), http.StatusNotFound},
		{"pull,push", "/v2/web/manifests/1", http.StatusNotFound},
	} {
		status, token := h.token("stranger", passwords()["stranger"], "repository:shop/web:"+c.asked)
		if status != http.StatusOK {
			t.Fatalf("a token for nothing: %d", status)
		}
		if got, _, _ := h.do(http.MethodHead, c.path, token, nil, nil); got != c.want {
			t.Errorf("HEAD %s with a token for %s: %d, want %d", c.path, c.asked, got, c.want)
		}
		got, _, body := h.do(http.MethodGet, c.path, token, nil, nil)
		if (got != http.StatusForbidden || !strings.Contains(body, "stranger may not pull")) && (got != http.StatusBadRequest || !strings.Contains(body, "NAMESPACE/NAME")) {
			t.Errorf("GET %s: %d %s", c.path, got, body)
		}
	}
}

func TestTokensEnd(t *testing.T) {
	h := start(t)
	h.push("shop/web:1", h.image(512, 1), h.as("olga"))
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull")
	read := func(token string) int {
		status, _, _ := h.do(http.MethodGet, "/v2/shop/web/tags/list", token, nil, nil)
		return status
	}
	if got := read(token); got != http.StatusOK {
		t.Fatal(got)
	}
	if got := read(token[:len(token)-2] + "xx"); got != http.StatusUnauthorized {
		t.Errorf("a forged token: %d", got)
	}
	if got := read("eyJhbGciOiJub25lIn0.eyJpc3MiOiJyZWdpc3RyeS5hdG9sbC5sb2NhbCJ9."); got != http.StatusUnauthorized {
		t.Errorf("a token without signature: %d", got)
	}
	// The right is taken away: the token is good for nothing when the answer of the API server has become old.
	h.change(func() { delete(h.rights, "olga/get/shop") })
	h.reg.now = func() time.Time { return time.Now().Add(rightsKept + time.Second) }
	if got := read(token); got != http.StatusForbidden {
		t.Errorf("a right that was taken away: %d", got)
	}
	h.reg.now = func() time.Time { return time.Now().Add(tokenLife + 2*time.Second) }
	if got := read(token); got != http.StatusUnauthorized {
		t.Errorf("a token that has expired: %d", got)
	}
}

func TestRobots(t *testing.T) {
	h := start(t)
	img := h.image(512, 1)
	h.robot("ci", "secret-of-ci", atoll.RobotPush)
	h.robot("run", "secret-of-run", atoll.RobotPull)
	ci, run := h.login("robot$shop+ci", "secret-of-ci"), h.login("robot$shop+run", "secret-of-run")
	h.push("shop/web:1", img, ci)
	if err := h.pull("shop/web:1", run); err != nil {
		t.Error(err)
	}
	refused(t, remote.Write(h.ref("shop/web:2"), img, run...), "may not push", "spec.permissions of RobotAccount run")
	refused(t, remote.Delete(h.ref("shop/web:1"), ci...), "may not delete")
	refused(t, remote.Write(h.ref("bank/web:1"), img, ci...), "robot$shop+ci may not push bank/web", "its own namespace, shop")
	refused(t, h.pull("bank/web:1", ci), "may not pull")
	refused(t, remote.Write(h.ref("library/web:1"), img, ci...), "may not push")
	refused(t, h.pull("shop/web:1", h.login("robot$shop+run", "secret-of-ci")), "UNAUTHORIZED")
	refused(t, h.pull("shop/web:1", h.login("robot$bank+ci", "secret-of-ci")), "UNAUTHORIZED")
	for _, name := range []string{"robot$", "robot$shop+", "robot$+ci", "robot$shop+a/b", "robot$shop+" + strings.Repeat("a", 300)} {
		refused(t, h.pull("shop/web:1", h.login(name, "x")), "UNAUTHORIZED")
	}

	_, token := h.token("robot$shop+run", "secret-of-run", "repository:shop/web:pull")
	read := func() int {
		status, _, _ := h.do(http.MethodGet, "/v2/shop/web/tags/list", token, nil, nil)
		return status
	}
	if got := read(); got != http.StatusOK {
		t.Fatal(got)
	}
	// A new password, expiry and deletion end tokens that were given before.
	h.robot("run", "another", atoll.RobotPull)
	if got := read(); got != http.StatusUnauthorized {
		t.Errorf("after rotation: %d", got)
	}
	h.robot("run", "secret-of-run", atoll.RobotPull)
	h.change(func() { h.robots["shop/run"].Spec.ExpiresAt = &metav1.Time{Time: time.Now().Add(-time.Second)} })
	if got := read(); got != http.StatusUnauthorized {
		t.Errorf("after expiry: %d", got)
	}
	refused(t, h.pull("shop/web:1", run), "UNAUTHORIZED")
	h.change(func() { delete(h.robots, "shop/run") })
	if got := read(); got != http.StatusUnauthorized {
		t.Errorf("after deletion: %d", got)
	}
	// A password that the API server has and the cache does not yet.
	h.change(func() { h.unseen = 3 })
	if status, token := h.token("robot$shop+ci", "secret-of-ci", "repository:shop/web:pull"); status != http.StatusOK || token == "" {
		t.Errorf("a new password: %d", status)
	}
	h.change(func() { h.unseen = 3 })
	if status, _ := h.token("robot$shop+ci", "another", "repository:shop/web:pull"); status != http.StatusUnauthorized {
		t.Errorf("a wrong password of a new account: %d", status)
	}
}

func TestServiceAccountTokens(t *testing.T) {
	h := start(t)
	h.push("shop/web:1", h.image(512, 1), h.as("olga"))
	pod, nobodys := webToken("pod"), webToken("none")
	account := Identity{Name: "system:serviceaccount:shop:default", Groups: []string{serviceAccounts, serviceAccounts + ":shop"}}
	h.may(account.Name, "shop", "get")
	h.change(func() {
		h.tokens[atoll.RegistryAudience+"/"+pod] = account
		h.tokens[atoll.RegistryAudience+"/eyJa.api.sig"] = account // would be, if it were asked for
		h.tokens["/eyJa.api.sig"] = account
		h.tokens["/eyJa.session.sig"] = Identity{Name: "victor"}
	})
	if err := h.pull("shop/web:1", h.login("serviceaccount", pod)); err != nil {
		t.Error(err)
	}
	refused(t, h.pull("bank/web:1", h.login("serviceaccount", pod)), "may not pull")
	refused(t, h.pull("shop/web:1", h.login("serviceaccount", "eyJa.api.sig")), "UNAUTHORIZED")
	refused(t, h.pull("shop/web:1", h.login("serviceaccount", nobodys)), "UNAUTHORIZED")
	if err := h.pull("shop/web:1", h.login("victor", "eyJa.session.sig")); err != nil {
		t.Errorf("a session token: %v", err)
	}
}

// upload starts an upload and returns where it goes on.
func (h *harness) upload(token, repo, query string) (int, string) {
	status, header, _ := h.do(http.MethodPost, "/v2/"+repo+"/blobs/uploads/"+query, token, nil, nil)
	return status, header.Get("Location")
}

func TestMountsNeedTheRightToPull(t *testing.T) {
	h := start(t)
	secret := h.image(2048, 1)
	h.push("bank/vault:1", secret, h.as("root"))
	layers, _ := secret.Layers()
	digest, _ := layers[0].Digest()
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push", "repository:bank/vault:pull")
	for _, attack := range []struct {
		query string
		body  string
		kind  string
	}{
		{query: "?mount=" + digest.String() + "&from=bank/vault"},
		{query: "?mount=" + digest.String() + "&from=shop/web&from=bank/vault"},
		{query: "?mount=" + digest.String() + "&from=bank%2Fvault"},
		{query: "?mount=" + digest.String(), body: "from=bank/vault", kind: "application/x-www-form-urlencoded"},
		{query: "", body: "from=bank/vault&mount=" + digest.String(), kind: "application/x-www-form-urlencoded"},
		{query: "?mount=" + digest.String() + "&from=shop/web/../../bank/vault"},
		{query: "?mount=" + digest.String()},
	} {
		status, _, body := h.do(http.MethodPost, "/v2/shop/web/blobs/uploads/"+attack.query, token, strings.NewReader(attack.body), map[string]string{"Content-Type": attack.kind})
		if status != http.StatusAccepted {
			t.Errorf("%+v: %d %s, want an ordinary upload", attack, status, body)
		}
	}
	if status, _, _ := h.do(http.MethodHead, "/v2/shop/web/blobs/"+digest.String(), token, nil, nil); status != http.StatusNotFound {
		t.Errorf("the layer of another project is there: %d", status)
	}
	// With the right it is a mount.
	h.may("olga", "bank", "get")
	h.reg.now = func() time.Time { return time.Now().Add(rightsKept + time.Second) }
	_, token = h.token("olga", passwords()["olga"], "repository:shop/web:pull,push", "repository:bank/vault:pull")
	if status, _ := h.upload(token, "shop/web", "?mount="+digest.String()+"&from=bank/vault"); status != http.StatusCreated {
		t.Errorf("a mount that is allowed: %d", status)
	}
	// A token without the scope does not mount, even if its owner might.
	_, token = h.token("olga", passwords()["olga"], "repository:shop/other:pull,push")
	if status, _ := h.upload(token, "shop/other", "?mount="+digest.String()+"&from=bank/vault"); status != http.StatusAccepted {
		t.Errorf("a mount without scope: %d", status)
	}
}

func TestQuota(t *testing.T) {
	h := start(t)
	h.change(func() { h.settings["shop"] = atoll.NamespaceRegistry{Quota: quantity(140_000)} })
	first := h.image(60_000, 1)
	h.push("shop/a:1", first, h.as("olga"))
	used, err := h.reg.Usage(t.Context(), "shop")
	if err != nil || used < 60_000 || used > 70_000 {
		t.Fatalf("used %d, %v", used, err)
	}
	// The same image in another repository of the project takes nothing.
	h.push("shop/b:1", first, h.as("olga"))
	if again, _ := h.reg.Usage(t.Context(), "shop"); again != used {
		t.Errorf("used %d, before %d", again, used)
	}
	err = remote.Write(h.ref("shop/c:1"), h.image(90_000, 1), append(h.as("olga"), remote.WithJobs(1))...)
	refused(t, err, "DENIED", "project shop", "quota 136.7 KiB", "used")
	// What was refused is not counted: the upload is given up. Its configuration has come.
	after, _ := h.reg.Usage(t.Context(), "shop")
	if after > used+2_000 {
		t.Errorf("used %d, before %d", after, used)
	}
	// Midway, when the client does not say how much is coming.
	_, token := h.token("olga", passwords()["olga"], "repository:shop/d:pull,push")
	_, location := h.upload(token, "shop/d", "")
	status, _, body := h.do(http.MethodPatch, location, token, io.MultiReader(bytes.NewReader(make([]byte, 80_000))), nil)
	if status != http.StatusForbidden || !strings.Contains(body, "project shop") {
		t.Errorf("%d %s", status, body)
	}
	if got, _ := h.reg.Usage(t.Context(), "shop"); got != after {
		t.Errorf("a refused upload counts: used %d, before %d", got, after)
	}
	// Also what had come before, and when it is said how much is coming.
	_, location = h.upload(token, "shop/d", "")
	status, header, body := h.do(http.MethodPatch, location, token, bytes.NewReader(make([]byte, 10_000)), nil)
	if status != http.StatusAccepted {
		t.Fatalf("%d %s", status, body)
	}
	status, _, body = h.do(http.MethodPatch, header.Get("Location"), token, bytes.NewReader(make([]byte, 80_000)), nil)
	if got, _ := h.reg.Usage(t.Context(), "shop"); status != http.StatusForbidden || got != after {
		t.Errorf("%d %s: used %d, before %d", status, body, got, after)
	}
	// Counted anew from the disk it is the same.
	counted, _ := h.reg.Usage(t.Context(), "shop")
	again := start(t, func(c *Config) { c.Dir = h.dir })
	if got, err := again.reg.Usage(t.Context(), "shop"); err != nil || got > counted || got < used {
		t.Errorf("from disk %d, counted %d, %v", got, counted, err)
	}
	// Other projects are not touched, and a mount counts.
	h.push("bank/x:1", h.image(60_000, 2), h.as("root"))
}

func TestManifestsAreBounded(t *testing.T) {
	h := start(t)
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push")
	big := `{"schemaVersion":2,"annotations":{"a":"` + strings.Repeat("x", 5<<20) + `"}}`
	status, _, body := h.do(http.MethodPut, "/v2/shop/web/manifests/1", token, strings.NewReader(big), map[string]string{"Content-Type": "application/vnd.oci.image.manifest.v1+json"})
	if status != http.StatusRequestEntityTooLarge || !strings.Contains(body, "at most") {
		t.Errorf("%d %s", status, body)
	}
	if status, _, _ := h.do(http.MethodPut, "/v2/shop/web/manifests/1", token, strings.NewReader("<xml>"), nil); status != http.StatusBadRequest {
		t.Errorf("%d", status)
	}
}

func TestImmutableTags(t *testing.T) {
	h := start(t)
	h.change(func() {
		h.settings["shop"] = atoll.NamespaceRegistry{ImmutableTags: []string{"web:v*", "db/*:v*"}}
	})
	one, two := h.image(512, 1), h.image(512, 1)
	h.push("shop/web:v1", one, h.as("olga"))
	h.push("shop/web:v1", one, h.as("olga")) // the same again is nothing new
	refused(t, remote.Write(h.ref("shop/web:v1"), two, h.as("olga")...), "immutable", "push another tag")
	refused(t, remote.Delete(h.ref("shop/web:v1"), h.as("olga")...), "immutable")
	digest, _ := one.Digest()
	refused(t, remote.Delete(h.ref("shop/web@"+digest.String()), h.as("olga")...), "immutable")
	h.push("shop/web:latest", two, h.as("olga"))
	h.push("shop/web:latest", one, h.as("olga"))
	h.push("shop/db/main:v1", one, h.as("olga"))
	refused(t, remote.Write(h.ref("shop/db/main:v1"), two, h.as("olga")...), "immutable")
}

func TestRetention(t *testing.T) {
	h := start(t)
	h.change(func() {
		h.settings["shop"] = atoll.NamespaceRegistry{Retention: []atoll.RegistryRetention{{Pattern: "web:build-*", KeepLast: 2}}}
	})
	h.push("shop/web:stable", h.image(64, 1), h.as("olga"))
	for i := range 5 {
		h.push(fmt.Sprintf("shop/web:build-%d", i), h.image(64, 1), h.as("olga"))
	}
	tags, err := remote.List(h.ref("shop/web:x").Context(), h.as("olga")...)
	if err != nil || strings.Join(tags, " ") != "build-3 build-4 stable" {
		t.Errorf("%v, %v", tags, err)
	}
}

func TestANamespaceOfTheSameNameInheritsNothing(t *testing.T) {
	h := start(t)
	h.push("shop/web:1", h.image(512, 1), h.as("olga"))
	h.change(func() { h.namespaces["shop"] = "uid-of-another" })
	refused(t, h.pull("shop/web:1", h.as("olga")), "MANIFEST_UNKNOWN")
	if used, err := h.reg.Usage(t.Context(), "shop"); err != nil || used != 0 {
		t.Errorf("used %d, %v", used, err)
	}
	h.change(func() { delete(h.namespaces, "shop") })
	refused(t, h.pull("shop/web:1", h.as("olga")), "may not pull")
}

func TestManage(t *testing.T) {
	h := start(t)
	h.push("shop/web:1", h.image(512, 1), h.as("olga"))
	h.push("bank/vault:1", h.image(512, 1), h.as("root"))
	get := func(user, method, path string) (int, string) {
		req, _ := http.NewRequestWithContext(t.Context(), method, h.srv.URL+path, nil)
		req.SetBasicAuth(user, passwords()[user])
		answer, err := h.srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, _ := io.ReadAll(answer.Body)
		return answer.StatusCode, string(text)
	}
	for _, c := range []struct {
		user, method, path string
		status             int
		has, hasNot        string
	}{
		{"victor", http.MethodGet, "/registry/v1/repositories", 200, "shop/web", "bank"},
		{"root", http.MethodGet, "/registry/v1/repositories", 200, "bank/vault", "nothing"},
		{"victor", http.MethodGet, "/registry/v1/usage", 200, `"project":"shop"`, "bank"},
		{"victor", http.MethodGet, "/registry/v1/usage?project=bank", 403, "may not list", "vault"},
		{"victor", http.MethodPost, "/registry/v1/gc", 403, "may not collect", "manifests"},
		{"root", http.MethodPost, "/registry/v1/gc?dryRun=true", 200, `"dryRun":true`, "x"},
		{"root", http.MethodGet, "/registry/v1/gc", 404, "nothing at", "x"},
	} {
		status, body := get(c.user, c.method, c.path)
		if status != c.status || !strings.Contains(body, c.has) || strings.Contains(body, c.hasNot) {
			t.Errorf("%s %s %s: %d %s", c.user, c.method, c.path, status, body)
		}
	}
}

func TestExternalRegistry(t *testing.T) {
	h := start(t)
	h.change(func() { h.configuration.External = &atoll.ExternalRegistry{URL: "https://harbor.example.com"} })
	status, _, body := h.do(http.MethodGet, "/v2/", "", nil, nil)
	if status != http.StatusNotFound || !strings.Contains(body, "harbor.example.com") {
		t.Errorf("%d %s", status, body)
	}
}

func TestRefusedOverSmallConnections(t *testing.T) {
	// A digest that is wrong leaves nothing behind.
	h := start(t)
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push")
	_, location := h.upload(token, "shop/web", "")
	sum := sha256.Sum256([]byte("something else"))
	status, _, body := h.do(http.MethodPut, location+"&digest=sha256:"+hex.EncodeToString(sum[:]), token, strings.NewReader("bytes"), nil)
	if status != http.StatusBadRequest || !strings.Contains(body, "DIGEST_INVALID") {
		t.Errorf("%d %s", status, body)
	}
	if used, err := h.reg.Usage(t.Context(), "shop"); err != nil || used != 0 {
		t.Errorf("used %d, %v", used, err)
	}
}

func FuzzParseScope(f *testing.F) {
	for _, s := range []string{"repository:shop/web:pull,push", "repository:a/b/c:*", "registry:catalog:*", ":", "repository:host:5000/a/b:pull", "repository:../x:pull"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, ok := parseScope(text)
		if !ok {
			return
		}
		project, rest, fine := splitName(s.Name)
		if !fine || project == "" || rest == "" || strings.Contains(s.Name, "..") || strings.ContainsAny(project, "./:") {
			t.Errorf("%q became %+v", text, s)
		}
	})
}
