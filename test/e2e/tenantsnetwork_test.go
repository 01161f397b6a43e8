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

// cut checks that no way does. The refusal is of the network: one of the two namespaces counts what it has denied, and
// names are found all the same.
func (n *tenant) cut(to *tenant) {
	n.t.Helper()
	ways := to.ways()
	eventually(n.t, "the name "+ways["service name"]+" to be found", func() error {
		_, err := n.try("exec", "client", "-c", "box", "--", "nslookup", ways["service name"])
		return err
	})
	n.noAnswer(fmt.Sprintf("%s to be cut off from %s", n.name, to.name), "client", []string{n.name, to.name}, pages(ways)...)
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
		if !want {
			n.noAnswer(n.name+" to be cut off from the outside", "client", []string{n.name}, "http://"+outside+"/")
			return
		}
		eventually(t, n.name+" to reach the outside", func() error {
			_, err := n.fetch(outside)
			return err
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
	// The host's credentials in a cloud are for nobody, where everything is open.
	eventually(t, "the host to reach its metadata server", func() error { return get(t, "http://"+metadata+"/", "outside") })
	eventually(t, "a pod's requests for the metadata server to be denied", func() error {
		dropped := linkLocal(t)
		list, err := open.ask("client", "http://"+metadata+"/")
		if err != nil {
			return err
		}
		if list[0].code == 0 || list[1].code == 0 {
			t.Fatalf("the host's metadata server answers a pod: %v", list)
		}
		if grown := linkLocal(t) - dropped; grown < 2 {
			return fmt.Errorf("of 2 requests, the host has denied %d packets", grown)
		}
		return nil
	})

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

// TestTenantIsolationOfMachines: a virtual machine and a pod under runc are as isolated as a micro-VM, in all modes, and who
// is root in a machine sends from no other address than its own.
func TestTenantIsolationOfMachines(t *testing.T) {
	t.Parallel()
	mode := func(isolation string) string {
		return `"network": {"isolation": "` + isolation + `"}, "podRuntime": {"policy": "Runc"}`
	}
	n := tenantMachines(t, mode("Isolated"))
	other := newTenant(t, "-other", "")
	n.editor.apply(n.name, machine("box", "tiny")+"---"+fmt.Sprintf(podOf, "plain", "runc"))
	n.pair()
	other.pair()
	n.power("box", "PoweredOn")
	address := n.address("box")
	n.agent("box")
	n.ready("plain")
	own, others := pages(n.ways()), pages(other.ways())
	both := []string{n.name, other.name}
	ends := map[string]string{"box": "http://" + strings.Split(address, "/")[0] + "/", "plain": "http://" + n.field("pod/plain", ".status.podIP") + "/"}
	open := func(what string, from *tenant, end string, urls ...string) {
		t.Helper()
		for _, url := range urls {
			eventually(t, what, func() error { return from.answered(end, url) })
		}
	}
	for end, page := range ends {
		open(end+" to answer its own namespace", n, "client", page)
		open(end+" to reach its own namespace", n, end, own...)
		other.noAnswer("another namespace to be cut off from "+end, "client", both, page)
		n.noAnswer(end+" to be cut off from another namespace", end, both, others...)
	}
	n.forge("box", n.field("pod/web", ".status.podIP"), other)
	open("the machine to be as before", n, "box", own...)

	n.declare(mode("DenyAll"))
	for end, page := range ends {
		n.noAnswer(end+" to answer nobody", "client", both, page)
		n.noAnswer(end+" to reach nobody", end, both, own...)
	}
	n.declare(mode("Open"))
	for end, page := range ends {
		open("another namespace to reach "+end, other, "client", page)
		open(end+" to reach another namespace", n, end, others...)
	}
}

// forge has a pod or machine, which may ping an address, send to another namespace what is not its own: nothing gets there,
// and the host has seen it and dropped it for what it is.
func (n *tenant) forge(from, may string, victim *tenant) {
	t := n.t
	t.Helper()
	web, friend := victim.field("pod/web", ".status.podIP"), victim.field("pod/client", ".status.podIP")
	pings := func() string {
		return strings.Fields(victim.exec("web", "sh", "-c", "grep '^Icmp: [0-9]' /proc/net/snmp"))[9] // InEchos
	}
	before := pings()
	ping := func(n *namespace, from, to string) {
		t.Helper()
		eventually(t, from+" to ping "+to, func() error {
			_, err := n.tryExec(from, "ping", "-c", "1", "-w", "60", "-W", "60", to)
			return err
		})
	}
	ping(victim.namespace, "client", web)
	if pings() == before {
		t.Fatal("the counter of pings does not count")
	}
	ping(n.namespace, from, may)
	before = pings()
	as := func(address, to string) string {
		return "a=" + address + "; ip addr add $a/32 dev eth0 || exit 9; ping -c 2 -W 3 -I $a " + to + "; e=$?; ip addr del $a/32 dev eth0; exit $e"
	}
	for what, script := range map[string]string{
		"a friend's address":        as(friend, web),
		"the victim's own address":  as(web, friend),
		"the gateway's address":     as("$(ip route | awk '/^default/ {print $3}')", web),
		"an address of nobody":      as("203.0.113.7", web),
		"a MAC address of a friend": "a=$(cat /sys/class/net/eth0/address); ip link set eth0 address 02:00:00:00:00:99 || exit 9; ping -c 2 -W 3 " + web + "; e=$?; ip link set eth0 address $a; exit $e",
	} {
		was := spoofed(t)
		out, err := n.delivered(from, "sh", "-c", script)
		if err == nil || !strings.Contains(out, "2 packets transmitted, 0 packets received") {
			t.Errorf("from %s: %v\n%s", what, err, out)
		}
		if spoofed(t) < was+2 {
			t.Errorf("from %s: the host has not seen the packets\n%s", what, out)
		}
	}
	// Nobody answers for an address but the host: what is sent past it goes nowhere.
	if out, err := n.delivered(from, "sh", "-c", "ip route add "+web+"/32 dev eth0 || exit 9; ping -c 2 -W 3 "+web+"; e=$?; ip route del "+web+"/32 dev eth0; exit $e"); err == nil ||
		!strings.Contains(out, ", 0 packets received") {
		t.Errorf("by a route past the host: %v\n%s", err, out)
	}
	equal(t, "pings that the victim has seen", pings(), before)
}

// metadata is where clouds give out the credentials of a host.
const metadata = "169.254.169.254"

// outsideServer is a web server outside of the cluster, at an address that the host has a route to and is not its own.
func outsideServer(t *testing.T) string {
	t.Helper()
	const name, host, peer = "e2e-outside", "198.51.100.1", "198.51.100.2" // and metadata is routed there
	_ = exec.Command("ip", "netns", "del", name).Run()                     // of a run that was killed
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
		{"-n", name, "addr", "add", metadata + "/32", "dev", "eth0"},
		{"-n", name, "link", "set", "eth0", "up"},
		{"-n", name, "route", "add", "default", "via", host},
		{"route", "add", metadata, "via", peer},
	} {
		output(t, append([]string{"ip"}, args...)...)
	}
	listener := listenIn(t, "/run/netns/"+name, "0.0.0.0:80")
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
