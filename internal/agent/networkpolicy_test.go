package agent

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/network/lease"
)

// TestDelaysBeginWithTheInterface: a pod that is not in the state yet waits on when the state of others is applied.
func TestDelaysBeginWithTheInterface(t *testing.T) {
	h := &policyHost{leases: t.TempDir(), seen: map[string]time.Time{}}
	store, err := lease.Open(h.leases)
	if err != nil {
		t.Fatal(err)
	}
	subnet := lease.Range{Subnet: netip.MustParsePrefix("10.244.0.0/24"), Gateway: netip.MustParseAddr("10.244.0.1")}
	for _, name := range []string{"first", "second", "third"} {
		if err := store.Add(&lease.Lease{ContainerID: name, IfName: "eth0", Pod: "test/" + name, HostIf: name}, subnet); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	step := func(after time.Duration, in ...string) {
		t.Helper()
		if _, err := h.wires(began.Add(after)); err != nil {
			t.Fatal(err)
		}
		s := &policyv1.State{Pods: map[netip.Addr]*policyv1.Pod{}}
		for i, name := range in {
			s.Pods[netip.AddrFrom4([4]byte{10, 244, 0, byte(i)})] = &policyv1.Pod{Interface: name}
		}
		h.enforced(s, began.Add(after+time.Second))
	}
	step(0, "first")
	step(10*time.Second, "first")
	if err := store.Remove("third", "eth0"); err != nil {
		t.Fatal(err)
	}
	step(20*time.Second, "first", "second")
	if want := []time.Duration{time.Second, 21 * time.Second}; !slices.Equal(h.delays, want) {
		t.Errorf("delays %v, want %v", h.delays, want)
	}
	if len(h.seen) != 0 {
		t.Errorf("an interface that is gone is remembered: %v", h.seen)
	}
}
