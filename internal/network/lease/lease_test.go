package lease

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func open(t testing.TB) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func testRange(subnet string) Range {
	p := netip.MustParsePrefix(subnet)
	return Range{Subnet: p, Gateway: p.Addr().Next()}
}

func add(t testing.TB, s *Store, id string, r Range) netip.Addr {
	t.Helper()
	l := &Lease{ContainerID: id, IfName: "eth0"}
	if err := s.Add(l, r); err != nil {
		t.Fatal(err)
	}
	return l.Address
}

func TestAddressesGoRound(t *testing.T) {
	s, r := open(t), testRange("10.0.0.0/29")
	var got []string
	for i := range 5 {
		got = append(got, add(t, s, fmt.Sprint(i), r).String())
	}
	if want := "10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5 10.0.0.6"; strings.Join(got, " ") != want {
		t.Errorf("addresses %v, want %s", got, want)
	}
	err := s.Add(&Lease{ContainerID: "x", IfName: "eth0"}, r)
	if !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "10.0.0.0/29: all 5") {
		t.Errorf("full range: %v", err)
	}
	for _, id := range []string{"1", "3"} {
		if err := s.Remove(id, "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	// The search goes on after the last address given out, then from the start.
	if a, b := add(t, s, "a", r), add(t, s, "b", r); a.String() != "10.0.0.3" || b.String() != "10.0.0.5" {
		t.Errorf("reused %s and %s", a, b)
	}
}

func TestLeaseIsFoundAndRemoved(t *testing.T) {
	s, r := open(t), testRange("10.0.0.0/24")
	l := &Lease{
		ContainerID: "c1", IfName: "eth0", Pod: "ns/p", HostIf: "atl1",
		HostPorts: []HostPort{{Protocol: "tcp", Port: 80, PodPort: 8080, HostIP: netip.MustParseAddr("192.0.2.1")}},
	}
	if err := s.Add(l, r); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(&Lease{ContainerID: "c1", IfName: "eth0"}, r); !errors.Is(err, ErrExists) {
		t.Errorf("second lease: %v", err)
	}
	got, err := s.Get("c1", "eth0")
	if err != nil || fmt.Sprint(*got) != fmt.Sprint(*l) {
		t.Errorf("got %+v, %v; want %+v", got, err, l)
	}
	if h, err := s.Holder(l.Address); err != nil || h.ContainerID != "c1" {
		t.Errorf("holder %+v, %v", h, err)
	}
	for range 2 {
		if err := s.Remove("c1", "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Get("c1", "eth0"); !errors.Is(err, ErrNotFound) {
		t.Errorf("after removal: %v", err)
	}
	if _, err := s.Holder(l.Address); !errors.Is(err, ErrNotFound) {
		t.Errorf("holder after removal: %v", err)
	}
}

func TestHalfDoneChangesHeal(t *testing.T) {
	s, r := open(t), testRange("10.0.0.0/29")
	for i := range 4 {
		add(t, s, fmt.Sprint(i), r)
	}
	// Killed between the link and the record: the address is not lost.
	if err := os.Symlink("../leases/torn@eth0", s.path("addresses", "10.0.0.6")); err != nil {
		t.Fatal(err)
	}
	if a := add(t, s, "new", r); a.String() != "10.0.0.6" {
		t.Errorf("got %s, want the torn address", a)
	}
	// The torn lease's own removal leaves the new holder alone.
	if err := s.Remove("torn", "eth0"); err != nil {
		t.Fatal(err)
	}
	if h, err := s.Holder(netip.MustParseAddr("10.0.0.6")); err != nil || h.ContainerID != "new" {
		t.Errorf("holder %v, %v", h, err)
	}
	// A record nobody can read is removed with its address.
	if err := os.WriteFile(s.path("leases", "2@eth0"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("2", "eth0"); err != nil {
		t.Fatal(err)
	}
	if a := add(t, s, "again", r); a.String() != "10.0.0.4" {
		t.Errorf("got %s, want the freed address", a)
	}
}

func TestRebootVoidsLeases(t *testing.T) {
	s, r := open(t), testRange("10.0.0.0/29")
	if err := s.ResetAfterBoot(); err != nil {
		t.Fatal(err)
	}
	add(t, s, "a", r)
	if err := s.ResetAfterBoot(); err != nil {
		t.Fatal(err)
	}
	if l, err := s.List(); err != nil || len(l) != 1 {
		t.Errorf("same boot: %v, %v", l, err)
	}
	if err := os.WriteFile(s.path("boot"), []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.ResetAfterBoot(); err != nil {
		t.Fatal(err)
	}
	if l, err := s.List(); err != nil || len(l) != 0 {
		t.Errorf("after a reboot: %v, %v", l, err)
	}
	for i := range 5 {
		add(t, s, fmt.Sprint(i), r)
	}
}

func TestNamesCannotEscape(t *testing.T) {
	s, r := open(t), testRange("10.0.0.0/29")
	for _, n := range [][2]string{{"", "eth0"}, {"a", ""}, {"../a", "eth0"}, {"a", "x/y"}, {"a\x00", "eth0"}} {
		if err := s.Add(&Lease{ContainerID: n[0], IfName: n[1]}, r); err == nil {
			t.Errorf("%q accepted", n)
		}
		if err := s.Remove(n[0], n[1]); err == nil {
			t.Errorf("%q accepted for removal", n)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	s, r := open(t), testRange("10.0.0.0/24")
	var mu sync.Mutex
	held := map[netip.Addr]bool{}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			own, err := Open(s.dir)
			if err != nil {
				t.Error(err)
				return
			}
			for i := range 20 {
				l := &Lease{ContainerID: fmt.Sprintf("%d-%d", w, i), IfName: "eth0"}
				if err := own.Add(l, r); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if held[l.Address] {
					t.Errorf("%s given out twice", l.Address)
				}
				held[l.Address] = true
				mu.Unlock()
				if i%2 == 0 {
					mu.Lock()
					delete(held, l.Address)
					mu.Unlock()
					if err := own.Remove(l.ContainerID, "eth0"); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if l, err := s.List(); err != nil || len(l) != 80 {
		t.Errorf("%d leases, %v; want 80", len(l), err)
	}
}

// TestKept: an address stays a key's, whatever happens to pods and the host, until it is released.
func TestKept(t *testing.T) {
	s, r := open(t), testRange("10.0.0.0/29")
	pod := func(id, key string) (netip.Addr, error) {
		l := &Lease{ContainerID: id, IfName: "eth0", Key: key, Pod: "ns/" + id}
		err := s.Add(l, r)
		return l.Address, err
	}
	first, err := pod("vm1", "vm-a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pod("vm1-again", "vm-a"); !errors.Is(err, ErrHeld) || !strings.Contains(err.Error(), "pod ns/vm1") {
		t.Errorf("while the pod before it is there: %v", err)
	}
	if err := s.Remove("vm1", "eth0"); err != nil {
		t.Fatal(err)
	}
	for i := range 4 { // all others
		if a, err := pod(fmt.Sprint(i), ""); err != nil || a == first {
			t.Errorf("another pod got %s, %v", a, err)
		}
	}
	if _, err := pod("more", ""); !errors.Is(err, ErrExhausted) {
		t.Errorf("a kept address was given away: %v", err)
	}
	if err := os.Remove(s.path("boot")); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if err := s.ResetAfterBoot(); err != nil {
		t.Fatal(err)
	}
	if a, err := pod("vm2", "vm-a"); err != nil || a != first {
		t.Errorf("after a reboot: %s, %v, want %s", a, err, first)
	}
	if err := Clear(s.dir); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(s.dir); err != nil {
		t.Fatal(err)
	}
	if a, err := pod("vm3", "vm-a"); err != nil || a != first {
		t.Errorf("after a clean-up: %s, %v, want %s", a, err, first)
	}
	if keys, err := s.Kept(); err != nil || len(keys) != 1 || keys[0] != "vm-a" {
		t.Errorf("kept: %v, %v", keys, err)
	}
	for range 2 {
		if err := s.Release("vm-a"); err != nil {
			t.Error(err)
		}
	}
	if h, err := s.Holder(first); err != nil || h.ContainerID != "vm3" {
		t.Errorf("released under a pod: %+v, %v", h, err)
	}
	if err := s.Remove("vm3", "eth0"); err != nil {
		t.Fatal(err)
	}
	if err := Clear(s.dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("with nothing kept the directory is left: %v", err)
	}
}

// TestKeyNames: a key is part of a path.
func TestKeyNames(t *testing.T) {
	s := open(t)
	for _, key := range []string{"..", "a/b", "", "-x", strings.Repeat("x", 200)} {
		if err := s.Release(key); err == nil {
			t.Errorf("%q was released", key)
		}
		if err := s.Add(&Lease{ContainerID: "c", IfName: "eth0", Key: key}, testRange("10.0.0.0/24")); err == nil && key != "" {
			t.Errorf("%q was added", key)
		}
	}
	if err := s.keep("vm-old", netip.MustParseAddr("192.0.2.1")); err != nil {
		t.Fatal(err)
	}
	l := &Lease{ContainerID: "d", IfName: "eth0", Key: "vm-old"}
	if err := s.Add(l, testRange("10.0.0.0/24")); err != nil || l.Address.String() != "10.0.0.3" {
		t.Errorf("an address outside of the subnet was kept: %s, %v", l.Address, err)
	}
}
