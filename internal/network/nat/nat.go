// Package nat keeps the host's nftables table "atoll": addresses of pods are
// hidden behind the node's on the way out, and hostPorts lead to pods.
//
// It is not kube-proxy, whose table stands beside this one, and no network
// policy. The CNI plugin adds and removes hostPorts; Host installs the table
// and repairs it; Cleanup removes it.
//
// # The table
//
// hostPorts are elements of two maps (with and without a host address), so
// adding one is one element whatever the number of pods. Chains run just after
// kube-proxy's at the same hooks: a Service wins over a hostPort of the same
// number. What a pod sends to addresses outside the cluster's pod network is
// masqueraded; a connection of a pod to itself through a hostPort and one from
// the host's loopback get the gateway's address as source, or the answer would
// not come back.
//
// The first chain drops what a pod sends from an address that is not its own.
// Loopback hostPorts need route_localnet on the pod's wire, which would let the
// pod send to 127.0.0.0/8 of the host (CVE-2020-8558): that is dropped there
// too.
//
// # What can go wrong
//
// The kernel refuses a hostPort that is taken: ErrPortTaken. Somebody flushed
// the ruleset: ErrNoTable from Add, and Ensure puts everything back.
package nat

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/lease"
)

// ErrPortTaken says that another pod holds a hostPort.
var ErrPortTaken = errors.New("host port is taken")

// ErrNoTable says that the table or one of its maps is gone.
var ErrNoTable = errors.New("nftables table is gone")

// Config describes the pod network of this node.
type Config struct {
	// Table is the table's name.
	Table string
	// Gateway is the host's address towards pods.
	Gateway netip.Addr
	// Subnet holds the node's pods; Cluster the pods of all nodes.
	Subnet, Cluster netip.Prefix
}

// ConfigOf returns the table of a pod network: "atoll", or for another bridge
// than the default one "atoll-BRIDGE".
func ConfigOf(n cniconf.Network) Config {
	c := Config{Table: "atoll", Gateway: n.Gateway, Subnet: n.Subnet, Cluster: n.ClusterCIDR}
	if n.Bridge != cniconf.DefaultBridge {
		c.Table += "-" + n.Bridge
	}
	return c
}

// Pod is the hostPorts of one pod.
type Pod struct {
	Address netip.Addr
	Ports   []lease.HostPort
	// Owner is stored with each port for people who list the ruleset.
	Owner string
}

// Ensure installs the table, replacing its chains and keeping hostPorts that
// are there, in one transaction.
func Ensure(c Config) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	t := newTable(c.Table)
	if err := t.add(conn); err != nil {
		return fmt.Errorf("installing nftables table %s: %w", c.Table, err)
	}
	for _, ch := range t.chains(c) {
		added := conn.AddChain(ch.chain)
		conn.FlushChain(added)
		for _, r := range ch.rules {
			conn.AddRule(&nftables.Rule{Table: t.table, Chain: added, Exprs: r})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("installing nftables table %s: %w", c.Table, err)
	}
	return nil
}

// Add makes the pod's hostPorts lead to it: all or none. Ports that lead to it
// already are no error.
func Add(c Config, p Pod) error {
	if len(p.Ports) == 0 {
		return nil
	}
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	t := newTable(c.Table)
	for _, port := range p.Ports {
		set, el, err := t.element(p, port)
		if err != nil {
			return err
		}
		if err := conn.SetAddElements(set, []nftables.SetElement{el}); err != nil {
			return fmt.Errorf("adding host port %s: %w", describe(port), err)
		}
	}
	if err := conn.SetAddElements(t.hairpin, []nftables.SetElement{hairpinElement(p)}); err != nil {
		return fmt.Errorf("adding host ports: %w", err)
	}
	switch err := conn.Flush(); {
	case err == nil:
		forgetBefore(p)
		return nil
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("adding host ports of %s: %w", p.Owner, ErrNoTable)
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("adding host ports of %s: %s: %w", p.Owner, t.taken(p), ErrPortTaken)
	default:
		return fmt.Errorf("adding host ports of %s: %w", p.Owner, err)
	}
}

// Lookup returns the address of the pod that holds a hostPort.
func Lookup(c Config, port lease.HostPort) (netip.Addr, bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return netip.Addr{}, false, fmt.Errorf("opening nftables: %w", err)
	}
	set, want, err := newTable(c.Table).element(Pod{Address: netip.IPv4Unspecified()}, port)
	if err != nil {
		return netip.Addr{}, false, err
	}
	elements, err := conn.GetSetElements(set)
	if err != nil {
		return netip.Addr{}, false, fmt.Errorf("listing host ports: %w", err)
	}
	for _, e := range elements {
		if string(e.Key) == string(want.Key) && len(e.Val) >= 4 {
			return netip.AddrFrom4([4]byte(e.Val[:4])), true, nil
		}
	}
	return netip.Addr{}, false, nil
}

// taken names the pod's hostPorts that lead to another pod.
func (t *table) taken(p Pod) string {
	conn, err := nftables.New()
	if err != nil {
		return "one of them"
	}
	out := ""
	for _, port := range p.Ports {
		set, el, err := t.element(p, port)
		if err != nil {
			continue
		}
		elements, err := conn.GetSetElements(set)
		if err != nil {
			continue
		}
		for _, e := range elements {
			if string(e.Key) == string(el.Key) && string(e.Val) != string(el.Val) {
				if out != "" {
					out += ", "
				}
				out += describe(port) + " is held by " + e.Comment
			}
		}
	}
	if out == "" {
		return "one of them"
	}
	return out
}

// Remove takes the pod's hostPorts away. Ports that lead elsewhere or nowhere
// are left alone.
func Remove(c Config, p Pod) error {
	if len(p.Ports) == 0 {
		return nil
	}
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	t := newTable(c.Table)
	drop := func(set *nftables.Set, el nftables.SetElement) error {
		if err := conn.SetDeleteElements(set, []nftables.SetElement{el}); err != nil {
			return err
		}
		// One by one: a missing element would undo the whole transaction.
		if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		return nil
	}
	for _, port := range p.Ports {
		if holder, ok, err := Lookup(c, port); err != nil || !ok || holder != p.Address {
			continue
		}
		set, el, err := t.element(p, port)
		if err != nil {
			return err
		}
		if err := drop(set, el); err != nil {
			return fmt.Errorf("removing host port %s: %w", describe(port), err)
		}
	}
	if err := drop(t.hairpin, hairpinElement(p)); err != nil {
		return fmt.Errorf("removing host ports: %w", err)
	}
	forgetAfter(p)
	return nil
}

// Installed reports whether the table has all its chains and rules.
func Installed(c Config) (bool, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return false, fmt.Errorf("opening nftables: %w", err)
	}
	defer conn.CloseLasting()
	t := newTable(c.Table)
	for _, ch := range t.chains(c) {
		rules, err := conn.GetRules(t.table, ch.chain)
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("listing nftables chain %s: %w", ch.chain.Name, err)
		}
		if len(rules) != len(ch.rules) {
			return false, nil
		}
	}
	return true, nil
}

// DeleteTables deletes the tables of these names in every family. Missing ones
// are no error.
func DeleteTables(names ...string) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		return fmt.Errorf("listing nftables tables: %w", err)
	}
	for _, t := range tables {
		for _, n := range names {
			if t.Name == n {
				conn.DelTable(t)
			}
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("deleting nftables tables: %w", err)
	}
	return nil
}

func describe(p lease.HostPort) string {
	if p.HostIP.IsValid() {
		return fmt.Sprintf("%s:%d/%s", p.HostIP, p.Port, p.Protocol)
	}
	return fmt.Sprintf("%d/%s", p.Port, p.Protocol)
}
