//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"atoll.dev/atoll/internal/linux/netns"
)

// beyond is a network outside of the cluster with two hosts in it, that answer at TCP port 80 and UDP port 69.
type beyond struct {
	t            *testing.T
	netns        string
	one, another string
}

// newBeyond makes the network 198.18.number.0/24; tests beside each other have other numbers.
func newBeyond(t *testing.T, number string) *beyond {
	t.Helper()
	network := "198.18." + number + "."
	name, link, host := "e2e-beyond-"+number, "e2ebeyond"+number, network+"1"
	b := &beyond{t: t, netns: name, one: network + "2", another: network + "3"}
	remove := func() {
		_ = exec.Command("ip", "netns", "del", name).Run()
		_ = exec.Command("ip", "link", "del", link).Run()
	}
	remove() // of a run that was killed
	t.Cleanup(remove)
	for _, args := range [][]string{
		{"netns", "add", name},
		{"link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name},
		{"addr", "add", host + "/24", "dev", link},
		{"link", "set", link, "up"},
		{"-n", name, "addr", "add", b.one + "/24", "dev", "eth0"},
		{"-n", name, "addr", "add", b.another + "/24", "dev", "eth0"},
		{"-n", name, "link", "set", "eth0", "up"},
		{"-n", name, "route", "add", "default", "via", host},
	} {
		output(t, append([]string{"ip"}, args...)...)
	}
	for _, address := range []string{b.one, b.another} {
		listener := listenIn(t, "/run/netns/"+name, address+":80")
		server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello from", address) })}
		go func() { _ = server.Serve(listener) }()
		t.Cleanup(func() { _ = server.Close() })
		b.tftp(address)
	}
	return b
}

// tftp answers each request for a file with the same one, by UDP.
func (b *beyond) tftp(address string) {
	b.t.Helper()
	var conn net.PacketConn
	err := netns.Do("/run/netns/"+b.netns, func() (err error) {
		conn, err = (&net.ListenConfig{}).ListenPacket(b.t.Context(), "udp4", address+":69")
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = conn.Close() })
	go func() {
		packet := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(packet)
			if err != nil {
				return
			}
			if n > 1 && packet[1] == 1 { // a request; acknowledgements end it
				_, _ = conn.WriteTo(append([]byte{0, 3, 0, 1}, "hello from "+address...), from)
			}
		}
	}()
}

// ask gets a page from one of its addresses.
func (b *beyond) ask(from, url string, limit time.Duration) error {
	out, err := exec.CommandContext(b.t.Context(), "ip", "netns", "exec", b.netns, "curl", "-sS", "-f", "-m", seconds(limit), "--interface", from, url).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// datagram sends one from a pod or machine to an address that answers TFTP, and waits for the answer.
func (n *namespace) datagram(from, to string, limit time.Duration) error {
	out, err := n.try("exec", from, "--", "sh", "-c", "timeout "+seconds(limit)+" tftp -g -r file -l /tmp/got "+to+" 69 && cat /tmp/got && rm /tmp/got")
	if err == nil && !strings.Contains(out, "hello from ") {
		err = fmt.Errorf("the answer is %q", out)
	}
	return err
}

// shut waits until something does not work, several times in a row: one attempt may fail for other reasons.
func shut(t *testing.T, what string, attempt func(limit time.Duration) error) {
	t.Helper()
	eventually(t, what+" to be impossible", func() error {
		for range 3 {
			if attempt(shortAttempt) == nil {
				return errors.New("it is possible")
			}
		}
		return nil
	})
}

// open waits until something works.
func open(t *testing.T, what string, attempt func(limit time.Duration) error) {
	t.Helper()
	eventually(t, what, func() error { return attempt(longAttempt) })
}

// each does something for all names at once, and returns the errors that there were.
func each(names []string, limit time.Duration, attempt func(name string, limit time.Duration) error) []error {
	errs := make([]error, len(names))
	var wait sync.WaitGroup
	for i, name := range names {
		wait.Go(func() { errs[i] = attempt(name, limit) })
	}
	wait.Wait()
	return errs
}

// allOpen waits until something has worked for each of them.
func allOpen(t *testing.T, what string, names []string, attempt func(name string, limit time.Duration) error) {
	t.Helper()
	open(t, what, func(limit time.Duration) error {
		errs := each(names, limit, attempt)
		var left []string
		for i, err := range errs {
			if err != nil {
				left = append(left, names[i])
			}
		}
		names = left
		return errors.Join(errs...)
	})
}

// allShut waits until something works for none of them.
func allShut(t *testing.T, what string, names []string, attempt func(name string, limit time.Duration) error) {
	t.Helper()
	shut(t, what, func(limit time.Duration) error {
		for _, err := range each(names, limit, attempt) {
			if err == nil {
				return nil
			}
		}
		return errors.New("for none")
	})
}

// TestPolicyBlocks: networks outside with exceptions, in both directions, protocols, and connections that a policy cuts
// while they are used; for a pod in a micro-VM, one under runc and a virtual machine.
func TestPolicyBlocks(t *testing.T) {
	t.Parallel()
	b := newBeyond(t, "77")
	n := machines(t)
	run(t, "", "label", "namespace", n.name, "atoll.dev/host-access=allowed")
	n.apply(strings.Replace(machine("box", "tiny"), "name: box", "name: box, labels: {app: box}", 1))
	n.apply(fmt.Sprintf(podOf, "server", "atoll") + fmt.Sprintf(podOf, "friend", "atoll") + fmt.Sprintf(podOf, "stranger", "atoll") + fmt.Sprintf(podOf, "plain", "runc"))
	for _, pod := range []string{"server", "friend", "stranger", "plain"} {
		n.ready(pod)
	}
	n.agent("box")
	const selector = "podSelector: {matchExpressions: [{key: app, operator: In, values: [friend, plain, box]}]}"
	ends := []string{"friend", "plain", "box"}
	pages := map[string]string{}
	for _, name := range append(ends, "server") {
		pages[name] = "http://" + n.field("pod/"+name, ".status.podIP") + "/"
	}
	type attempt = func(name string, limit time.Duration) error
	in := func(from string) attempt {
		return func(to string, limit time.Duration) error { return b.ask(from, pages[to], limit) }
	}
	fromServer := func(to string, limit time.Duration) error { return n.reach("server", pages[to], limit) }
	page := func(to string) attempt {
		return func(from string, limit time.Duration) error { return n.reach(from, "http://"+to+"/", limit) }
	}
	datagram := func(to string) attempt {
		return func(from string, limit time.Duration) error { return n.datagram(from, to, limit) }
	}
	for _, address := range []string{b.one, b.another} {
		allOpen(t, "from outside "+address, ends, in(address))
		allOpen(t, "a page outside "+address, ends, page(address))
		allOpen(t, "a datagram outside "+address, ends, datagram(address))
	}
	allOpen(t, "from the server", ends, fromServer)

	n.apply(policyOf("in", "", `{`+selector+`, ingress: [{from: [{ipBlock: {cidr: 198.18.77.0/24, except: [198.18.77.3/32]}}]}]}`))
	allShut(t, "from the server, which is in no block", ends, fromServer)
	allShut(t, "from the exception", ends, in(b.another))
	allOpen(t, "from the block", ends, in(b.one))

	out := func(ports string) {
		t.Helper()
		n.apply(policyOf("out", "", `{`+selector+`, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 198.18.77.0/24, except: [198.18.77.3/32]}}], ports: [`+ports+`]}]}`))
	}
	out("{port: 80}, {port: 69, protocol: UDP}")
	allShut(t, "a page at the exception", ends, page(b.another))
	allShut(t, "a datagram to the exception", ends, datagram(b.another))
	allOpen(t, "a page in the block", ends, page(b.one))
	allOpen(t, "a datagram to the block", ends, datagram(b.one))
	out("{port: 69, protocol: UDP}")
	allShut(t, "a page where only UDP is allowed", ends, page(b.one))
	allOpen(t, "a datagram where UDP is allowed", ends, datagram(b.one))
	out("{port: 80}, {port: 69}")
	allShut(t, "a datagram where only TCP is allowed", ends, datagram(b.one))
	allOpen(t, "a page where TCP is allowed", ends, page(b.one))
	n.kubectl("delete", "networkpolicy", "--all")
	allOpen(t, "from the server without policies", ends, fromServer)

	n.streams()
}

// streams opens a connection from each of a few ends and cuts all but one of them by a policy: these stand still, the other
// goes on.
func (n *namespace) streams() {
	n.t.Helper()
	address := n.field("pod/server", ".status.podIP")
	cut := []string{"plain", "box", "stranger"}
	for i, end := range append(cut, "friend") {
		port := strconv.Itoa(90 + i)
		n.exec("server", "sh", "-c", "sleep 100000 | nc -l -p "+port+" >/tmp/"+end+" 2>/dev/null &")
		n.exec(end, "sh", "-c", "until (while echo x; do usleep 100000; done) 2>/dev/null | nc "+address+" "+port+"; do sleep 1; done >/dev/null 2>&1 &")
	}
	got := func(end string) int {
		n.t.Helper()
		lines, err := strconv.Atoi(strings.TrimSpace(n.exec("server", "sh", "-c", "wc -l </tmp/"+end)))
		if err != nil {
			n.t.Fatal(err)
		}
		return lines
	}
	grows := func(end string) {
		n.t.Helper()
		first := got(end)
		eventually(n.t, "the stream of "+end+" to go on", func() error {
			if now := got(end); now < first+5 {
				return fmt.Errorf("it has %d lines, and had %d", now, first)
			}
			return nil
		})
	}
	for _, end := range append(cut, "friend") {
		grows(end)
	}
	n.apply(policyOf("cut", "", `{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]}`))
	stopped := map[string]int{}
	for _, end := range cut {
		eventually(n.t, "the stream of "+end+" to stop", func() error {
			before := got(end)
			grows("friend") // which takes a while
			stopped[end] = got(end)
			if stopped[end] != before {
				return fmt.Errorf("it has %d lines, and had %d", stopped[end], before)
			}
			return nil
		})
	}
	for range 3 {
		grows("friend")
	}
	for _, end := range cut {
		equal(n.t, "lines of "+end, strconv.Itoa(got(end)), strconv.Itoa(stopped[end]))
	}
}

// TestTenantIngressCIDRs: from outside of the cluster comes what the administrator has listed, and nothing else.
func TestTenantIngressCIDRs(t *testing.T) {
	t.Parallel()
	b := newBeyond(t, "78")
	n := newTenant(t, "", `"network": {"isolation": "DenyAll", "ingressCIDRs": ["198.18.78.2/32"]}`)
	n.pair()
	web := "http://" + n.field("pod/web", ".status.podIP") + "/"
	check := func(may, mayNot string) {
		t.Helper()
		from := func(address string) func(time.Duration) error {
			return func(limit time.Duration) error { return b.ask(address, web, limit) }
		}
		open(t, "from "+may, from(may))
		shut(t, "from "+mayNot, from(mayNot))
		open(t, "from "+may+" still", from(may))
	}
	check(b.one, b.another)
	n.declare(`"network": {"isolation": "Isolated", "ingressCIDRs": ["198.18.78.3/32"]}`)
	check(b.another, b.one)
	n.owner.apply(n.name, policyOf("everything", "", "{podSelector: {}, ingress: [{}]}"))
	check(b.another, b.one)
	n.declare(`"network": {"isolation": "Isolated"}`)
	for _, address := range []string{b.one, b.another} {
		open(t, "from "+address+" without a list", func(limit time.Duration) error { return b.ask(address, web, limit) })
	}
}
