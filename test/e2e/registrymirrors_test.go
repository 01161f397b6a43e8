//go:build e2e

package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// proxyPath is where a project that is a proxy, as Harbor has them, serves the same.
const proxyPath = "/v2/proxy/"

// upstream is a registry outside of the cluster, with TLS of an authority of its own and a password.
type upstream struct {
	*registry
	url, ca string
}

func newUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{registry: newRegistry(t)}
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		req.URL.Path = strings.Replace(req.URL.Path, proxyPath, "/v2/", 1)
		u.registry.ServeHTTP(w, req)
	}))
	t.Cleanup(server.Close)
	u.url = server.URL
	u.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	return u
}

// nobodyAt is an address where nothing answers.
func nobodyAt(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// configureRegistries makes the RegistryConfiguration what the test wants. When the test ends it is gone, and the
// cluster's own registry is back.
func configureRegistries(t *testing.T, spec map[string]any) {
	t.Helper()
	object, err := json.Marshal(map[string]any{
		"apiVersion": "atoll.dev/v1alpha1", "kind": "RegistryConfiguration", "metadata": map[string]any{"name": "cluster"}, "spec": spec,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := kubectl(context.Background(), "", "delete", "registryconfiguration", "cluster", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
		// The context of the test has ended, so this is no eventually.
		err := asBefore()
		for end := time.Now().Add(patience); err != nil && time.Now().Before(end); err = asBefore() {
			time.Sleep(300 * time.Millisecond)
		}
		if err != nil {
			t.Errorf("after the configuration is gone: %v", err)
		}
	})
	run(t, string(object), "apply", "-f", "-")
}

// asBefore is nil when pulls and pushes go where they go without a configuration.
func asBefore() error {
	own, err := os.ReadFile(filepath.Join(suite.dataDir, "registries", registryHost, "hosts.toml"))
	if err != nil || !strings.Contains(string(own), net.JoinHostPort(suite.address, "443")) {
		return fmt.Errorf("%s leads elsewhere: %s %w", registryHost, own, err)
	}
	if _, err := os.Stat(filepath.Join(suite.dataDir, "registries", "docker.io")); err == nil {
		return errors.New("there is a mirror still")
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	resp, err := client.Get("https://" + net.JoinHostPort(suite.address, "443") + "/v2/")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		return fmt.Errorf("the cluster's own registry: %s", resp.Status)
	}
	return nil
}

// secret is a pull secret with the password of the upstream registry, under the name that images have.
func (n *namespace) secret(name, server, password string) {
	n.t.Helper()
	n.kubectl("create", "secret", "docker-registry", name,
		"--docker-server="+server, "--docker-username="+registryUser, "--docker-password="+password)
}

// pullFails waits until the message of a pod whose image cannot be had says all of something. The host may not have
// seen a new configuration at the first attempts.
func (n *namespace) pullFails(pod string, wants ...string) {
	n.t.Helper()
	eventually(n.t, "the reason why pod "+pod+" has no image", func() error {
		message := n.waiting(pod, "ErrImagePull", "ImagePullBackOff")
		for _, w := range wants {
			if !strings.Contains(message, w) {
				return fmt.Errorf("%q does not say %q", message, w)
			}
		}
		return nil
	})
}

// forget removes an image from the host when the test ends.
func forget(t *testing.T, image string) {
	t.Helper()
	t.Cleanup(func() { _ = command("image", "rm", image) })
}

// TestMirrors: images of an upstream registry come from a mirror. It is not parallel: the configuration is for all.
func TestMirrors(t *testing.T) {
	n := newNamespace(t)
	u, down := newUpstream(t), nobodyAt(t)
	digest := u.push("library/mirrored:1", image{})
	forget(t, "docker.io/library/mirrored:1")
	// Registries that do not answer themselves, as on a host without a way out.
	locked, lonely, strange := nobodyAt(t), nobodyAt(t), nobodyAt(t)
	configureRegistries(t, map[string]any{"mirrors": []any{
		// The first does not answer, so the second is asked.
		map[string]any{"registry": "docker.io", "endpoints": []string{"https://" + down, u.url + strings.TrimSuffix(proxyPath, "/")}, "ca": u.ca},
		map[string]any{"registry": locked, "endpoints": []string{u.url}, "ca": u.ca},
		map[string]any{"registry": lonely, "endpoints": []string{"https://" + down}},
		map[string]any{"registry": strange, "endpoints": []string{u.url}},
	}})
	// Pull secrets have the name of the registry in the image, and the mirror's password.
	n.secret("right", "https://index.docker.io/v1/", registryPassword)
	n.secret("wrong", locked, "12345")
	n.apply(pulled("right", "mirrored:1", "right"))
	equal(t, "phase", n.ended("right"), "Succeeded")
	contains(t, n.field("pod/right", ".status.containerStatuses[0].imageID"), digest)

	mirror := strings.TrimPrefix(u.url, "https://")
	for pod, c := range map[string]struct {
		registry string
		wants    []string
	}{
		"wrong":   {locked, []string{mirror, "401 Unauthorized"}},
		"down":    {lonely, []string{down, "connection refused"}},
		"strange": {strange, []string{mirror, "certificate signed by unknown authority"}},
	} {
		n.apply(pulled(pod, c.registry+"/library/mirrored:1", "wrong"))
		n.pullFails(pod, append(c.wants, c.registry+"/library/mirrored:1")...)
	}
}

// TestExternalRegistry: another registry in place of the cluster's own.
func TestExternalRegistry(t *testing.T) {
	n := newNamespace(t)
	u := newUpstream(t)
	name := n.name + "/app:1"
	digest := u.push(name, image{})
	forget(t, registryHost+"/"+name)
	answer := func() (int, string) {
		resp, text := newDocker(t, "", "").send(http.MethodGet, "/v2/", "", nil)
		return resp.StatusCode, text
	}
	configureRegistries(t, map[string]any{"external": map[string]any{"url": u.url, "ca": u.ca}})
	eventually(t, "the cluster's own registry to step back", func() error {
		if code, text := answer(); code != http.StatusNotFound || !strings.Contains(text, u.url) {
			return errors.New(text)
		}
		return nil
	})
	n.secret("right", registryHost, registryPassword)
	n.secret("wrong", registryHost, "12345")
	n.apply(pulled("right", registryHost+"/"+name, "right"))
	equal(t, "phase", n.ended("right"), "Succeeded")
	contains(t, n.field("pod/right", ".status.containerStatuses[0].imageID"), digest)
	n.apply(pulled("wrong-password", registryHost+"/"+name, "wrong"))
	n.pullFails("wrong-password", registryHost+"/"+name, "401 Unauthorized", strings.TrimPrefix(u.url, "https://"))
	// The token of the pod's service account is not sent to somebody else's registry.
	n.apply(pulled("no-password", registryHost+"/"+name, "none"))
	n.pullFails("no-password", registryHost+"/"+name, "authorization failed")
}
