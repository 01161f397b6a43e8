package policy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// Sets of the table of connections that were cut. It is a table of its own so that they outlive the table of policies,
// which is written anew when the agent starts.
const (
	// pairsSet are addresses between which a connection over TCP was cut.
	pairsSet = "pairs"
	// flowsSet are connections whose peer may not begin any more what the other may: it has no answers in them.
	flowsSet = "flows"
	// protocolsSet are the same without ports.
	protocolsSet = "protocols"
)

const (
	// pairFor is how long a TCP connection cannot be taken up in the middle. A peer that has not sent for so long has
	// given up by itself.
	pairFor = time.Hour
	// flowFor is how long a peer must have been silent to be one who answers.
	flowFor = 10 * time.Minute
	// cutMost are the elements of a set, which costs nothing before they are there.
	cutMost = 1 << 20
)

// cutChains are the chains of the table. A packet that one of the sets holds counts as sent: its time begins again.
func cutChains() []baseChain {
	held := func(set, key string) string {
		return fmt.Sprintf("ct direction reply %[1]s @%[2]s update @%[2]s { %[1]s } counter name %[3]s drop", key, set, CutCounter)
	}
	rules := []string{
		held(flowsSet, "meta l4proto . ip saddr . th sport . ip daddr . th dport"),
		held(protocolsSet, "meta l4proto . ip saddr . ip daddr"),
		established,
		"ct state new tcp flags & (fin | syn | rst | ack) != syn ip saddr . ip daddr @" + pairsSet + " counter name " + CutCounter + " drop",
	}
	return []baseChain{
		{"forward", knftables.ForwardHook, knftables.FilterPriority + "-1", rules},
		{"input", knftables.InputHook, knftables.FilterPriority + "-1", rules},
	}
}

// fillCuts makes the table of connections that were cut, or what is missing of it. The lock is held.
func (e *Engine) fillCuts(ctx context.Context) error {
	fill := func(tx *knftables.Transaction) error {
		tx.Add(&knftables.Table{})
		tx.Add(&knftables.Counter{Name: CutCounter, Comment: comment("of connections that were cut")})
		tx.Add(&knftables.Set{Name: pairsSet, Type: pairKind, Timeout: new(pairFor)})
		for name, kind := range map[string]string{flowsSet: flowKind, protocolsSet: protocolKind} {
			tx.Add(&knftables.Set{
				Name: name, Type: kind, Timeout: new(flowFor), Size: new(uint64(cutMost)),
				Flags: []knftables.SetFlag{knftables.DynamicFlag, knftables.TimeoutFlag},
			})
		}
		for _, c := range cutChains() {
			// It may be there with rules of an earlier version.
			tx.Add(&knftables.Chain{Name: c.name, Type: new(knftables.FilterType), Hook: new(c.hook), Priority: new(c.priority)})
			tx.Flush(&knftables.Chain{Name: c.name})
			c.add(tx)
		}
		return e.cuts.Run(ctx, tx)
	}
	err := fill(e.cuts.NewTransaction())
	if err == nil {
		return nil
	}
	e.cfg.Logger.Warn("the table of connections that were cut is made anew", "err", err)
	tx := e.cuts.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	if err := fill(tx); err != nil {
		return fmt.Errorf("writing the table of connections that were cut: %w", err)
	}
	return nil
}

// connection is an entry of the kernel's table.
type connection struct {
	Flow
	source   uint16     // port of From
	number   uint8      // of the protocol
	original netip.Addr // that it was sent to
}

func connectionOf(k *netlink.ConntrackFlow) connection {
	f, original := flowOf(k)
	c := connection{Flow: f, number: k.Forward.Protocol, original: original}
	if f.Protocol != "" {
		c.source = k.Forward.SrcPort
	}
	return c
}

// elements are what keeps a connection from going on.
func (c connection) elements() []*knftables.Element {
	from, to, number := c.From.String(), c.To.String(), strconv.Itoa(int(c.number))
	var out []*knftables.Element
	if c.Protocol == policyv1.TCP {
		out = append(out,
			&knftables.Element{Set: pairsSet, Key: []string{from, to}}, &knftables.Element{Set: pairsSet, Key: []string{to, from}})
	}
	switch {
	case c.number == unix.IPPROTO_ICMP: // an answer begins nothing
	case c.Port != 0 || c.source != 0:
		out = append(out, &knftables.Element{
			Set: flowsSet, Key: []string{string(c.Protocol), from, strconv.Itoa(int(c.source)), to, strconv.Itoa(int(c.Port))},
		})
	default:
		out = append(out, &knftables.Element{Set: protocolsSet, Key: []string{number, from, to}})
	}
	return out
}

// heldFlow is the flow of an element of flowsSet or protocolsSet.
func heldFlow(el *knftables.Element) (f Flow, ok bool) {
	k := el.Key
	switch {
	case el.Set == flowsSet && len(k) == 5:
		port, err := strconv.ParseUint(k[4], 10, 16)
		if err != nil {
			return f, false
		}
		f.Port = uint16(port)
		k = []string{k[0], k[1], k[3]}
	case el.Set == protocolsSet && len(k) == 3:
	default:
		return f, false
	}
	switch p := policyv1.Protocol(k[0]); p {
	case policyv1.TCP, policyv1.UDP, policyv1.SCTP:
		f.Protocol = p
	}
	var err, err2 error
	f.From, err = netip.ParseAddr(k[1])
	f.To, err2 = netip.ParseAddr(k[2])
	return f, err == nil && err2 == nil
}

// finder looks for connections that are not allowed.
type finder struct {
	state *policyv1.State
	gone  map[netip.Addr]bool
	local map[netip.Addr]bool // of the host
	// subnet is where pods of this host are: an address in it that is nobody's was that of a pod.
	subnet netip.Prefix
	held   bool
	// found are to be cut, those of pods that are gone with false: nobody is kept from beginning them.
	found map[connection]bool
}

// look judges one connection.
func (f *finder) look(c connection) {
	switch {
	case f.left(c.From) || f.left(c.To) || f.left(c.original):
		f.found[c] = false
	case !f.local[c.From] && !Allowed(f.state, c.Flow):
		f.found[c] = true
	}
}

// left tells whether an address was that of a pod that is gone.
func (f *finder) left(a netip.Addr) bool {
	return f.gone[a] || f.subnet.Contains(a) && f.state.Pods[a] == nil && !f.local[a]
}

// MatchConntrackFlow is called for each entry of the kernel's table that may be deleted.
func (f *finder) MatchConntrackFlow(k *netlink.ConntrackFlow) bool {
	_, ok := f.found[connectionOf(k)]
	return ok
}

// Cut ends the connections of pods that the state applied last does not allow, and forgets those of pods that are gone,
// whose addresses others get. Who may not begin a connection cannot go on with it by way of answers to the other, nor
// either peer of one over TCP by sending in its middle, until it is allowed again.
// It returns how many entries of the kernel's table it removed.
//
// The kernel's table may be long: it is read without the lock, so that Apply need not wait. What is applied meanwhile
// holds for what was found; what it denies in addition is for the next call.
func (e *Engine) Cut(ctx context.Context) (n int, err error) {
	f := e.finder()
	if f == nil {
		return 0, nil
	}
	defer func() {
		if err != nil {
			e.mu.Lock()
			maps.Copy(e.gone, f.gone)
			e.mu.Unlock()
		}
	}()
	if f.local, err = hostAddresses(); err != nil {
		return 0, err
	}
	var held []*knftables.Element
	if f.held {
		if held, err = e.listHeld(ctx); err != nil {
			return 0, err
		}
	}
	entries, err := e.connections()
	if err != nil {
		return 0, fmt.Errorf("listing connections: %w", err)
	}
	for _, k := range entries {
		f.look(connectionOf(k))
	}
	if err := e.hold(ctx, f, held); err != nil {
		return 0, fmt.Errorf("cutting connections: %w", err)
	}
	if len(f.found) == 0 {
		return 0, nil
	}
	removed, err := e.remove(f)
	if err != nil {
		return int(removed), fmt.Errorf("cutting connections: %w", err)
	}
	return int(removed), nil
}

// finder begins a search, nil before there is a state. Addresses that have changed hands are its from now on.
func (e *Engine) finder() *finder {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state == nil || e.nft == nil {
		return nil
	}
	f := &finder{state: e.state, gone: e.gone, subnet: e.cfg.Network.Subnet, held: e.held, found: map[connection]bool{}}
	e.gone = map[netip.Addr]bool{}
	return f
}

// listHeld lists what was cut before.
func (e *Engine) listHeld(ctx context.Context) ([]*knftables.Element, error) {
	var out []*knftables.Element
	for _, set := range []string{flowsSet, protocolsSet} {
		list, err := e.cuts.ListElements(ctx, "set", set)
		if err != nil {
			return nil, fmt.Errorf("listing connections that were cut: %w", err)
		}
		out = append(out, list...)
	}
	return out, nil
}

// hold keeps the connections that were found from going on, and lets those of before that are allowed by now. Both
// are judged by the state that is applied by now.
func (e *Engine) hold(ctx context.Context, f *finder, held []*knftables.Element) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	f.state = e.state
	tx := e.cuts.NewTransaction()
	kept := 0
	for _, el := range held {
		if flow, ok := heldFlow(el); ok && !f.left(flow.From) && !f.left(flow.To) && !Allowed(f.state, flow) {
			kept++
			continue
		}
		tx.Add(el) // its time may be over by now
		tx.Delete(el)
	}
	for c, forbidden := range f.found {
		if !forbidden {
			continue
		}
		if Allowed(f.state, c.Flow) {
			delete(f.found, c)
			continue
		}
		for _, el := range c.elements() {
			tx.Add(el)
			tx.Delete(el) // the time of one that is there does not begin again
			tx.Add(el)
			kept++
		}
	}
	if tx.NumOperations() > 0 {
		if err := e.cuts.Run(ctx, tx); err != nil {
			return err
		}
	}
	e.held = kept > 0
	return nil
}

// connections lists the kernel's table.
func connections() ([]*netlink.ConntrackFlow, error) {
	list, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		err = nil
	}
	return list, err
}

// remove deletes entries of the kernel's table.
func remove(f netlink.CustomConntrackFilter) (uint, error) {
	return netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, f)
}
