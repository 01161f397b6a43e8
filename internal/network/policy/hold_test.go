package policy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

const (
	db     = "10.244.0.2"
	client = "10.244.0.3"
)

// sets counts the elements of the table of connections that were cut, by set.
func sets(e *Engine) string {
	count := map[string]int{}
	for line := range strings.Lines(cutElements(e)) {
		count[strings.Fields(line)[0]]++
	}
	var out []string
	for _, name := range sorted(count) {
		out = append(out, fmt.Sprintf("%s %d", name, count[name]))
	}
	return strings.Join(out, " ")
}

// outside is an address of no pod of the host.
func outside(i int) string { return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}).String() }

// at is an address with a port.
func at(address string, port int) string { return fmt.Sprintf("%s:%d", address, port%65535+1) }

// mute is a state in which the client sends to nobody.
func mute() *policyv1.State {
	return list{{ID: "shop/mute", Tier: policyv1.TierOwner, Egress: &policyv1.Direction{}}}.in(state(
		pod("shop/db", db), pod("shop/client", client, "shop/mute")))
}

// TestManyConnectionsAreHeldByFew has pods with more connections than the sets have room for.
func TestManyConnectionsAreHeldByFew(t *testing.T) {
	const many = 20000
	for _, tc := range []struct {
		name     string
		state    *policyv1.State
		protocol uint8
		add      func(i int) (from, to string)
		want     string
	}{
		{"from many ports", closed(), unix.IPPROTO_UDP, func(i int) (string, string) { return at(client, i), at(db, 52) }, "ports 1"},
		{"to many ports", closed(), unix.IPPROTO_UDP, func(i int) (string, string) { return at(client, 999), at(db, i) }, "peers 1"},
		{"to many ports over SCTP", closed(), unix.IPPROTO_SCTP, func(i int) (string, string) { return at(client, i), at(db, i) }, "peers 1"},
		{"over TCP", closed(), unix.IPPROTO_TCP, func(i int) (string, string) { return at(client, i), at(db, i) }, "pairs 1"},
		{"to one port of many", mute(), unix.IPPROTO_UDP, func(i int) (string, string) { return at(client, i), at(outside(i), 52) }, "senders 1"},
		{"to many ports of some", mute(), unix.IPPROTO_UDP, func(i int) (string, string) { return at(client, 9), at(outside(i%200), i) }, "peers 200"},
		{"to many ports of many", mute(), unix.IPPROTO_UDP, func(i int) (string, string) { return at(client, 9), at(outside(i), i) }, "silent 1"},
		{"to many over TCP", mute(), unix.IPPROTO_TCP, func(i int) (string, string) { return at(client, i), at(outside(i), 52) }, "loose 1"},
		{"of many", closed(), unix.IPPROTO_UDP, func(i int) (string, string) { return at(outside(i), i), at(db, 52) }, "receivers 1"},
		{"of many to many ports", closed(), unix.IPPROTO_UDP, func(i int) (string, string) { return at(outside(i), 9), at(db, i) }, "deaf 1"},
		{"of many over TCP", closed(), unix.IPPROTO_TCP, func(i int) (string, string) { return at(outside(i), 9), at(db, i) }, "loose 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e, _ := fakeEngine(t)
			c := &conntrack{}
			c.in(e)
			for i := range many {
				from, to := tc.add(i)
				c.add(tc.protocol, from, to)
			}
			apply(t, e, tc.state)
			// Another tenant has one connection, which is held as narrowly as ever.
			s := *tc.state
			s.Pods = maps.Clone(s.Pods)
			s.Policies = maps.Clone(s.Policies)
			s.Pods[addr("10.244.0.5")] = pod("other/pod", "10.244.0.5", "other/mute")
			s.Policies["other/mute"] = &policyv1.Policy{ID: "other/mute", Tier: policyv1.TierOwner, Egress: &policyv1.Direction{}}
			c.add(unix.IPPROTO_UDP, "10.244.0.5:7", "198.19.0.1:7")
			apply(t, e, &s)
			if n := cut(t, e); n != many+1 || len(c.list) != 0 {
				t.Errorf("%d connections cut, %d are left", n, len(c.list))
			}
			if got := strings.Replace(sets(e), "flows 1", "", 1); strings.TrimSpace(got) != tc.want {
				t.Errorf("held by %q, want %q", got, tc.want)
			}
			if !strings.Contains(cutElements(e), "flows { udp . 10.244.0.5 . 7 . 198.19.0.1 . 7 }") {
				t.Error("the connection of another tenant is not held by itself")
			}
		})
	}
}

// TestManyCutsFillNothing cuts new connections of one pod again and again.
func TestManyCutsFillNothing(t *testing.T) {
	e, _ := fakeEngine(t)
	c := &conntrack{}
	c.in(e)
	apply(t, e, mute())
	for round := range 60 {
		for i := range 50 {
			c.add(unix.IPPROTO_UDP, at(client, i), at(outside(round), round*50+i))
			c.add(unix.IPPROTO_TCP, at(client, i), at(outside(round*50+i), i))
		}
		cut(t, e)
	}
	all := strings.Count(cutElements(e), "\n") + 1
	if got := sets(e); all > 3*ownMost+2 || !strings.Contains(got, "silent 1") || !strings.Contains(got, "loose 1") {
		t.Errorf("held by %d elements: %s", all, got)
	}
}

// TestWideHoldsEnd allows again what was held by wide elements.
func TestWideHoldsEnd(t *testing.T) {
	e, _ := fakeEngine(t)
	c := &conntrack{}
	c.in(e)
	for i := range 1000 {
		c.add(unix.IPPROTO_UDP, at(client, i), at(db, 52))
		c.add(unix.IPPROTO_SCTP, at(client, i), at(db, i))
	}
	for i := range 1000 {
		c.add(unix.IPPROTO_UDP, at(client, i), at(outside(i), 52))
	}
	both := mute()
	both.Policies["shop/closed"] = closed().Policies["shop/closed"]
	both.Pods[addr(db)] = pod("shop/db", db, "shop/closed")
	apply(t, e, both)
	if cut(t, e); sets(e) != "peers 1 senders 1" {
		t.Fatalf("held by %s", sets(e))
	}
	if !apply(t, e, open()) {
		t.Error("nobody is told to look")
	}
	if cut(t, e); sets(e) != "senders 1" {
		t.Errorf("held though allowed: %s", sets(e))
	}
	next := open()
	next.Pods[addr(client)].Interface = "atlother"
	apply(t, e, next)
	if cut(t, e); sets(e) != "" {
		t.Errorf("held though the pod is gone: %s", sets(e))
	}
}

// watched is an nftables whose transactions are looked at.
type watched struct {
	*knftables.Fake
	run func(*knftables.Transaction) error
}

func (w watched) Run(ctx context.Context, tx *knftables.Transaction) error {
	if err := w.run(tx); err != nil {
		return err
	}
	return w.Fake.Run(ctx, tx)
}

// TestHoldsAreWrittenInParts has many pods with some connections each, between whose transactions Apply gets its turn.
func TestHoldsAreWrittenInParts(t *testing.T) {
	e, _ := fakeEngine(t)
	c := &conntrack{}
	c.in(e)
	s := mute()
	for i := range 40 {
		a := fmt.Sprintf("10.244.1.%d", i+1)
		s.Pods[addr(a)] = pod("shop/"+a, a, "shop/mute")
		for j := range 60 {
			c.add(unix.IPPROTO_UDP, at(a, j), at(outside(i), j))
		}
	}
	apply(t, e, s)
	fake := e.cuts.(*knftables.Fake)
	parts := 0
	e.cuts = watched{fake, func(tx *knftables.Transaction) error {
		parts++
		if n := tx.NumOperations(); n > 3*batchMost {
			t.Errorf("%d changes at once", n)
		}
		return nil
	}}
	if n := cut(t, e); n != 2400 || parts != 3 {
		t.Errorf("%d connections cut in %d parts", n, parts)
	}
	e.cuts = fake
	if sets(e) != "flows 2400" {
		t.Errorf("held by %s", sets(e))
	}
}

// TestCutWithoutHold has the kernel refuse elements: connections end all the same, and are held when it does not any more.
func TestCutWithoutHold(t *testing.T) {
	e, _ := fakeEngine(t)
	c := &conntrack{}
	c.in(e)
	c.add(unix.IPPROTO_UDP, at(client, 1), at(db, 1))
	apply(t, e, closed())
	fake, full := e.cuts.(*knftables.Fake), errors.New("full")
	e.cuts = watched{fake, func(*knftables.Transaction) error { return full }}
	n, err := e.Cut(context.Background())
	if n != 1 || len(c.list) != 0 || !errors.Is(err, full) {
		t.Errorf("%d connections cut, %d are left: %v", n, len(c.list), err)
	}
	if n, err := e.Cut(context.Background()); n != 0 || !errors.Is(err, full) {
		t.Errorf("%d connections cut: %v", n, err)
	}
	e.cuts = fake
	if cut(t, e); sets(e) != "flows 1" {
		t.Errorf("held by %q", sets(e))
	}
	if e.owed != nil {
		t.Errorf("still to be written: %v", e.owed)
	}
}
