//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	gwebsocket "github.com/gorilla/websocket"
)

// machines is a namespace with the tiny image and a small class.
func machines(t *testing.T) *namespace {
	t.Helper()
	n := newNamespace(t)
	atollOK(t, "image", "import", filepath.Join(filepath.Dir(filepath.Dir(suite.atoll)), "build", "vm", "tiny.qcow2"), "--name", "tiny", "-n", n.name)
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineClass
metadata: {name: tiny}
spec: {hardware: {cpus: 1, memory: 192Mi}}
`)
	return n
}

// vm is `atoll vm` in the namespace.
func (n *namespace) vm(args ...string) string {
	n.t.Helper()
	return atollOK(n.t, append([]string{"vm", "--kubeconfig", suite.dataDir + "/admin.kubeconfig", "-n", n.name}, args...)...)
}

// createBox makes the machine box and waits until its guest is up.
func (n *namespace) createBox() {
	n.t.Helper()
	n.vm("create", "box", "--image", "tiny", "--class", "tiny", "--no-bootstrap")
	n.agent("box")
}

// agent waits until the guest agent of a machine answers.
func (n *namespace) agent(name string) {
	n.t.Helper()
	eventually(n.t, "the guest agent of "+name, func() error {
		_, err := n.try("exec", name, "--", "/atoll/heartbeat")
		return err
	})
}

// power waits for a machine's power state.
func (n *namespace) power(name, want string) {
	n.t.Helper()
	eventually(n.t, name+" to be "+want, func() error {
		if got := n.field("vm/"+name, ".status.powerState"); got != want {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}

// TestMachineSnapshots: with and without memory, a tree, going back running and stopped, deleting from the middle.
func TestMachineSnapshots(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.createBox()
	n.exec("box", "sh", "-c", "echo first >/data/file; echo lives >/tmp/memory; sync")
	if out := n.vm("snapshot", "box", "--name", "first", "--memory"); !strings.Contains(out, "snapshot first of box is taken") {
		t.Fatal(out)
	}
	n.exec("box", "sh", "-c", "echo second >/data/file; echo dies >/tmp/memory; sync")
	n.vm("snapshot", "box", "--name", "second")
	if got := n.kubectl("get", "volumesnapshot", "-o", "jsonpath={.items[*].status.readyToUse}"); got != "true true" {
		t.Errorf("VolumeSnapshots are ready: %q", got)
	}
	n.vm("revert", "box", "first")
	n.agent("box")
	if got := n.exec("box", "sh", "-c", "cat /data/file /tmp/memory"); got != "first\nlives\n" {
		t.Errorf("back with memory: %q", got)
	}
	// The next one is a second child. One without memory leaves the machine off.
	n.exec("box", "sh", "-c", "echo third >/data/file; sync")
	n.vm("stop", "box", "--hard")
	n.vm("snapshot", "box", "--name", "third")
	if got := n.field("vmsnapshot/first", ".status.children[*].name"); got != "second third" {
		t.Errorf("children of first: %q", got)
	}
	n.vm("revert", "box", "second")
	n.power("box", "PoweredOff")
	n.vm("start", "box")
	n.agent("box")
	if got := n.exec("box", "cat", "/data/file"); got != "second\n" {
		t.Errorf("back without memory: %q", got)
	}
	n.kubectl("delete", "vmsnapshot", "first", "--timeout=120s")
	eventually(t, "the children to be roots", func() error {
		if got := n.field("vm/box", ".status.rootSnapshots[*].name"); got != "second third" {
			return fmt.Errorf("roots are %q", got)
		}
		return nil
	})
	n.vm("revert", "box", "third", "--start")
	n.agent("box")
	if got := n.exec("box", "cat", "/data/file"); got != "third\n" {
		t.Errorf("back after a deletion: %q", got)
	}
	if out := n.vm("snapshots", "box"); !strings.Contains(out, "third *") {
		t.Errorf("snapshots:\n%s", out)
	}
	n.vm("delete", "box")
	eventually(t, "the snapshots to go with the machine", func() error {
		if left := n.kubectl("get", "vmsnapshot,volumesnapshot", "-o", "name"); left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
}

// TestMachineServices: machines of a replica set behind a VirtualMachineService, with a pod behind a plain Service.
func TestMachineServices(t *testing.T) {
	t.Parallel()
	n := machines(t)
	port := 20000 + len(n.name)*7
	n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineService
metadata: {name: web}
spec:
  type: LoadBalancer
  ports: [{name: http, port: %d, protocol: TCP, targetPort: 80}]
  selector: {app: web}
---
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineReplicaSet
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      className: tiny
      imageName: tiny
      storageClass: atoll
      readinessProbe: {guestHeartbeat: {}}
`, port))
	n.kubectl("wait", "vmrs/web", "--for=condition=VirtualMachinesReady", "--timeout=240s")
	eventually(t, "the machine to answer at the node's address", func() error {
		address := n.field("vmservice/web", ".status.loadBalancer.ingress[0].ip")
		return get(t, fmt.Sprintf("http://%s/", net.JoinHostPort(address, fmt.Sprint(port))), "hello from web-")
	})
	// A port of the host is not to be had at the host's address, in whatever way it is asked for.
	if out, err := n.try("patch", "service", "web", "--type=json", "-p", `[{"op": "replace", "path": "/spec/ports/0/port", "value": 6443}]`); err == nil || !strings.Contains(out, "belong to the host") {
		t.Errorf("port 6443 of the host: %v, %s", err, out)
	}
	n.kubectl("annotate", "vmservice", "web", "atoll.dev/ingress=203.0.113.1")
	n.kubectl("patch", "vmservice", "web", "--type=json", "-p", `[{"op": "replace", "path": "/spec/ports/0/port", "value": 6443}]`)
	eventually(t, "the service to have an address of its own", func() error {
		switch address := n.field("vmservice/web", ".status.loadBalancer.ingress[0].ip"); address {
		case "", suite.address:
			return fmt.Errorf("it has %q", address)
		default:
			return get(t, fmt.Sprintf("http://%s/", net.JoinHostPort(address, "6443")), "hello from web-")
		}
	})
	n.kubectl("scale", "vmrs/web", "--replicas=2")
	eventually(t, "two endpoints", func() error {
		got := n.kubectl("get", "endpointslice", "-l", "kubernetes.io/service-name=web", "-o", "jsonpath={.items[*].endpoints[*].conditions.ready}")
		if got != "true true" {
			return fmt.Errorf("endpoints are ready: %q", got)
		}
		return nil
	})
	n.kubectl("scale", "vmrs/web", "--replicas=0")
	eventually(t, "no machines", func() error {
		if left := n.kubectl("get", "vm", "-o", "name"); left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
}

// get reads a page that must hold the text.
func get(t *testing.T, url, text string) error {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Close = true // who answered before rules were there is not asked again
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("%s: %w", url, err)
	}
	if !strings.Contains(string(body), text) {
		return fmt.Errorf("%s says %s %q", url, resp.Status, body)
	}
	return nil
}

// TestMachineGroup: members start one after the other, and stop together.
func TestMachineGroup(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachineGroup
metadata: {name: app}
spec:
  powerState: PoweredOff
  bootOrder:
  - members: [{name: db}]
  - powerOnDelay: 10s
    members: [{name: front}]
`)
	for _, name := range []string{"db", "front"} {
		n.vm("create", name, "--image", "tiny", "--class", "tiny", "--no-bootstrap", "--group", "app", "--off")
	}
	n.kubectl("wait", "vmg/app", "--for=condition=Ready", "--timeout=120s")
	n.kubectl("patch", "vmg/app", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOn"}}`)
	n.power("db", "PoweredOn")
	n.power("front", "PoweredOn")
	started := func(name string) time.Time {
		at, err := time.Parse(time.RFC3339, n.field("pod/"+name, ".metadata.creationTimestamp"))
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	if after := started("front").Sub(started("db")); after < 5*time.Second {
		t.Errorf("front was started %s after db", after)
	}
	n.kubectl("wait", "vmg/app", "--for=condition=Ready", "--timeout=120s")
	n.kubectl("patch", "vmg/app", "--type=merge", "-p", `{"spec":{"powerState":"PoweredOff","powerOffMode":"Hard"}}`)
	n.power("db", "PoweredOff")
	n.power("front", "PoweredOff")
}

// TestMachineConsoles: serial console and screen through the API server, and a web console with a ticket.
func TestMachineConsoles(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.createBox()
	cmd := exec.CommandContext(t.Context(), suite.atoll, "vm", "--data-dir", suite.dataDir, "--kubeconfig", suite.dataDir+"/admin.kubeconfig", "-n", n.name, "console", "box")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	said := &heard{more: make(chan struct{}, 1)}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "\r\necho con$((40+2))sole\r\n"); err != nil {
		t.Fatal(err)
	}
	said.wait(t, "con42sole")
	_ = in.Close()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()

	conn := n.webConsole("box")
	_, greeting, err := conn.ReadMessage()
	if err != nil || !strings.HasPrefix(string(greeting), "RFB 003") {
		t.Errorf("the screen says %q, %v", greeting, err)
	}
	user := "system:serviceaccount:" + n.name + ":default"
	n.kubectl("create", "rolebinding", "look", "--clusterrole=view", "--serviceaccount="+n.name+":default")
	if out, err := exec.CommandContext(t.Context(), suite.atoll, "vm", "--kubeconfig", suite.dataDir+"/admin.kubeconfig", "-n", n.name, "--as", user, "console", "box").CombinedOutput(); err == nil ||
		!strings.Contains(string(out), "forbidden") {
		t.Errorf("who may only look used the console: %s", out)
	}
}

// webConsole asks for a ticket and uses it, twice; the second time is refused.
func (n *namespace) webConsole(name string) *gwebsocket.Conn {
	t := n.t
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public := strings.ReplaceAll(string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), "\n", "\n    ")
	n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineWebConsoleRequest
metadata: {name: look}
spec:
  name: %s
  publicKey: |
    %s
`, name, public))
	var response string
	eventually(t, "the ticket", func() error {
		if response = n.field("virtualmachinewebconsolerequest/look", ".status.response"); response == "" {
			return fmt.Errorf("no answer yet")
		}
		return nil
	})
	secret, err := base64.StdEncoding.DecodeString(response)
	if err != nil {
		t.Fatal(err)
	}
	target, err := rsa.DecryptOAEP(sha512.New(), nil, key, secret, nil)
	if err != nil {
		t.Fatal(err)
	}
	dialer := gwebsocket.Dialer{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, Subprotocols: []string{"binary"}}
	conn, _, err := dialer.DialContext(t.Context(), string(target), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, resp, err := dialer.DialContext(t.Context(), string(target), nil); err == nil || resp == nil || resp.StatusCode != http.StatusForbidden {
		t.Errorf("a ticket was good twice: %v", err)
	}
	return conn
}

// heard collects what is written and wakes who waits for it.
type heard struct {
	more chan struct{}

	mu   sync.Mutex // guards text
	text bytes.Buffer
}

// Write implements io.Writer.
func (h *heard) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case h.more <- struct{}{}:
	default:
	}
	return h.text.Write(p)
}

// String is what was written until now.
func (h *heard) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.text.String()
}

func (h *heard) wait(t *testing.T, text string) {
	t.Helper()
	timeout := time.After(patience)
	for !strings.Contains(h.String(), text) {
		select {
		case <-h.more:
		case <-timeout:
			t.Fatalf("%q was not said:\n%s", text, h.String())
		}
	}
}

// TestPublishMachine: a machine becomes an image that others are made of.
func TestPublishMachine(t *testing.T) {
	t.Parallel()
	n := machines(t)
	n.createBox()
	n.exec("box", "sh", "-c", "echo mine >/data/file; sync")
	if out := n.vm("publish", "box", "--item", "golden"); !strings.Contains(out, "is published as golden") {
		t.Fatal(out)
	}
	n.vm("create", "copy", "--image", "golden", "--class", "tiny", "--no-bootstrap")
	n.agent("copy")
	if got := n.exec("copy", "cat", "/data/file"); got != "mine\n" {
		t.Errorf("the copy has %q", got)
	}
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachinePublishRequest
metadata: {name: again}
spec: {source: {name: box}, target: {item: {name: golden}}}
`)
	eventually(t, "the name to be refused", func() error {
		if got := n.field("vmpub/again", `.status.conditions[?(@.type=="TargetValid")].reason`); got != "TargetItemAlreadyExists" {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}
