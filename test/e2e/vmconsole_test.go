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
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	gwebsocket "github.com/gorilla/websocket"
)

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

	n.screen("box")
	n.sshClient("box")
	n.seen("look", "box").refused(t)
	user := "system:serviceaccount:" + n.name + ":default"
	n.kubectl("create", "rolebinding", "look", "--clusterrole=view", "--serviceaccount="+n.name+":default")
	if out, err := exec.CommandContext(t.Context(), suite.atoll, "vm", "--kubeconfig", suite.dataDir+"/admin.kubeconfig", "-n", n.name, "--as", user, "console", "box").CombinedOutput(); err == nil ||
		!strings.Contains(string(out), "forbidden") {
		t.Errorf("who may only look used the console: %s", out)
	}
}

// screen uses the screen the way a person does: through a port of this host.
func (n *namespace) screen(name string) {
	t := n.t
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, suite.atoll, "vm", "--kubeconfig", suite.dataDir+"/admin.kubeconfig", "-n", n.name, "vnc", name, "--proxy-only")
	said := &heard{more: make(chan struct{}, 1)}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }() // killed by cancel
	defer cancel()
	said.wait(t, " (VNC)")
	_, rest, _ := strings.Cut(said.String(), "is at ")
	address, _, _ := strings.Cut(rest, " ")
	eventually(t, "the screen at "+address, func() error {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, said)
		}
		defer conn.Close()
		greeting := make([]byte, 7)
		if _, err := io.ReadFull(conn, greeting); err != nil || string(greeting) != "RFB 003" {
			return errors.Join(err, fmt.Errorf("it says %q\n%s", greeting, said))
		}
		return nil
	})
}

// sshClient has `atoll vm ssh` call an ssh client that says how it was called, and what the guest says at the port that it got.
func (n *namespace) sshClient(name string) {
	t := n.t
	t.Helper()
	n.exec(name, "sh", "-c", "setsid nc -ll -p 22 -e echo SSH-2.0-tiny </dev/null >/dev/null 2>&1 &")
	eventually(t, "the guest to listen at port 22", func() error { // 16 in hexadecimal, and 0A is listening
		_, err := n.tryExec(name, "sh", "-c", "cat /proc/net/tcp* | grep ':0016 .* 0A '")
		return err
	})
	bin, home := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "ssh"), []byte("#!/bin/bash\necho \"$@\"\nhead -n 1 </dev/tcp/127.0.0.1/$2\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	var out []byte
	eventually(t, "the guest to answer an ssh client", func() error {
		cmd := exec.CommandContext(t.Context(), suite.atoll, "vm", "--kubeconfig", suite.dataDir+"/admin.kubeconfig", "-n", n.name, "ssh", name, "--user", "ann", "--", "uname", "-n")
		cmd.Env = append(os.Environ(), "HOME="+home, "PATH="+bin+":"+os.Getenv("PATH"))
		var err error
		if out, err = cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("\nSSH-2.0-tiny\n")) {
			return errors.Join(err, fmt.Errorf("atoll vm ssh: %s", out))
		}
		return nil
	})
	for _, want := range []string{
		"-p ", " -l ann ", " HostKeyAlias=atoll-vm-" + n.field("vm/"+name, ".metadata.uid") + " ", " UserKnownHostsFile=" + filepath.Join(home, ".atoll", "known_hosts") + " ",
		" 127.0.0.1 uname -n\n",
	} {
		contains(t, string(out), want)
	}
}

// ticket is an address of a machine's screen.
type ticket struct {
	target  string
	expires time.Time
}

// ticket asks for one with a request of a name.
func (n *namespace) ticket(request, machine string) ticket {
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
	asked := time.Now()
	n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachineWebConsoleRequest
metadata: {name: %s}
spec:
  name: %s
  publicKey: |
    %s
`, request, machine, public))
	object := "virtualmachinewebconsolerequest/" + request
	var response string
	eventually(t, "the ticket", func() error {
		var err error
		if response, err = n.tryField(object, ".status.response"); err == nil && response == "" {
			err = fmt.Errorf("no answer yet")
		}
		return err
	})
	answered := time.Now()
	expires, err := time.Parse(time.RFC3339, n.field(object, ".status.expiryTime"))
	if err != nil || expires.Before(asked.Add(119*time.Second)) || expires.After(answered.Add(120*time.Second)) { // of whole seconds
		t.Errorf("a ticket that was asked for at %s expires at %s, %v", asked, expires, err)
	}
	secret, err := base64.StdEncoding.DecodeString(response)
	if err != nil {
		t.Fatal(err)
	}
	target, err := rsa.DecryptOAEP(sha512.New(), nil, key, secret, nil)
	if err != nil {
		t.Fatal(err)
	}
	return ticket{target: string(target), expires: expires}
}

func (k ticket) dial(t *testing.T) (*gwebsocket.Conn, *http.Response, error) {
	dialer := gwebsocket.Dialer{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, Subprotocols: []string{"binary"}}
	return dialer.DialContext(t.Context(), k.target, nil)
}

// seen looks at the screen and returns the ticket that was good for it. Who gets no answer has used theirs up as well.
func (n *namespace) seen(request, machine string) (used ticket) {
	n.t.Helper()
	asked := 0
	eventually(n.t, "the screen of "+machine, func() error {
		asked++
		used = n.ticket(fmt.Sprintf("%s-%d", request, asked), machine)
		return used.good(n.t)
	})
	return used
}

// good is nil if the screen is seen.
func (k ticket) good(t *testing.T) error {
	conn, _, err := k.dial(t)
	if err != nil {
		return err
	}
	t.Cleanup(func() { _ = conn.Close() })
	_, greeting, err := conn.ReadMessage()
	if err != nil || !strings.HasPrefix(string(greeting), "RFB 003") {
		return errors.Join(err, fmt.Errorf("the screen says %q", greeting))
	}
	return nil
}

// refused wants not to.
func (k ticket) refused(t *testing.T) {
	t.Helper()
	if _, resp, err := k.dial(t); err == nil || resp == nil || resp.StatusCode != http.StatusForbidden {
		t.Errorf("a ticket that expires at %s was good, or good twice: %v", k.expires, err)
	}
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
