// Package lease keeps, in a directory, which pod interface holds which address
// and what else was set up for it on the host.
//
// It is host-local address management in the manner of the reference CNI
// plugin, but finds a pod's record by name instead of reading every file, and
// never leaves half a record behind. It does not touch the network.
//
// The CNI plugin writes leases; Host reads them to repair what somebody
// removed; Cleanup deletes the directory.
//
// # On disk
//
//	lock                      taken with flock around every change
//	boot                      id of the boot the leases belong to
//	last                      the address given out last; the search goes on after it
//	leases/<id>@<interface>   one JSON record per pod interface
//	addresses/<address>       symbolic link to the record that holds it
//	kept/<key>                address that belongs to a key, with or without a pod
//
// The link is made first and removed last. A link without a record is what a
// process killed in between leaves; it is taken over when its address comes up
// again. Leases from before a reboot are void, see ResetAfterBoot.
package lease

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotFound says that the interface has no lease.
var ErrNotFound = errors.New("no lease")

// ErrExists says that the interface has a lease already.
var ErrExists = errors.New("the interface has an address already")

// ErrExhausted says that every address is taken.
var ErrExhausted = errors.New("no free pod address")

// Lease is what the host holds for one pod interface.
type Lease struct {
	ContainerID string `json:"containerID"` // of the pod sandbox
	IfName      string `json:"ifName"`
	Netns       string `json:"netns"`
	Pod         string `json:"pod,omitempty"` // "namespace/name", for messages
	UID         string `json:"uid,omitempty"` // of the pod
	// HostIf is the host's end of the pod's veth pair.
	HostIf    string     `json:"hostIf"`
	Address   netip.Addr `json:"address"`
	HostPorts []HostPort `json:"hostPorts,omitempty"`
	// MAC is the hardware address of the pod's interface, "" for the one made of its address.
	MAC string `json:"mac,omitempty"`
	// Key keeps the address for the next pod with the same key; "" for a pod whose address ends with it.
	Key string `json:"key,omitempty"`
}

// HostPort is one port of the host that leads to the pod.
type HostPort struct {
	Protocol string     `json:"protocol"` // tcp, udp or sctp
	HostIP   netip.Addr `json:"hostIP,omitzero"`
	Port     uint16     `json:"port"`
	PodPort  uint16     `json:"podPort"`
}

// Range is where addresses come from.
type Range struct {
	Subnet  netip.Prefix // masked; IPv4
	Gateway netip.Addr   // not given out
}

// Store is a directory of leases. It may be used by several processes.
type Store struct {
	dir string
}

// Open returns the store in dir and creates the directory when it is missing.
func Open(dir string) (*Store, error) {
	s := &Store{dir: dir}
	if _, err := os.Stat(s.path("addresses")); err == nil {
		return s, nil
	}
	for _, d := range []string{"leases", "addresses"} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return nil, fmt.Errorf("creating lease directory: %w", err)
		}
	}
	return s, nil
}

// Add chooses an address for l, stores the lease and sets l.Address. It fails
// with ErrExists when the interface has a lease and with ErrExhausted when the
// range has no free address.
func (s *Store) Add(l *Lease, r Range) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	name, err := recordName(l.ContainerID, l.IfName)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(s.path("leases", name)); err == nil {
		return fmt.Errorf("adding lease of %s: %w", name, ErrExists)
	}
	if l.Key != "" && !keyText.MatchString(l.Key) {
		return fmt.Errorf("adding lease of %s: %q is no key of letters, digits and -", name, l.Key)
	}
	addr, err := s.choose(l.Key, name, r)
	if err != nil {
		return err
	}
	l.Address = addr
	if err := s.write(name, l); err != nil {
		_ = os.Remove(s.path("addresses", addr.String()))
		return err
	}
	// Only a hint for the next search: a reused address is better not one that
	// was just given back.
	_ = os.WriteFile(s.path("last"), []byte(addr.String()), 0o600)
	return nil
}

// choose finds the address of a key, or a free one, which a key then keeps.
func (s *Store) choose(key, name string, r Range) (netip.Addr, error) {
	kept, err := s.kept()
	if err != nil {
		return netip.Addr{}, err
	}
	if key != "" {
		if a, ok, err := s.again(key, name, r, kept); ok || err != nil {
			return a, err
		}
	}
	taken := map[netip.Addr]bool{}
	for _, a := range kept {
		taken[a] = true
	}
	a, err := s.reserve(name, r, taken)
	if err == nil && key != "" {
		if err = s.keep(key, a); err != nil {
			_ = os.Remove(s.path("addresses", a.String()))
		}
	}
	return a, err
}

// reserve links the next free address that is not kept for somebody to the record.
func (s *Store) reserve(name string, r Range, kept map[netip.Addr]bool) (netip.Addr, error) {
	first, last := hosts(r.Subnet)
	start := first
	if b, err := os.ReadFile(s.path("last")); err == nil {
		if a, err := netip.ParseAddr(strings.TrimSpace(string(b))); err == nil && a.Compare(first) >= 0 && a.Less(last) {
			start = a.Next()
		}
	}
	tried := 0
	for a := start; ; {
		if a != r.Gateway {
			tried++
			ok := false
			if !kept[a] {
				var err error
				if ok, err = s.take(a, name); err != nil {
					return netip.Addr{}, err
				}
			}
			if ok {
				return a, nil
			}
		}
		if a = a.Next(); last.Less(a) {
			a = first
		}
		if a == start {
			return netip.Addr{}, fmt.Errorf("%w in %s: all %d are in use by pods of this node, or kept for its virtual machines", ErrExhausted, r.Subnet, tried)
		}
	}
}

// take reserves one address unless a live record holds it.
func (s *Store) take(a netip.Addr, name string) (bool, error) {
	link := s.path("addresses", a.String())
	target := filepath.Join("..", "leases", name)
	err := os.Symlink(target, link)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return false, fmt.Errorf("reserving address: %w", err)
	}
	if _, err := os.Stat(link); !errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err := os.Remove(link); err != nil {
		return false, fmt.Errorf("taking over a stale address: %w", err)
	}
	if err := os.Symlink(target, link); err != nil {
		return false, fmt.Errorf("reserving address: %w", err)
	}
	return true, nil
}

func (s *Store) write(name string, l *Lease) error {
	b, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("encoding lease: %w", err)
	}
	tmp := s.path("lease.tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("writing lease: %w", err)
	}
	if err := os.Rename(tmp, s.path("leases", name)); err != nil {
		return fmt.Errorf("writing lease: %w", err)
	}
	return nil
}

// Get returns the lease of an interface, or ErrNotFound.
func (s *Store) Get(containerID, ifName string) (*Lease, error) {
	name, err := recordName(containerID, ifName)
	if err != nil {
		return nil, err
	}
	return s.read(name)
}

func (s *Store) read(name string) (*Lease, error) {
	b, err := os.ReadFile(s.path("leases", name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading lease of %s: %w", name, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("reading lease: %w", err)
	}
	l := new(Lease)
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("reading lease %s: %w", name, err)
	}
	return l, nil
}

// Holder returns the lease that holds an address, or ErrNotFound.
func (s *Store) Holder(a netip.Addr) (*Lease, error) {
	target, err := os.Readlink(s.path("addresses", a.String()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking up %s: %w", a, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("looking up %s: %w", a, err)
	}
	return s.read(filepath.Base(target))
}

// Remove gives the interface's address back. An interface without a lease is
// no error.
func (s *Store) Remove(containerID, ifName string) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	name, err := recordName(containerID, ifName)
	if err != nil {
		return err
	}
	l, err := s.read(name)
	if err != nil {
		// Without a readable record the address can only be found by its link.
		if err := os.Remove(s.path("leases", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing lease: %w", err)
		}
		return s.unlinkAll(name)
	}
	if err := os.Remove(s.path("leases", name)); err != nil {
		return fmt.Errorf("removing lease: %w", err)
	}
	return s.unlink(l.Address.String(), name)
}

func (s *Store) unlinkAll(name string) error {
	entries, err := os.ReadDir(s.path("addresses"))
	if err != nil {
		return fmt.Errorf("listing addresses: %w", err)
	}
	for _, e := range entries {
		if err := s.unlink(e.Name(), name); err != nil {
			return err
		}
	}
	return nil
}

// unlink frees an address if the named record is the one that holds it.
func (s *Store) unlink(addr, name string) error {
	link := s.path("addresses", addr)
	target, err := os.Readlink(link)
	if errors.Is(err, fs.ErrNotExist) || err == nil && filepath.Base(target) != name {
		return nil
	}
	if err != nil {
		return fmt.Errorf("freeing address %s: %w", addr, err)
	}
	if err := os.Remove(link); err != nil {
		return fmt.Errorf("freeing address: %w", err)
	}
	return nil
}

// List returns every lease. Records that cannot be read are left out: they
// hold nothing anybody could repair.
func (s *Store) List() ([]Lease, error) {
	entries, err := os.ReadDir(s.path("leases"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	out := make([]Lease, 0, len(entries))
	for _, e := range entries {
		l, err := s.read(e.Name())
		if err != nil {
			continue
		}
		out = append(out, *l)
	}
	return out, nil
}

// ResetAfterBoot drops every lease when the machine was booted since the
// leases were made: no pod survives a reboot.
func (s *Store) ResetAfterBoot() error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	now, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("reading boot id: %w", err)
	}
	then, err := os.ReadFile(s.path("boot"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading boot id of leases: %w", err)
	}
	if string(now) == string(then) {
		return nil
	}
	for _, d := range []string{"leases", "addresses"} {
		if err := os.RemoveAll(s.path(d)); err != nil {
			return fmt.Errorf("dropping leases of an earlier boot: %w", err)
		}
		if err := os.Mkdir(s.path(d), 0o700); err != nil {
			return fmt.Errorf("creating lease directory: %w", err)
		}
	}
	if err := os.WriteFile(s.path("boot"), now, 0o600); err != nil {
		return fmt.Errorf("writing boot id: %w", err)
	}
	return nil
}

func (s *Store) lock() (unlock func(), err error) {
	f, err := os.OpenFile(s.path("lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening lease lock: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("locking leases: %w", err)
	}
	return func() { _ = f.Close() }, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// recordName is the file name of an interface's record. Container ids and
// interface names never hold a slash; a caller's mistake must not leave the
// directory.
func recordName(containerID, ifName string) (string, error) {
	name := containerID + "@" + ifName
	if containerID == "" || ifName == "" || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("naming lease: %q and %q are no container id and interface name", containerID, ifName)
	}
	return name, nil
}

// hosts returns the first and last address of a subnet that a pod may have:
// all but the network and the broadcast address.
func hosts(p netip.Prefix) (first, last netip.Addr) {
	b := p.Masked().Addr().As4()
	first = p.Masked().Addr().Next()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return first, netip.AddrFrom4(b).Prev()
}
