package attempts

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func TestRule(t *testing.T) {
	r := Rule{After: 3, First: 30 * time.Second, Most: 5 * time.Minute}
	for failures, want := range []time.Duration{0, 0, 0, 30, 60, 120, 240, 300, 300} {
		if want < 300 {
			want *= time.Second
		} else {
			want = 5 * time.Minute
		}
		if got := r.Lock(failures); got != want {
			t.Errorf("%d failures: %s, want %s", failures, got, want)
		}
	}
	if (Rule{After: 1, First: time.Second, Most: time.Minute}).Lock(1<<30) != time.Minute {
		t.Error("many failures")
	}
}

func TestTable(t *testing.T) {
	now := time.Unix(1e9, 0)
	table := New(Rule{After: 2, First: time.Minute, Most: time.Hour}, 3, func() time.Time { return now })
	table.Fail("a")
	if !table.LockedUntil("a").IsZero() {
		t.Error("locked at once")
	}
	table.Fail("a")
	if !table.LockedUntil("a").Equal(now.Add(time.Minute)) {
		t.Error("not locked")
	}
	now = now.Add(time.Minute)
	if !table.LockedUntil("a").IsZero() {
		t.Error("locked for ever")
	}
	table.Fail("a")
	if !table.LockedUntil("a").Equal(now.Add(2 * time.Minute)) {
		t.Errorf("until %s", table.LockedUntil("a"))
	}
	now = now.Add(2 * time.Hour)
	table.Fail("a")
	if !table.LockedUntil("a").IsZero() {
		t.Error("nothing is forgotten")
	}
	for i := range 100 {
		now = now.Add(time.Second)
		table.Fail(fmt.Sprint(i))
	}
	if len(table.entries) != 3 {
		t.Errorf("%d entries", len(table.entries))
	}
}

func TestSource(t *testing.T) {
	for in, want := range map[string]string{"192.0.2.1": "192.0.2.1", "::ffff:192.0.2.1": "192.0.2.1", "2001:db8::1:2": "2001:db8::/64", "fe80::1%eth0": "fe80::/64"} {
		if got := Source(netip.MustParseAddr(in)); got != want {
			t.Errorf("%s: %s", in, got)
		}
	}
	if Source(netip.Addr{}) == "" {
		t.Error("no address has no key")
	}
}

func TestGate(t *testing.T) {
	var g Gate
	leave, ok := g.Enter("a", 1)
	if _, again := g.Enter("a", 1); !ok || again {
		t.Error("the gate does not close")
	}
	leave()
	leave()
	if _, ok := g.Enter("a", 1); !ok {
		t.Error("the gate does not open")
	}
}
