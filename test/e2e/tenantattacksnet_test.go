//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// bearer is kubectl with a token and nothing else.
func (p *actor) bearer(token string, args ...string) (string, error) {
	p.t.Helper()
	server := strings.TrimSpace(p.kubectl("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"))
	args = append([]string{"kubectl", "--kubeconfig", "/dev/null", "--server", server, "--certificate-authority", portalCA(p.t), "--token", token}, args...)
	return p.atoll("", args...)
}

// kubeletStatus asks a node's kubelet and returns the status of its answer.
func kubeletStatus(t *testing.T, node, path, authorization string) int {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // an attacker does not care
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+net.JoinHostPort(node, "10250")+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

// TestAttackNetwork: an attacker with a kernel of their own sends from the address of somebody who may, answers for
// another's address, and asks by every name that there is.
func TestAttackNetwork(t *testing.T) {
	t.Parallel()
	m, v := newTenant(t, "-m", `"podRuntime": {"privilegedAllowed": true}`), newTenant(t, "-v", `"network": {"isolation": "Isolated"}`)
	v.pair()
	m.editor.apply(m.name, strings.Replace(strings.Replace(sleeper, "image: busybox", "securityContext: {privileged: true}, image: busybox", 1), "name: box}", "name: client}", 1))
	m.ready("client")
	web := v.field("pod/web", ".status.podIP")
	m.cut(v)
	dropped := denied(t, v.name)
	if out, err := m.try("exec", "client", "--", "ping", "-c", "2", "-W", "3", web); err == nil || !strings.Contains(out, "2 packets transmitted, 0 packets received") || denied(t, v.name) < dropped+2 {
		t.Errorf("a ping, of which %d packets were denied: %v\n%s", denied(t, v.name)-dropped, err, out)
	}
	m.forge("client", nodeAddress(t), v)
	shell := func(script string) { _, _ = m.try("exec", "client", "--", "sh", "-c", script) }
	// Whoever answers for another's address does not get what is sent there.
	shell("ip addr add " + web + "/32 dev eth0; mkdir -p /w; echo stolen >/w/index.html; httpd -p 80 -h /w; arping -U -c 3 -I eth0 " + web)
	for range 5 {
		eventually(t, "the victim to answer", func() error {
			out, err := v.tryExec("client", "timeout", "60", "wget", "-qO-", "http://"+web+"/")
			if err == nil && strings.TrimSpace(out) != v.name {
				t.Errorf("the attacker answered for the victim: %q", out)
			}
			return err
		})
	}
	shell("ip addr del " + web + "/32 dev eth0")
	// The host fetches nothing from a pod for somebody who cannot.
	const item = `{"apiVersion": "imageregistry.vmware.com/v1alpha1", "kind": "ContentLibraryItem", "metadata": {"name": "%s"}, "spec": {"name": "%[1]s", "source": {"http": {"url": "http://%[2]s"}}}}`
	for name, address := range map[string]string{"pod": web + "/disk.img", "service": v.field("service/web", ".spec.clusterIP") + "/disk.img", "loopback": "127.0.0.1:10248/healthz", "host": nodeAddress(t) + ":10250/pods"} {
		out, err := m.editor.try(fmt.Sprintf(item, name, address), "-n", m.name, "create", "-f", "-")
		if err != nil {
			contains(t, out, "address")
			continue
		}
		eventually(t, "the item "+name+" to be refused", func() error {
			said, err := m.try("get", "contentlibraryitem", name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")]['status','message']}`)
			if err != nil || !strings.HasPrefix(said, "False") || !strings.Contains(said, "address") {
				return fmt.Errorf("it says %q", said)
			}
			return nil
		})
	}
}

// TestAttackImages: a namespace that pulls the bytes of an image that was loaded for everybody, under a name of its own,
// takes it from nobody.
func TestAttackImages(t *testing.T) {
	t.Parallel()
	m, v := two(t, "")
	own := registryHost + "/" + m.name + "/own:1"
	if out, err := m.editor.push(own); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	pod := func(name, image, policy string) string {
		return strings.Replace(strings.Replace(script(name, "echo fine"), "image: busybox", "image: "+image, 1), "imagePullPolicy: IfNotPresent", "imagePullPolicy: "+policy, 1)
	}
	m.editor.apply(m.name, pod("first", own, "Always"))
	equal(t, "the attacker's pod", m.ended("first"), "Succeeded")
	for _, policy := range []string{"IfNotPresent", "Never"} {
		name := strings.ToLower(policy)
		v.editor.apply(v.name, pod(name, "busybox", policy))
		equal(t, "a pod of the image that was loaded, "+policy, v.ended(name), "Succeeded")
	}
	// What was pulled with credentials stays who has them's.
	v.editor.apply(v.name, pod("thief", own, "IfNotPresent"))
	v.pullFails("thief", "pods pull from the project of their own namespace")
	// While an image is pulled for one pod, those that never pull it wait, so nobody pulls that of virtual machines.
	for _, image := range []string{"atoll.dev/vm:latest", "atoll.dev/vm"} {
		if out, err := m.editor.try(pod("blocker", image, "Always"), "-n", m.name, "apply", "-f", "-"); err == nil || !strings.Contains(out, "is for the pods of virtual machines") {
			t.Errorf("a pod of image %s: %v\n%s", image, err, out)
		}
	}
}

// TestAttackRegistry: nothing of another project is read, mounted, listed or changed, by any name; a robot account is
// of its project only.
func TestAttackRegistry(t *testing.T) {
	t.Parallel()
	m, v := two(t, "")
	manifest, layer := v.editor.docker().artifact(v.name+"/app", 1000)
	m.editor.docker().artifact(m.name+"/own", 1000)
	robotName, robotSecret := v.robot("ci")
	anonymous := newDocker(t, "", "")
	serviceAccount := newDocker(t, "account", strings.TrimSpace(run(t, "", "-n", m.name, "create", "token", "default", "--audience="+registryHost)))
	if resp, text := serviceAccount.with(m.name+"/own", "pull", http.MethodGet, "manifests/1", nil, "Accept", ociManifestType); resp.StatusCode != http.StatusOK {
		t.Errorf("a service account at home: %s %s", resp.Status, text)
	}
	for who, d := range map[string]*docker{
		"owner": m.owner.docker(), "editor": m.editor.docker(), "nobody": anonymous, "account": serviceAccount,
		"account without the audience": newDocker(t, "account", strings.TrimSpace(run(t, "", "-n", v.name, "create", "token", "default"))),
		"wrong password":               newDocker(t, v.owner.name, "wrong"),
		"robot elsewhere":              newDocker(t, strings.ReplaceAll(robotName, v.name, m.name), robotSecret),
	} {
		refuse := func(what string, resp *http.Response, text string, codes ...int) {
			t.Helper()
			if !slices.Contains(append(codes, http.StatusUnauthorized, http.StatusForbidden), resp.StatusCode) {
				t.Errorf("%s, %s: %s %s", who, what, resp.Status, text)
			}
		}
		send := func(what, repository, method, path string, body []byte, codes ...int) {
			t.Helper()
			resp, text := d.with(repository, "pull,push,delete", method, path, body, "Content-Type", ociManifestType, "Accept", ociManifestType)
			refuse(what, resp, text, codes...)
		}
		send("manifest by tag", v.name+"/app", http.MethodGet, "manifests/1", nil)
		send("manifest by digest", v.name+"/app", http.MethodGet, "manifests/"+manifest, nil)
		send("layer", v.name+"/app", http.MethodGet, "blobs/"+layer, nil)
		send("layer, whether there", v.name+"/app", http.MethodHead, "blobs/"+layer, nil, http.StatusNotFound)
		send("tags", v.name+"/app", http.MethodGet, "tags/list", nil)
		send("referrers", v.name+"/app", http.MethodGet, "referrers/"+manifest, nil)
		send("upload", v.name+"/app", http.MethodPost, "blobs/uploads/", nil)
		send("manifest, written", v.name+"/app", http.MethodPut, "manifests/2", ociManifest(layer, 1000, layer, 1000))
		send("manifest, deleted", v.name+"/app", http.MethodDelete, "manifests/"+manifest, nil)
		send("layer, deleted", v.name+"/app", http.MethodDelete, "blobs/"+layer, nil)
		send("a project that is not there", "no-such-project/app", http.MethodPost, "blobs/uploads/", nil)
		send("the library", "library/app", http.MethodPost, "blobs/uploads/", nil)
		send("no project", "app", http.MethodPost, "blobs/uploads/", nil, http.StatusBadRequest)
	}
	mountAttacks(t, m, v, layer)
	// Names that lead elsewhere for whoever reads them carelessly.
	d := m.editor.docker()
	own := "repository:" + m.name + "/own:pull,push"
	for _, path := range []string{
		"/v2/" + m.name + "/own/../../" + v.name + "/app/manifests/1",
		"/v2/" + m.name + "/..%2f" + v.name + "/app/manifests/1",
		"/v2/" + m.name + "%2f..%2f" + v.name + "/app/manifests/1",
		"/v2/" + v.name + "%2fapp/manifests/1",
		"/v2//" + v.name + "/app/manifests/1",
		"/v2/./" + v.name + "/app/manifests/1",
		"/V2/" + v.name + "/app/manifests/1",
		"/v2/" + strings.ToUpper(v.name) + "/app/manifests/1",
		"/v2/" + v.name + "/app/manifests/1?n=/v2/" + m.name + "/own",
		"/v2/" + v.name + "/app/blobs/sha256:../../../../etc/passwd",
	} {
		if resp, text := d.send(http.MethodGet, path, d.token(own), nil); resp.StatusCode/100 == 2 {
			t.Errorf("GET %s: %s %s", path, resp.Status, text)
		}
	}
	// Scopes that ask for more than there is give no more.
	for _, scope := range []string{
		"repository:" + v.name + "/app:pull", "repository:" + v.name + "/app:*", "repository:*:pull", "repository:" + v.name + "/*:pull",
		"registry:catalog:*", "repository:" + m.name + "/own,repository:" + v.name + "/app:pull", "repository(plugin):" + v.name + "/app:pull",
	} {
		token := d.token(scope, "repository:"+m.name+"/own:pull")
		if resp, text := d.send(http.MethodGet, "/v2/"+v.name+"/app/manifests/1", token, nil); resp.StatusCode/100 != 4 {
			t.Errorf("scope %s: %s %s", scope, resp.Status, text)
		}
		if resp, text := d.send(http.MethodGet, "/v2/_catalog", token, nil); resp.StatusCode == http.StatusOK && strings.Contains(text, v.name) {
			t.Errorf("scope %s: the catalogue names the victim's: %s", scope, text)
		}
	}
	for _, bad := range []string{"x", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", d.token(own) + "x", strings.Repeat("A", 10000)} {
		if resp, _ := d.send(http.MethodGet, "/v2/"+m.name+"/own/manifests/1", bad, nil); resp.StatusCode/100 != 4 {
			t.Errorf("a token that is none: %s", resp.Status)
		}
	}
	// The robot of the victim works at home, and does not when it was removed.
	r := newDocker(t, robotName, robotSecret)
	if resp, text := r.with(v.name+"/app", "pull", http.MethodGet, "manifests/1", nil, "Accept", ociManifestType); resp.StatusCode != http.StatusOK {
		t.Errorf("a robot at home: %s %s", resp.Status, text)
	}
	if resp, text := r.with(m.name+"/own", "pull", http.MethodGet, "manifests/1", nil, "Accept", ociManifestType); resp.StatusCode/100 != 4 {
		t.Errorf("a robot elsewhere: %s %s", resp.Status, text)
	}
	v.owner.kubectl("-n", v.name, "delete", "robotaccount", "ci")
	eventually(t, "the removed robot to be refused", func() error {
		if resp, text := r.with(v.name+"/app", "pull", http.MethodGet, "manifests/1", nil, "Accept", ociManifestType); resp.StatusCode/100 != 4 {
			return fmt.Errorf("%s %s", resp.Status, text)
		}
		return nil
	})
}

// mountAttacks tries to get at a layer of another project by saying its digest.
func mountAttacks(t *testing.T, m, v *tenant, layer string) {
	t.Helper()
	d, mine := m.editor.docker(), m.name+"/own"
	for _, scopes := range [][]string{
		{"repository:" + mine + ":pull,push"},
		{"repository:" + mine + ":pull,push", "repository:" + v.name + "/app:pull"},
	} {
		// A token is good for a minute only.
		send := func(method, path string, body []byte, header ...string) (*http.Response, string) {
			return d.send(method, "/v2/"+mine+path, d.token(scopes...), body, header...)
		}
		for _, from := range []string{"&from=" + url.QueryEscape(v.name+"/app"), "", "&from=" + url.QueryEscape(mine+"/../../"+v.name+"/app")} {
			resp, text := send(http.MethodPost, "/blobs/uploads/?mount="+layer+from, nil)
			if resp.StatusCode == http.StatusCreated {
				t.Errorf("mounted a layer of another project with %q: %s", from, text)
			}
		}
		if resp, _ := send(http.MethodGet, "/blobs/"+layer, nil); resp.StatusCode != http.StatusNotFound {
			t.Errorf("a layer of another project by its digest: %s", resp.Status)
		}
		// A manifest that names it makes it no more one's own.
		config, _, _ := d.upload(mine, []byte("{}"))
		if resp, text := send(http.MethodPut, "/manifests/theft", ociManifest(config, 2, layer, 1000), "Content-Type", ociManifestType); resp.StatusCode/100 == 2 {
			t.Errorf("a manifest with a layer of another project: %s %s", resp.Status, text)
		}
		if resp, _ := send(http.MethodGet, "/blobs/"+layer, nil); resp.StatusCode != http.StatusNotFound {
			t.Errorf("a layer of another project after a manifest: %s", resp.Status)
		}
	}
}

// TestAttackPulls: an image of another namespace does not get into a pod, not even when the node has it already; and a
// new namespace of an old name gets nothing of the old one.
func TestAttackPulls(t *testing.T) {
	t.Parallel()
	m, v := two(t, "")
	image := registryHost + "/" + v.name + "/app:1"
	if out, err := v.editor.push(image); err != nil {
		t.Fatal(err, out)
	}
	pod := func(name, image, policy string) string {
		return strings.Replace(strings.Replace(sleeper, "image: busybox, imagePullPolicy: IfNotPresent", "image: "+image+", imagePullPolicy: "+policy, 1), "name: box}", "name: "+name+"}", 1)
	}
	refused := func(name string) {
		t.Helper()
		m.waiting(name, "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull")
	}
	m.editor.apply(m.name, pod("early", image, "IfNotPresent"))
	refused("early")
	v.editor.apply(v.name, pod("box", image, "IfNotPresent"))
	v.ready("box")
	digest := v.field("pod/box", ".status.containerStatuses[0].imageID")
	digest = registryHost + "/" + v.name + "/app@" + digest[strings.LastIndex(digest, "sha256:"):]
	for i, policy := range []string{"IfNotPresent", "Always", "Never"} {
		for j, name := range []string{image, digest} {
			pod2 := fmt.Sprintf("late-%d%d", i, j)
			m.editor.apply(m.name, pod(pod2, name, policy))
			refused(pod2)
		}
	}
	// A pull secret of one's own helps no more.
	m.editor.kubectl("-n", m.name, "create", "secret", "docker-registry", "mine", "--docker-server="+registryHost, "--docker-username="+m.editor.name, "--docker-password="+m.editor.password)
	m.editor.apply(m.name, strings.Replace(pod("secret", image, "IfNotPresent"), "spec:", "spec:\n  imagePullSecrets: [{name: mine}]", 1))
	refused("secret")
	if phase := m.field("pod/early", ".status.phase"); phase != "Pending" {
		t.Errorf("the pod is %s", phase)
	}
	// The victim's namespace goes; the attacker is given its name.
	name := v.name
	v.remove()
	again := &tenant{namespace: &namespace{t: t, name: name}, owner: m.owner, editor: m.editor, viewer: m.viewer}
	again.declare("")
	again.account()
	eventually(t, "the owner to be told that there is no image of the namespace that had the name before", func() error {
		if resp, text := m.owner.docker().with(name+"/app", "pull", http.MethodGet, "manifests/1", nil, "Accept", ociManifestType); resp.StatusCode/100 == 2 {
			t.Fatalf("there is: %s %s", resp.Status, text)
		} else if resp.StatusCode != http.StatusNotFound {
			return fmt.Errorf("%s %s", resp.Status, text)
		}
		return nil
	})
	m.editor.applySoon(name, pod("heir", image, "Never"))
	again.waiting("heir", "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull")
}

// TestAttackPortal: garbage gets an answer that says so, or none, and the next one in the queue gets theirs.
func TestAttackPortal(t *testing.T) {
	t.Parallel()
	address := portal(t)
	config := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // an attacker does not care
	raw := func(bytes []byte, secure bool) string {
		t.Helper()
		conn, err := net.DialTimeout("tcp", address, patience)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		if secure {
			tlsConn := tls.Client(conn, config)
			if err := tlsConn.HandshakeContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			conn = tlsConn
		}
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		_, _ = conn.Write(bytes)
		line, _ := bufio.NewReader(io.LimitReader(conn, 1<<16)).ReadString('\n')
		return strings.TrimSpace(line)
	}
	noise := make([]byte, 1<<16)
	_, _ = rand.Read(noise)
	refused := func(what, line string) {
		t.Helper()
		if line != "" && !strings.Contains(line, " 4") && !strings.Contains(line, " 5") {
			t.Errorf("%s: %q", what, line)
		}
	}
	raw(noise, false)
	refused("noise", raw(noise, true))
	refused("a large header", raw([]byte("GET /v2/ HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("a", 2<<20)+"\r\n\r\n"), true))
	refused("no host", raw([]byte("GET /wcp/loginbanner HTTP/1.1\r\n\r\n"), true))
	refused("two lengths", raw([]byte("POST /wcp/login HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"), true))
	refused("length and chunks", raw([]byte("POST /wcp/login HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"), true))
	refused("a large body", raw([]byte("POST /wcp/login HTTP/1.1\r\nHost: x\r\nAuthorization: Basic eDp5\r\nContent-Length: 1000000000\r\n\r\n"+strings.Repeat("[", 1<<20)), true))
	d := newDocker(t, "", "")
	for _, path := range []string{"/", "/wcp/login", "/wcp/login/../../etc/passwd", "/login", "/login/callback?code=x&state=y", "/registry/token?scope=" + strings.Repeat("a", 50000), "/registry/", "/v2/", "/v2/a/manifests/", "/debug/pprof/", "/metrics", "/healthz/../api/v1/secrets", "/api/v1/secrets", "/%00", "/%2e%2e/%2e%2e/etc/passwd"} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodTrace} {
			req := d.request(method, path, []byte(`{"guest_cluster_name": {"a": [`))
			req.Header.Set("Authorization", "Basic "+strings.Repeat("A", 5000))
			resp, body := d.do(req)
			if resp.StatusCode >= 500 || bytes.Contains(body, []byte("goroutine ")) || bytes.Contains(body, []byte("root:")) {
				t.Errorf("%s %.60s: %s %.200s", method, path, resp.Status, body)
			}
		}
	}
	resp, body := d.do(d.request(http.MethodGet, "/wcp/loginbanner", nil))
	if resp.StatusCode != http.StatusOK {
		t.Errorf("the banner afterwards: %s %s", resp.Status, body)
	}
	// Many connections that say nothing keep nobody out.
	var idle []net.Conn
	for range 200 {
		if conn, err := net.DialTimeout("tcp", address, 10*time.Second); err == nil {
			idle = append(idle, conn)
		}
	}
	if resp, _ := d.do(d.request(http.MethodGet, "/wcp/loginbanner", nil)); resp.StatusCode != http.StatusOK {
		t.Errorf("with %d idle connections: %s", len(idle), resp.Status)
	}
	for _, conn := range idle {
		_ = conn.Close()
	}
}
