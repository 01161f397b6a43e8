package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
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

// TestCutsThatFailAreRetriedLater fails for some minutes. What is new is tried at once.
func TestCutsThatFailAreRetriedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		wake, calls, failure := make(chan struct{}, 1), 0, errors.New("full")
		done := make(chan struct{})
		go func() {
			defer close(done)
			retrying(ctx, wake, func() error { calls++; return failure })
		}()
		after := func(wait time.Duration, want int) {
			t.Helper()
			time.Sleep(wait)
			synctest.Wait()
			if calls != want {
				t.Errorf("%d calls, want %d", calls, want)
			}
		}
		after(time.Hour, 0)
		signal(wake)
		after(29*time.Second, 6) // after 0, 0.5, 1.5, 3.5, 7.5 and 15.5 s
		after(5*time.Minute, 16)
		signal(wake)
		after(time.Second, 17)
		failure = nil
		after(time.Minute, 18)
		after(time.Hour, 18)
		failure = errors.New("full again")
		signal(wake)
		after(600*time.Millisecond, 20)
		cancel()
		<-done
	})
}
