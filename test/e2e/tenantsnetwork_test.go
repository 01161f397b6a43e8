//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/linux/netns"
)

// server and client in one: `web` answers with its namespace, `client` asks.
const webPair = `
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /w; echo %[1]s > /w/index.html; exec httpd -f -p 80 -h /w"]
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: box, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"]}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
`

// pair runs the two pods and waits for them.
func (n *tenant) pair() {
	n.t.Helper()
	n.editor.apply(n.name, fmt.Sprintf(webPair, n.name))
	n.ready("web")
	n.ready("client")
}

// ways are the addresses of the web server of a namespace.
func (n *tenant) ways() map[string]string {
	n.t.Helper()
	return map[string]string{
		"pod address":     n.field("pod/web", ".status.podIP"),
		"service address": n.field("service/web", ".spec.clusterIP"),
		"service name":    "web." + n.name + ".svc.cluster.local",
	}
}

// fetch asks from the client of a namespace.
func (n *tenant) fetch(address string) (string, error) {
	return n.try("exec", "client", "-c", "box", "--", "timeout", "4", "wget", "-qO-", "http://"+address+"/")
}

// reaches waits until all ways lead to another namespace's web server.
func (n *tenant) reaches(to *tenant) {
	n.t.Helper()
	for what, address := range to.ways() {
		eventually(n.t, fmt.Sprintf("%s to reach %s by %s", n.name, to.name, what), func() error {
			out, err := n.fetch(address)
			if err == nil && strings.TrimSpace(out) != to.name {
				err = fmt.Errorf("got %q", out)
			}
			return err
		})
	}
}

// cut checks that no way does. The refusal is of the network: the request ends in a timeout or is turned away, and
// names are found all the same.
func (n *tenant) cut(to *tenant) {
	n.t.Helper()
	for what, address := range to.ways() {
		if what == "service name" {
			eventually(n.t, "the name "+address+" to be found", func() error {
				_, err := n.try("exec", "client", "-c", "box", "--", "nslookup", address)
				return err
			})
		}
		eventually(n.t, fmt.Sprintf("%s to be cut off from %s by %s", n.name, to.name, what), func() error {
			out, err := n.fetch(address)
			if err == nil {
				return fmt.Errorf("it answered %q", out)
			}
			if strings.Contains(err.Error(), "bad address") {
				return fmt.Errorf("another error: %w", err)
			}
			return nil
		})
	}
}

// TestTenantIsolation sends real traffic between micro-VM pods of namespaces in all modes.
func TestTenantIsolation(t *testing.T) {
	t.Parallel()
	open := newTenant(t, "-open", "")
	isolated := newTenant(t, "-isolated", `"network": {"isolation": "Isolated"}`)
	closed := newTenant(t, "-closed", `"network": {"isolation": "DenyAll"}`)
	for _, n := range []*tenant{open, isolated, closed} {
		n.pair()
	}
	outside := outsideServer(t)
	out := func(n *tenant, want bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("%s to the outside: %t", n.name, want), func() error {
			if _, err := n.fetch(outside); (err == nil) != want {
				return fmt.Errorf("error: %w", err)
			}
			return nil
		})
	}
	open.reaches(open)
	isolated.reaches(isolated)
	open.cut(isolated)
	isolated.cut(open)
	open.cut(closed)
	closed.cut(open)
	closed.cut(closed)
	out(open, true)
	out(isolated, true)
	out(closed, false)

	// The owner cannot widen that, but narrow.
	allowAll := `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: everything}
spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}
`
	isolated.owner.apply(isolated.name, allowAll)
	closed.owner.apply(closed.name, allowAll)
	open.cut(isolated)
	closed.cut(open)
	isolated.owner.kubectl("-n", isolated.name, "delete", "networkpolicy", "everything")
	isolated.owner.apply(isolated.name, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nothing}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}
`)
	isolated.cut(isolated)
	isolated.owner.kubectl("-n", isolated.name, "delete", "networkpolicy", "nothing")
	isolated.reaches(isolated)

	// The administrator can, to a namespace and to addresses outside, while everything runs.
	closed.declare(fmt.Sprintf(`"network": {"isolation": "DenyAll", "toNamespaces": [%q], "egressCIDRs": ["198.51.100.0/24"]}`, isolated.name))
	closed.cut(isolated) // the other side does not want it
	isolated.declare(fmt.Sprintf(`"network": {"isolation": "Isolated", "fromNamespaces": [%q], "egressCIDRs": ["203.0.113.0/24"]}`, closed.name))
	closed.reaches(isolated)
	isolated.cut(closed)
	open.cut(isolated)
	out(closed, true)
	out(isolated, false)
	isolated.declare(`"network": {"isolation": "Open"}`)
	open.reaches(isolated)
}

// TestTenantIsolationOfMachines: a virtual machine is as isolated as a pod.
func TestTenantIsolationOfMachines(t *testing.T) {
	t.Parallel()
	n := tenantMachines(t, `"network": {"isolation": "Isolated"}`)
	other := newTenant(t, "-other", "")
	n.pair()
	other.pair()
	n.editor.apply(n.name, machine("box", "tiny"))
	n.power("box", "PoweredOn")
	var address string
	eventually(t, "the machine's address", func() error {
		if address = n.field("vm/box", ".status.network.primaryIP4"); address == "" {
			return fmt.Errorf("there is none")
		}
		return nil
	})
	address = strings.Split(address, "/")[0]
	eventually(t, "the machine to answer its own namespace", func() error {
		_, err := n.fetch(address)
		return err
	})
	if got, err := other.fetch(address); err == nil {
		t.Errorf("another namespace reached the machine: %q", got)
	}
	eventually(t, "the guest agent", func() error {
		_, err := n.try("exec", "box", "--", "/atoll/heartbeat")
		return err
	})
	web := other.field("pod/web", ".status.podIP")
	if got, err := n.try("exec", "box", "--", "timeout", "4", "wget", "-qO-", "http://"+web+"/"); err == nil {
		t.Errorf("the machine reached another namespace: %q", got)
	}
}

// outsideServer is a web server outside of the cluster, at an address that the host has a route to and is not its own.
func outsideServer(t *testing.T) string {
	t.Helper()
	const name, host, peer = "e2e-outside", "198.51.100.1", "198.51.100.2"
	_ = exec.Command("ip", "netns", "del", name).Run() // of a run that was killed
	_ = exec.Command("ip", "link", "del", "e2eout").Run()
	t.Cleanup(func() {
		_ = exec.Command("ip", "netns", "del", name).Run()
		_ = exec.Command("ip", "link", "del", "e2eout").Run()
	})
	for _, args := range [][]string{
		{"netns", "add", name},
		{"link", "add", "e2eout", "type", "veth", "peer", "name", "eth0", "netns", name},
		{"addr", "add", host + "/24", "dev", "e2eout"},
		{"link", "set", "e2eout", "up"},
		{"-n", name, "addr", "add", peer + "/24", "dev", "eth0"},
		{"-n", name, "link", "set", "eth0", "up"},
		{"-n", name, "route", "add", "default", "via", host},
	} {
		output(t, append([]string{"ip"}, args...)...)
	}
	listener := listenIn(t, "/run/netns/"+name, peer+":80")
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "outside") })}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	return peer
}

// listenIn makes a listener in another network namespace; it stays there whoever uses it.
func listenIn(t *testing.T, path, address string) (listener net.Listener) {
	t.Helper()
	err := netns.Do(path, func() (err error) {
		listener, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp4", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return listener
}
