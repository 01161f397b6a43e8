package policy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// conntrack is a table of connections.
type conntrack struct {
	list []*netlink.ConntrackFlow
	// during is called while the table is listed.
	during func()
	failed error
}

func (c *conntrack) in(e *Engine) {
	e.connections = func() ([]*netlink.ConntrackFlow, error) {
		if c.during != nil {
			c.during()
		}
		return c.list, nil
	}
	e.remove = func(f netlink.CustomConntrackFilter) (n uint, err error) {
		var left []*netlink.ConntrackFlow
		for _, k := range c.list {
			if f.MatchConntrackFlow(k) {
				n++
			} else {
				left = append(left, k)
			}
		}
		if c.failed == nil {
			c.list = left
		}
		return n, c.failed
	}
}

func (c *conntrack) add(protocol uint8, from, to string) {
	a, b := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	ip := func(a netip.AddrPort) net.IP { return a.Addr().AsSlice() }
	c.list = append(c.list, &netlink.ConntrackFlow{
		Forward: netlink.IPTuple{SrcIP: ip(a), DstIP: ip(b), SrcPort: a.Port(), DstPort: b.Port(), Protocol: protocol},
		Reverse: netlink.IPTuple{SrcIP: ip(b), DstIP: ip(a), SrcPort: b.Port(), DstPort: a.Port(), Protocol: protocol},
	})
}

func cut(t testing.TB, e *Engine) int {
	t.Helper()
	n, err := e.Cut(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// cutElements are those of the table of connections that were cut.
func cutElements(e *Engine) string {
	var out []string
	for line := range strings.Lines(e.cuts.(*knftables.Fake).Dump()) {
		if rest, ok := strings.CutPrefix(line, "add element inet atoll-cut "); ok {
			out = append(out, strings.TrimSpace(rest))
		}
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// closed is a state in which a pod may not be reached.
func closed() *policyv1.State {
	return list{{ID: "shop/closed", Tier: policyv1.TierOwner, Ingress: &policyv1.Direction{}}}.in(state(
		pod("shop/db", "10.244.0.2", "shop/closed"), pod("shop/client", "10.244.0.3")))
}

func open() *policyv1.State {
	return state(pod("shop/db", "10.244.0.2"), pod("shop/client", "10.244.0.3"))
}

func TestCutIsHeldUntilAllowed(t *testing.T) {
	e, _ := fakeEngine(t)
	c := &conntrack{}
	c.in(e)
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP} {
		c.add(protocol, "10.244.0.3:1000", "10.244.0.2:80")
		c.add(protocol, "10.244.0.2:1000", "10.244.0.3:80")
	}
	c.add(unix.IPPROTO_GRE, "10.244.0.3:0", "10.244.0.2:0")
	c.add(unix.IPPROTO_SCTP, "10.244.0.3:0", "10.244.0.2:0") // whose ports are not known
	c.add(unix.IPPROTO_ICMP, "10.244.0.3:0", "10.244.0.2:0")
	c.add(unix.IPPROTO_UDP, "10.244.0.3:1000", "10.244.0.9:53") // of a pod that is gone
	apply(t, e, closed())
	if n := cut(t, e); n != 7 || len(c.list) != 3 {
		t.Errorf("%d connections cut", n)
	}
	pairs := "pairs { 10.244.0.3 . 10.244.0.2 }"
	want := `flows { sctp . 10.244.0.3 . 1000 . 10.244.0.2 . 80 }
flows { udp . 10.244.0.3 . 1000 . 10.244.0.2 . 80 }
` + pairs + `
protocols { 132 . 10.244.0.3 . 10.244.0.2 }
protocols { 47 . 10.244.0.3 . 10.244.0.2 }`
	if got := cutElements(e); got != want {
		t.Errorf("held:\n%s", got)
	}
	more := closed()
	more.Pods[addr("10.244.0.4")] = pod("shop/other", "10.244.0.4")
	if !apply(t, e, more) || cut(t, e) != 0 || cutElements(e) != want {
		t.Errorf("held after another change:\n%s", cutElements(e))
	}

	// Another process makes the table of policies anew.
	again, _ := fakeEngine(t)
	again.cuts, again.held = e.cuts, map[string]bool{}
	for _, s := range answerSets() {
		again.held[s.name] = true
	}
	c.in(again)
	apply(t, again, more)
	if cut(t, again); cutElements(again) != want {
		t.Errorf("held after a restart:\n%s", cutElements(again))
	}
	if !apply(t, again, open()) {
		t.Error("nobody is told to look at what was cut and is allowed again")
	}
	if cut(t, again); cutElements(again) != pairs {
		t.Errorf("held though allowed:\n%s", cutElements(again))
	}
	if len(again.held) > 0 {
		t.Error("nothing is held, which the engine does not know")
	}
}

// TestApplyDoesNotWaitForCut applies states while the kernel's table is listed.
func TestApplyDoesNotWaitForCut(t *testing.T) {
	e, _ := fakeEngine(t)
	c := &conntrack{}
	c.in(e)
	c.add(unix.IPPROTO_TCP, "10.244.0.3:1000", "10.244.0.2:80")
	apply(t, e, closed())
	c.during = func() { apply(t, e, open()) }
	if n := cut(t, e); n != 0 || len(c.list) != 1 || cutElements(e) != "" {
		t.Errorf("%d connections cut that are allowed by now: %s", n, cutElements(e))
	}
	c.during = func() {
		if !apply(t, e, closed()) {
			t.Error("less is allowed and nobody is told to cut")
		}
	}
	cut(t, e)
	c.during = nil
	if cut(t, e); len(c.list) != 0 || cutElements(e) == "" {
		t.Errorf("a connection that is not allowed goes on: %v", c.list)
	}

	// A pod whose address changes hands meanwhile is for the next time.
	c.add(unix.IPPROTO_TCP, "10.244.0.2:1000", "10.244.0.3:80")
	c.during = func() {
		next := open()
		next.Pods[addr("10.244.0.3")].Interface = "atlother"
		if !apply(t, e, next) {
			t.Error("an address has changed hands and nobody is told to cut")
		}
	}
	if n := cut(t, e); n != 0 {
		t.Errorf("%d connections cut", n)
	}
	c.during, c.failed = nil, errors.New("busy")
	if _, err := e.Cut(context.Background()); !errors.Is(err, c.failed) {
		t.Errorf("cutting: %v", err)
	}
	c.failed = nil
	if n := cut(t, e); n != 1 || len(c.list) != 0 {
		t.Errorf("%d connections of a pod that is gone forgotten", n)
	}
}
