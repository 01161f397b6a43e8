//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// registry is `atoll registry` as this person.
func (p *actor) registry(args ...string) string {
	p.t.Helper()
	out, err := p.atoll("", append([]string{"registry"}, args...)...)
	if err != nil {
		p.t.Fatalf("as %s: %v", p.name, err)
	}
	return out
}

// unregistered is `atoll registry` for what must be refused.
func (p *actor) unregistered(args []string, wants ...string) {
	p.t.Helper()
	out, err := p.atoll("", append([]string{"registry"}, args...)...)
	if err == nil {
		p.t.Errorf("%s was allowed to: atoll registry %s\n%s", p.name, strings.Join(args, " "), out)
	}
	p.says(out, wants...)
}

// usedBytes is what `atoll registry usage` counts for the project.
func (n *tenant) usedBytes() (used int64) {
	n.t.Helper()
	var list []struct {
		Project string
		Used    int64
	}
	if out := n.viewer.registry("usage", n.name, "-o", "json"); json.Unmarshal([]byte(out), &list) != nil || len(list) != 1 || list[0].Project != n.name {
		n.t.Fatalf("the usage is %s", out)
	}
	return list[0].Used
}

// TestRegistryUpkeep: the registry collects what is unused while it is pushed to, keeps as many tags as it is told,
// takes an upload up again whose connection broke, and `atoll registry` shows and changes what a role may.
func TestRegistryUpkeep(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", `"registry": {"quota": "64Mi", "retention": [{"pattern": "dev:*", "keepLast": 1}]}`)
	administrator := newActor(t, n.name+"-administrator", "administrators")
	c := newCrane(t, n.editor.name, n.editor.password)

	// Collections one after the other, as long as images come and go.
	ctx, stop := context.WithCancel(t.Context())
	collected := make(chan int)
	go func() {
		runs := 0
		for ctx.Err() == nil {
			out, err := administrator.atoll("", "registry", "gc")
			switch {
			case err == nil && strings.Contains(out, "removed "):
				runs++
			case ctx.Err() == nil && !strings.Contains(out, "running already") && !strings.Contains(out, "cannot ask the API server"): // the one of every hour
				t.Errorf("collecting: %v\n%s", err, out)
			}
		}
		collected <- runs
	}()
	const tags = 4
	containers := ""
	for i := range tags {
		img := runnable(t)
		for _, tag := range []string{fmt.Sprint(i), fmt.Sprintf("gone-%d", i)} {
			if err := c.write(n.name+"/app:"+tag, img); err != nil {
				t.Fatalf("pushing beside a collection: %v", err)
			}
		}
		n.editor.registry("rm", fmt.Sprintf("%s/app:gone-%d", n.name, i))
		containers += fmt.Sprintf("\n    - {name: c%[1]d, image: %[2]s/%[3]s/app:%[1]d, imagePullPolicy: Always, command: [sh, -ec, \"echo runs\"]}", i, registryHost, n.name)
	}
	stop()
	if runs := <-collected; runs == 0 {
		t.Error("there was no collection meanwhile")
	} else {
		t.Logf("%d collections", runs)
	}
	eventually(t, "what a collection would remove", func() error {
		out, err := administrator.atoll("", "registry", "gc", "--dry-run")
		if err != nil {
			return err
		}
		return is(fmt.Sprint(strings.Contains(out, "would remove")), "true")
	})
	n.editor.apply(n.name, "apiVersion: v1\nkind: Pod\nmetadata: {name: all}\nspec:\n  restartPolicy: Never\n  containers:"+containers)
	equal(t, "a pod with an image of each tag", n.ended("all"), "Succeeded")

	// Retention.
	for i := range 3 {
		n.editor.docker().image(n.name+"/dev", fmt.Sprint(i), fmt.Appendf(nil, "layer %d", i))
	}
	equal(t, "tags that are kept", strings.Join(must(remote.List(ref(t, n.name+"/dev").Context(), c.opts...))(t), " "), "2")

	n.brokenUpload()
	n.registryByRole(administrator)
}

// registryByRole is what `atoll registry` does for whom.
func (n *tenant) registryByRole(administrator *actor) {
	n.t.Helper()
	for _, p := range []*actor{n.viewer, administrator} {
		contains(n.t, p.registry("ls", n.name), n.name+"/app")
		contains(n.t, p.registry("tags", n.name+"/app"), "sha256:")
		contains(n.t, p.registry("usage", n.name), "64 MiB")
	}
	n.viewer.unregistered([]string{"rm", n.name + "/app:0"}, "may not delete", "role Edit")
	n.editor.unregistered([]string{"gc"}, n.editor.name, "may not collect")
	n.viewer.unregistered([]string{"ls", "kube-system"}, "may not list", "kube-system")
	contains(n.t, n.editor.registry("rm", n.name+"/app:0"), "removed")
	if out := n.viewer.registry("tags", n.name+"/app"); strings.Contains(out, "\n0 ") || !strings.Contains(out, "\n1 ") {
		n.t.Errorf("tags after one was removed:\n%s", out)
	}
	n.withdrawn()
}

// withdrawn: what was given by a role goes with it, also for a token that is there. A token is good for a minute only: when
// it has ended before the role has, that is no proof, and there is another try.
func (n *tenant) withdrawn() {
	t, d := n.t, n.editor.docker()
	t.Helper()
	var token string
	begin := func() int {
		resp, _ := d.send(http.MethodPost, "/v2/"+n.name+"/app/blobs/uploads/", token, nil)
		return resp.StatusCode
	}
	role := func(from, to string) {
		run(t, "", "patch", "svns", n.name, "--type=json", "-p", fmt.Sprintf(`[{"op": "test", "path": "/spec/accessList/1/role", "value": %q}, {"op": "replace", "path": "/spec/accessList/1/role", "value": %q}]`, from, to))
	}
	eventually(t, "a push without the role to be refused", func() error {
		eventually(t, "a push with the role", func() error {
			token = d.token("repository:" + n.name + "/app:pull,push")
			if code := begin(); code != http.StatusAccepted {
				return fmt.Errorf("status %d", code)
			}
			return nil
		})
		role("Edit", "View")
		var code int
		eventually(t, "the token to count no more", func() error {
			if code = begin(); code == http.StatusAccepted {
				return errors.New("it does")
			}
			return nil
		})
		if code != http.StatusForbidden {
			role("View", "Edit")
			return fmt.Errorf("status %d", code)
		}
		return nil
	})
}

// broken is a body whose connection breaks at its end.
type broken struct{ io.Reader }

func (b broken) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = errors.New("the cable was pulled")
	}
	return n, err
}

// brokenUpload breaks the connection in the middle of a request, asks how far it got, and goes on from there. What it
// took counts once in the end.
func (n *tenant) brokenUpload() {
	n.t.Helper()
	before := n.usedBytes()
	d, repository := n.editor.docker(), n.name+"/broken"
	blob := make([]byte, 3<<20)
	_, _ = rand.Read(blob)
	sum := sha256.Sum256(blob)
	token := func() string { return d.token("repository:" + repository + ":pull,push") } // it is good for a minute only
	resp, text := d.send(http.MethodPost, "/v2/"+repository+"/blobs/uploads/", token(), nil)
	location, err := resp.Location()
	if err != nil {
		n.t.Fatalf("%s: %v", text, err)
	}
	req := d.request(http.MethodPatch, location.RequestURI(), nil)
	req.Body, req.ContentLength = io.NopCloser(broken{bytes.NewReader(blob[:2<<20])}), int64(len(blob))
	req.Header.Set("Authorization", "Bearer "+token())
	if resp, err := d.client.Do(req); err == nil {
		_ = resp.Body.Close()
		n.t.Fatalf("the connection did not break: %s", resp.Status)
	}
	got := 0
	eventually(n.t, "the registry to have seen that the connection broke", func() error {
		resp, text := d.send(http.MethodGet, location.RequestURI(), token(), nil)
		if resp.StatusCode != http.StatusNoContent {
			return fmt.Errorf("%s %s", resp.Status, text)
		}
		if _, err := fmt.Sscanf(resp.Header.Get("Range"), "0-%d", &got); err != nil || got == 0 {
			return fmt.Errorf("range %q: %w", resp.Header.Get("Range"), err)
		}
		next, err := resp.Location()
		if err != nil {
			return err
		}
		resp, text = d.send(http.MethodPatch, next.RequestURI(), token(), blob[got+1:], "Content-Type", "application/octet-stream", "Content-Range", fmt.Sprintf("%d-%d", got+1, len(blob)-1))
		if resp.StatusCode != http.StatusAccepted {
			return fmt.Errorf("going on at %d: %s %s", got+1, resp.Status, text)
		}
		location, err = resp.Location()
		return err
	})
	if got >= 2<<20 {
		n.t.Errorf("it has %d bytes, and was sent %d", got, 2<<20)
	}
	q := location.Query()
	q.Set("digest", "sha256:"+hex.EncodeToString(sum[:]))
	location.RawQuery = q.Encode()
	if resp, text := d.send(http.MethodPut, location.RequestURI(), token(), nil); resp.StatusCode != http.StatusCreated {
		n.t.Fatalf("the end of the upload: %s %s", resp.Status, text)
	}
	if resp, text := d.with(repository, "pull", http.MethodGet, "blobs/"+q.Get("digest"), nil); resp.StatusCode != http.StatusOK || text != string(blob) {
		n.t.Errorf("what came of it: %s, %d bytes", resp.Status, len(text))
	}
	equal(n.t, "bytes that it takes", fmt.Sprint(n.usedBytes()-before), fmt.Sprint(len(blob)))
}

// TestRobotAccounts: one that only pulls, another password in place of the first, one whose time is over, and one that
// was deleted.
func TestRobotAccounts(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", "")
	n.editor.docker().artifact(n.name+"/app", 1000)
	password := func(out string) string {
		t.Helper()
		_, after, ok := strings.Cut(out, "password  ")
		if !ok {
			t.Fatalf("there is no password in: %s", out)
		}
		return strings.TrimSpace(after)
	}
	pulls := func(name, password string) error {
		resp, text := newDocker(t, "robot$"+n.name+"+"+name, password).with(n.name+"/app", "pull", http.MethodGet, "manifests/1", nil, "Accept", ociManifestType)
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s %s", resp.Status, text)
		}
		return nil
	}
	ends := func(what, name, password string) {
		t.Helper()
		eventually(t, what+" to be refused", func() error {
			if err := pulls(name, password); err == nil || !strings.Contains(err.Error(), "401") {
				return fmt.Errorf("it is not: %w", err)
			}
			return nil
		})
	}
	works := func(what, name, password string) { // the registry learns of a password a moment later
		t.Helper()
		eventually(t, what+" to count", func() error { return pulls(name, password) })
	}
	first := password(n.editor.registry("robot", "create", "reader", "-n", n.name))
	works("the password of a robot that pulls", "reader", first)
	reader := newDocker(t, "robot$"+n.name+"+reader", first)
	if _, code, text := reader.upload(n.name+"/app", []byte("x")); code != http.StatusForbidden || !strings.Contains(text, "permissions") {
		t.Errorf("a robot that only pulls pushes: %d %s", code, text)
	}
	contains(t, n.editor.registry("robot", "ls", "-n", n.name), "robot$"+n.name+"+reader")
	n.viewer.unregistered([]string{"robot", "create", "mine", "-n", n.name}, "cannot create", n.viewer.name)
	n.viewer.unregistered([]string{"robot", "ls", "-n", n.name}, "cannot list")
	n.viewer.unregistered([]string{"robot", "rotate", "reader", "-n", n.name}, "robotaccounts", "forbidden")

	second := password(n.editor.registry("robot", "rotate", "reader", "-n", n.name))
	ends("the password from before", "reader", first)
	if second == first {
		t.Error("the new password is the one from before")
	}
	works("the new password", "reader", second)
	n.editor.apply(n.name, `{"apiVersion": "atoll.dev/v1alpha1", "kind": "RobotAccount", "metadata": {"name": "reader"}, "spec": {"permissions": ["pull"], "rotation": 7}}`)
	ends("the password from before spec.rotation", "reader", second)

	over := time.Now().Add(30 * time.Second)
	short := password(n.editor.registry("robot", "create", "guest", "-n", n.name, "--expires", "30s"))
	eventually(t, "it to count before it has expired", func() error {
		if err := pulls("guest", short); err != nil && time.Now().Before(over) {
			return err
		}
		return nil
	})
	ends("one that has expired", "guest", short)

	third := password(n.editor.registry("robot", "create", "builder", "--push", "-n", n.name))
	eventually(t, "a robot to push", func() error {
		_, code, text := newDocker(t, "robot$"+n.name+"+builder", third).upload(n.name+"/app", []byte("y"))
		if code != http.StatusCreated {
			return fmt.Errorf("%d %s", code, text)
		}
		return nil
	})
	n.editor.registry("robot", "delete", "builder", "-n", n.name)
	ends("one that was deleted", "builder", third)
}

// library: what administrators push there everybody with an account and every pod may have, and nobody else.
func (n *tenant) library(stranger *actor) {
	n.t.Helper()
	administrator := newActor(n.t, n.name+"-administrator", "administrators")
	image := "library/" + n.name + ":1"
	n.t.Cleanup(func() {
		if out, err := tryHost(context.Background(), "", "registry", "rm", image); err != nil {
			n.t.Errorf("%v\n%s", err, out)
		}
	})
	if out, err := administrator.push(registryHost + "/" + image); err != nil {
		n.t.Fatalf("an administrator pushes to the library: %v\n%s", err, out)
	}
	n.editor.apply(n.name, strings.Replace(strings.Replace(script("shelf", "echo runs"), "image: busybox", "image: "+registryHost+"/"+image, 1), "IfNotPresent", "Always", 1))
	equal(n.t, "a pod with an image of the library", n.ended("shelf"), "Succeeded")
	for _, p := range []*actor{n.viewer, stranger} {
		if resp, text := p.docker().with("library/"+n.name, "pull", http.MethodGet, "manifests/1", nil, "Accept", ociManifestType); resp.StatusCode != http.StatusOK {
			n.t.Errorf("%s pulls from the library: %s %s", p.name, resp.Status, text)
		}
	}
	if resp, text := newDocker(n.t, "", "").with("library/"+n.name, "pull", http.MethodGet, "manifests/1", nil); resp.StatusCode != http.StatusUnauthorized {
		n.t.Errorf("nobody pulls from the library: %s %s", resp.Status, text)
	}
	for _, p := range []*actor{n.owner, stranger} {
		if out, err := p.push(registryHost + "/library/" + n.name + ":2"); err == nil || !strings.Contains(out, "administrators") {
			n.t.Errorf("%s pushes to the library: %v\n%s", p.name, err, out)
		}
		p.unregistered([]string{"rm", image}, "administrators")
	}
}
