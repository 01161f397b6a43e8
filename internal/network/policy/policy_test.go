package policy

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/knftables"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/network/cniconf"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func block(cidr string, except ...string) policyv1.Block {
	b := policyv1.Block{CIDR: netip.MustParsePrefix(cidr)}
	for _, e := range except {
		b.Except = append(b.Except, netip.MustParsePrefix(e))
	}
	return b
}

// fakeEngine writes into a fake nftables.
func fakeEngine(t testing.TB) (*Engine, *knftables.Fake) {
	t.Helper()
	e, err := New(Config{Network: cniconf.Network{
		Subnet: netip.MustParsePrefix("10.244.0.0/22"), Gateway: addr("10.244.0.1"),
		ClusterCIDR: netip.MustParsePrefix("10.244.0.0/16"), StateDir: "/nowhere",
	}, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	fake := knftables.NewFake(knftables.InetFamily, e.table)
	e.nft, e.render.logs = fake, true
	e.addresses = func() (map[netip.Addr]bool, error) { return map[netip.Addr]bool{addr("10.244.0.1"): true}, nil }
	e.cuts, e.held = knftables.NewFake(knftables.InetFamily, CutTableName(e.cfg.Network)), map[string]bool{}
	return e, fake
}

func apply(t testing.TB, e *Engine, s *policyv1.State) bool {
	t.Helper()
	narrowed, err := e.Apply(context.Background(), s)
	if err != nil {
		t.Fatal(err)
	}
	return narrowed
}

func pod(name, address string, policies ...string) *policyv1.Pod {
	a := addr(address)
	b := a.As4()
	return &policyv1.Pod{
		Name: name, Address: a, Interface: fmt.Sprintf("atl%02x%02x", b[2], b[3]), MAC: fmt.Sprintf("0a:58:0a:f4:%02x:%02x", b[2], b[3]),
		Policies: policies,
	}
}

func state(pods ...*policyv1.Pod) *policyv1.State {
	s := &policyv1.State{Pods: map[netip.Addr]*policyv1.Pod{}, Sets: map[string]*policyv1.Set{}, Policies: map[string]*policyv1.Policy{}}
	for _, p := range pods {
		s.Pods[p.Address] = p
	}
	return s
}

func (l list) in(s *policyv1.State) *policyv1.State {
	for _, p := range l {
		s.Policies[p.ID] = p
	}
	return s
}

type list []*policyv1.Policy

// shop is a state with all that rules can say.
func shop() *policyv1.State {
	s := list{
		{ID: "shop/bound", Tier: policyv1.TierAdministrator, Egress: &policyv1.Direction{Rules: []policyv1.Rule{
			{Blocks: []policyv1.Block{block("0.0.0.0/0", "10.244.0.0/16", "192.168.0.0/16")}, AnyPort: true},
			{Peers: []string{"namespace"}, AnyPort: true},
		}}},
		{ID: "shop/db", Tier: policyv1.TierOwner, Ingress: &policyv1.Direction{Rules: []policyv1.Rule{
			{
				Peers: []string{"clients"}, Blocks: []policyv1.Block{block("203.0.113.0/24", "203.0.113.128/25"), block("198.51.100.7/32"), block("2001:db8::/32")},
				Ports: []policyv1.PortRange{
					{Protocol: policyv1.TCP, First: 5432, Last: 5432},
					{Protocol: policyv1.TCP, First: 8000, Last: 9000},
					{Protocol: policyv1.TCP, First: 8500, Last: 9001},
					{Protocol: policyv1.SCTP, First: 7, Last: 7},
					{Protocol: policyv1.UDP, Last: 65535},
				},
			},
			{AnyPeer: true, Named: []string{"metrics"}},
		}}},
		{ID: "shop/closed", Tier: policyv1.TierOwner, Ingress: &policyv1.Direction{}, Egress: &policyv1.Direction{}},
	}.in(state(
		pod("shop/db-0", "10.244.0.2", "shop/bound", "shop/db"),
		pod("shop/db-1", "10.244.0.3", "shop/bound", "shop/db"),
		pod("shop/client", "10.244.0.4", "shop/bound", "shop/closed"),
		pod("free/pod", "10.244.1.5"),
	))
	s.Sets["clients"] = &policyv1.Set{Addresses: []netip.Addr{addr("10.244.0.4"), addr("10.244.1.5")}}
	s.Sets["namespace"] = &policyv1.Set{Addresses: []netip.Addr{addr("10.244.0.2"), addr("10.244.0.3"), addr("10.244.0.4")}}
	s.Sets["metrics"] = &policyv1.Set{Endpoints: []policyv1.Endpoint{{Address: addr("10.244.0.2"), Protocol: policyv1.TCP, Port: 9100}}}
	return s
}

var update = flag.Bool("update", os.Getenv("UPDATE_GOLDEN") != "", "write golden files")

// table is the fake's content without the random name.
func dump(e *Engine, fake *knftables.Fake) string {
	return strings.ReplaceAll(fake.Dump(), e.mark, "made-0")
}

func TestGoldenTable(t *testing.T) {
	e, fake := fakeEngine(t)
	apply(t, e, shop())
	path := filepath.Join("testdata", "shop.nft")
	got := dump(e, fake)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the table differs from %s (UPDATE_GOLDEN=1 writes it):\n%s", path, got)
	}
}

func TestChangesAreSmall(t *testing.T) {
	e, fake := fakeEngine(t)
	s := shop()
	apply(t, e, s)
	operations := func(next *policyv1.State) (string, bool) {
		t.Helper()
		tx := fake.NewTransaction()
		e.mu.Lock()
		narrowed := e.change(tx, e.have, e.render.render(next))
		e.mu.Unlock()
		if got := apply(t, e, next); got != narrowed && tx.NumOperations() > 0 {
			t.Errorf("narrowed: %t and %t", got, narrowed)
		}
		// Everything at once comes to the same as step by step.
		whole, other := fakeEngine(t)
		apply(t, whole, next)
		if a, b := dump(e, fake), dump(whole, other); a != b {
			t.Errorf("step by step:\n%s\nat once:\n%s", a, b)
		}
		return tx.String(), narrowed
	}
	if text, narrowed := operations(s); text != "" || narrowed {
		t.Errorf("nothing has changed: %s", text)
	}

	more := *s
	more.Sets = map[string]*policyv1.Set{"namespace": s.Sets["namespace"], "metrics": s.Sets["metrics"], "clients": {
		Addresses: append(slices.Clone(s.Sets["clients"].Addresses), addr("10.244.7.7")),
	}}
	text, narrowed := operations(&more)
	if want := "add element inet atoll-policy " + setName("clients") + " { 10.244.7.7 }\n"; text != want || narrowed {
		t.Errorf("one more peer: %s, narrowed %t", text, narrowed)
	}
	if text, narrowed = operations(s); !strings.HasPrefix(text, "delete element") || strings.Count(text, "\n") != 1 || !narrowed {
		t.Errorf("one peer less: %s, narrowed %t", text, narrowed)
	}

	other := *s
	other.Policies = map[string]*policyv1.Policy{"shop/bound": s.Policies["shop/bound"], "shop/closed": s.Policies["shop/closed"], "shop/db": {
		ID: "shop/db", Tier: policyv1.TierOwner, Ingress: &policyv1.Direction{Rules: []policyv1.Rule{{AnyPeer: true, AnyPort: true}}},
	}}
	other.Sets = map[string]*policyv1.Set{"namespace": s.Sets["namespace"]}
	text, narrowed = operations(&other)
	if n := strings.Count(text, "flush chain"); n != 1 || !narrowed || !strings.Contains(text, "delete set inet atoll-policy "+setName("metrics")) {
		t.Errorf("another rule: %s, narrowed %t", text, narrowed)
	}
	if text, _ = operations(state(pod("free/pod", "10.244.1.5"))); !strings.Contains(text, "delete chain inet atoll-policy "+policyChain("shop/db", ingress)) {
		t.Errorf("all gone: %s", text)
	}
}

// TestNewPodsHaveNothingToCut starts pods, which is no reason to look at all connections.
func TestNewPodsHaveNothingToCut(t *testing.T) {
	e, _ := fakeEngine(t)
	apply(t, e, shop())
	s := shop()
	s.Pods[addr("10.244.1.6")] = pod("shop/db-2", "10.244.1.6", "shop/bound", "shop/db")
	if apply(t, e, s) {
		t.Error("a pod that is new has connections to cut")
	}
	again := shop()
	again.Pods[addr("10.244.1.6")] = pod("shop/db-2", "10.244.1.6", "shop/bound", "shop/db")
	again.Pods[addr("10.244.1.5")] = pod("free/pod", "10.244.1.5", "shop/closed")
	if !apply(t, e, again) {
		t.Error("a pod that was open has no connections to cut")
	}
	again.Pods[addr("10.244.1.6")] = pod("shop/db-2", "10.244.1.6", "shop/bound", "shop/db", "shop/closed")
	next := *again
	if !apply(t, e, &next) {
		t.Error("a pod with one more policy has no connections to cut")
	}
}

func TestFailureIsFollowedByEverything(t *testing.T) {
	e, _ := fakeEngine(t)
	apply(t, e, state())
	broken := knftables.NewFake(knftables.InetFamily, e.table) // without the table
	e.nft = broken
	if !apply(t, e, shop()) {
		t.Error("a table that was made anew may deny more")
	}
	whole, other := fakeEngine(t)
	apply(t, whole, shop())
	if dump(e, broken) != dump(whole, other) {
		t.Error("the table is not whole after a failure")
	}
}

func TestSpans(t *testing.T) {
	for _, tc := range []struct {
		blocks []policyv1.Block
		want   string
	}{
		{nil, "{  }"},
		{[]policyv1.Block{block("0.0.0.0/0")}, "{ 0.0.0.0/0 }"},
		{[]policyv1.Block{block("0.0.0.0/0", "0.0.0.0/0")}, "{  }"},
		{[]policyv1.Block{block("10.0.0.0/8", "10.0.0.0/9")}, "{ 10.128.0.0/9 }"},
		{[]policyv1.Block{block("10.0.0.0/24", "10.0.0.1/32", "10.0.0.255/32")}, "{ 10.0.0.0, 10.0.0.2-10.0.0.254 }"},
		{[]policyv1.Block{block("10.0.0.0/24", "10.0.0.0/25"), block("10.0.0.0/26")}, "{ 10.0.0.0/26, 10.0.0.128/25 }"},
		{[]policyv1.Block{block("255.255.255.255/32"), block("255.255.255.254/32")}, "{ 255.255.255.254/31 }"},
		{[]policyv1.Block{block("::/0")}, "{  }"},
		{[]policyv1.Block{block("10.0.0.0/24", "::/0")}, "{ 10.0.0.0/24 }"},
	} {
		if got := anonymous(blockSpans(tc.blocks), span.text); got != tc.want {
			t.Errorf("%v: %s, want %s", tc.blocks, got, tc.want)
		}
	}
}

// TestSpansAndAllowedAgree compares the rules' arithmetic with the plain definition.
func TestSpansAndAllowedAgree(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	prefix := func() netip.Prefix {
		return netip.PrefixFrom(addressOf(0x0a000000|random.Uint32N(1024)), 20+random.IntN(13)).Masked()
	}
	for range 200 {
		var blocks []policyv1.Block
		for range 1 + random.IntN(3) {
			b := policyv1.Block{CIDR: prefix()}
			for range random.IntN(3) {
				b.Except = append(b.Except, prefix())
			}
			blocks = append(blocks, b)
		}
		spans := blockSpans(blocks)
		for range 200 {
			a := addressOf(0x0a000000 | random.Uint32N(1200))
			in := slices.ContainsFunc(spans, func(s span) bool { return s.first <= number(a) && number(a) <= s.last })
			if want := matchesPeer(&policyv1.State{}, policyv1.Rule{Blocks: blocks}, a); in != want {
				t.Fatalf("%v: %s is in %v: %t, want %t", blocks, a, spans, in, want)
			}
		}
	}
}

func TestAllowed(t *testing.T) {
	s := shop()
	for _, tc := range []struct {
		from, to string
		protocol policyv1.Protocol
		port     uint16
		want     bool
	}{
		{"10.244.1.5", "10.244.0.2", policyv1.TCP, 5432, true},
		{"10.244.1.5", "10.244.0.2", policyv1.TCP, 5433, false},
		{"10.244.1.5", "10.244.0.2", policyv1.TCP, 9001, true},
		{"10.244.1.5", "10.244.0.2", policyv1.UDP, 1, true},
		{"10.244.1.5", "10.244.0.2", policyv1.SCTP, 7, true},
		{"10.244.1.5", "10.244.0.2", "", 0, false},
		{"10.244.1.5", "10.244.0.3", policyv1.TCP, 9100, false}, // no such port there
		{"192.0.2.1", "10.244.0.2", policyv1.TCP, 9100, true},
		{"203.0.113.1", "10.244.0.2", policyv1.TCP, 5432, true},
		{"203.0.113.129", "10.244.0.2", policyv1.TCP, 5432, false},
		{"10.244.0.4", "10.244.0.2", policyv1.TCP, 5432, false}, // egress is closed
		{"10.244.0.4", "10.244.0.4", policyv1.TCP, 5432, true},  // itself
		{"10.244.0.2", "192.0.2.1", policyv1.TCP, 80, true},
		{"10.244.0.2", "10.244.1.5", policyv1.TCP, 80, false}, // the administrator's bound
		{"10.244.0.2", "10.244.0.3", policyv1.TCP, 5432, false},
		{"10.244.0.2", "192.168.1.1", policyv1.TCP, 80, false},
		{"192.0.2.1", "10.244.1.5", policyv1.TCP, 80, true},
	} {
		f := Flow{From: addr(tc.from), To: addr(tc.to), Protocol: tc.protocol, Port: tc.port}
		if got := Allowed(s, f); got != tc.want {
			t.Errorf("%v: %t, want %t", f, got, tc.want)
		}
	}
}

func TestPrefix(t *testing.T) {
	for _, p := range []Prefix{
		{Ingress: true, Tier: policyv1.TierOwner, Namespace: "shop"},
		{Tier: policyv1.TierAdministrator, Namespace: strings.Repeat("n", 63)},
	} {
		if got, ok := ParsePrefix(p.String()); !ok || got != p || len(p.String()) > 127 {
			t.Errorf("%q: %v, %t", p, got, ok)
		}
	}
	for _, s := range []string{"", "ingress/owner/", "ingress/other/x", "up/owner/x", "ingress/owner/a/b", "iptables: "} {
		if got, ok := ParsePrefix(s); ok {
			t.Errorf("%q: %v", s, got)
		}
	}
}
