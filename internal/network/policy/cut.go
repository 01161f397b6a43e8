package policy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// cutChains are the chains of the table at the hooks. What the host sends is looked at for connections over TCP only, that
// it would take up in the middle.
func cutChains() []baseChain {
	taken := func(key, set string) string {
		return "ct state new tcp flags & (fin | syn | rst | ack) != syn " + key + " @" + set + " counter name " + CutCounter + " drop"
	}
	middle := []string{
		established,
		taken("ip saddr . ip daddr", pairsSet), taken("ip daddr . ip saddr", pairsSet),
		taken("ip saddr", looseSet), taken("ip daddr", looseSet),
	}
	all := append([]string{"ct direction reply meta l4proto != { tcp, icmp } jump " + answersChain}, middle...)
	return []baseChain{
		{"forward", knftables.ForwardHook, knftables.FilterPriority + "-1", all},
		{"input", knftables.InputHook, knftables.FilterPriority + "-1", all},
		{"output", knftables.OutputHook, knftables.FilterPriority + "-1", middle},
	}
}

// answersChain is where answers go, but those over TCP, which pairsSet keeps from being any.
const answersChain = "answers"

func answerRules() (out []string) {
	for _, s := range answerSets() {
		rule := s.match() + " @" + s.name
		if s.prolonged {
			rule += " update @" + s.name + " { " + s.match() + " }"
		}
		out = append(out, rule+" counter name "+CutCounter+" drop")
	}
	return out
}

// fillCuts makes the table of connections that were cut, or what is missing of it. It is a table of its own so that it
// outlives the table of policies, which is written anew when the agent starts. The lock is held.
func (e *Engine) fillCuts(ctx context.Context) error {
	fill := func(tx *knftables.Transaction) error {
		tx.Add(&knftables.Table{})
		tx.Add(&knftables.Counter{Name: CutCounter, Comment: comment("of connections that were cut")})
		for _, s := range cutSets() {
			tx.Add(s.object())
		}
		// The chains may be there with rules of an earlier version.
		tx.Add(&knftables.Chain{Name: answersChain})
		tx.Flush(&knftables.Chain{Name: answersChain})
		for _, rule := range answerRules() {
			tx.Add(&knftables.Rule{Chain: answersChain, Rule: rule})
		}
		for _, c := range cutChains() {
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

// finder looks for connections that are not allowed.
type finder struct {
	state *policyv1.State
	gone  map[netip.Addr]bool
	local map[netip.Addr]bool // of the host
	// subnet is where pods of this host are: an address in it that is nobody's was that of a pod.
	subnet netip.Prefix
	// held are the sets that may have elements.
	held map[string]bool
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

// judge forgets what was found and is allowed by a state.
func (f *finder) judge(s *policyv1.State) {
	f.state = s
	for c, forbidden := range f.found {
		if forbidden && Allowed(s, c.Flow) {
			delete(f.found, c)
		}
	}
}

// keeps tells whether a connection is to be held on.
func (f *finder) keeps(h hold) bool {
	if h.from.IsValid() && f.left(h.from) || h.to.IsValid() && f.left(h.to) {
		return false
	}
	flow, ok := h.flow()
	return !ok || !Allowed(f.state, flow)
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
// holds for what was found; what it denies in addition is for the next call. Entries are removed also when their
// connections cannot be held, which the next call tries again.
func (e *Engine) Cut(ctx context.Context) (int, error) {
	e.cutting.Lock()
	defer e.cutting.Unlock()
	f := e.finder()
	if f == nil {
		return 0, nil
	}
	n, removed, err := e.cut(ctx, f)
	if !removed {
		e.mu.Lock()
		maps.Copy(e.gone, f.gone)
		e.mu.Unlock()
	}
	if err != nil {
		return n, fmt.Errorf("cutting connections: %w", err)
	}
	return n, nil
}

// cut also tells whether all entries that were to be removed have been.
func (e *Engine) cut(ctx context.Context, f *finder) (n int, removed bool, err error) {
	if f.local, err = e.addresses(); err != nil {
		return 0, false, err
	}
	entries, err := e.connections()
	if err != nil {
		return 0, false, fmt.Errorf("listing connections: %w", err)
	}
	for _, k := range entries {
		f.look(connectionOf(k))
	}
	f.judge(e.now())
	err = e.hold(ctx, f)
	if s := e.now(); s != f.state {
		f.judge(s)
	}
	if len(f.found) == 0 {
		return 0, true, err
	}
	count, err2 := e.remove(f)
	return int(count), err2 == nil, errors.Join(err, err2)
}

// now is the state that was applied last.
func (e *Engine) now() *policyv1.State {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

// finder begins a search, nil before there is a state. Addresses that have changed hands are its from now on.
func (e *Engine) finder() *finder {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state == nil || e.nft == nil {
		return nil
	}
	f := &finder{state: e.state, gone: e.gone, subnet: e.cfg.Network.Subnet, held: maps.Clone(e.held), found: map[connection]bool{}}
	e.gone = map[netip.Addr]bool{}
	return f
}

// listHeld lists what was cut before. Pairs matter when there are more.
func (e *Engine) listHeld(ctx context.Context, f *finder) (out []hold, err error) {
	sets := maps.Clone(f.held)
	for c, forbidden := range f.found {
		if forbidden && c.Protocol == policyv1.TCP {
			sets[pairsSet] = true
			break
		}
	}
	for set := range sets {
		list, err := e.cuts.ListElements(ctx, "set", set)
		if err != nil {
			return nil, fmt.Errorf("listing connections that were cut: %w", err)
		}
		for _, el := range list {
			if h, ok := holdOf(el); ok {
				out = append(out, h)
			}
		}
	}
	return out, nil
}

// change is a hold that begins or ends.
type change struct {
	hold
	ends bool
}

// hold keeps the connections that were found from going on, and lets those of before that are allowed by now.
func (e *Engine) hold(ctx context.Context, f *finder) error {
	held, failed := e.listHeld(ctx, f)
	kept := map[string]bool{}
	var changes []change
	for _, h := range held {
		switch {
		case h.set == pairsSet:
		case f.keeps(h):
			kept[h.set] = true
		default:
			changes = append(changes, change{h, true})
		}
	}
	for _, h := range f.plan(held, e.owed) {
		changes = append(changes, change{h, false})
	}
	e.owed = nil
	for batch := range slices.Chunk(changes, batchMost) {
		if err := e.write(ctx, f, batch, kept); err != nil {
			failed = errors.Join(failed, err)
			for _, c := range batch {
				if !c.ends {
					e.owed = append(e.owed, c.hold)
				}
				kept[c.set] = true
			}
		}
	}
	if failed != nil {
		return failed
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for set := range f.held {
		if !kept[set] {
			delete(e.held, set)
		}
	}
	return nil
}

// write makes some changes. They are judged by the state that is applied by now.
func (e *Engine) write(ctx context.Context, f *finder, batch []change, kept map[string]bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	judged := *f
	judged.state = e.state
	tx := e.cuts.NewTransaction()
	for _, c := range batch {
		keeps, el := judged.keeps(c.hold), c.element()
		if keeps && c.set != pairsSet && c.set != looseSet {
			kept[c.set], e.held[c.set] = true, true
		}
		if keeps == c.ends {
			continue
		}
		tx.Add(el) // the time of one that is there may be over by now, and does not begin again
		tx.Delete(el)
		if keeps {
			tx.Add(el)
		}
	}
	if tx.NumOperations() == 0 {
		return nil
	}
	return e.cuts.Run(ctx, tx)
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
