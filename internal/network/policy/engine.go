package policy

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"sigs.k8s.io/knftables"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/network/cniconf"
)

// Config of an engine.
type Config struct {
	// Network is the pod network; its bridge gives the table its name.
	Network cniconf.Network
	Logger  *slog.Logger // slog.Default when nil
}

// Engine enforces one State at a time. Its methods may be called from several goroutines.
type Engine struct {
	cfg   Config
	table string

	// connections and remove are of the kernel's table of connections.
	connections func() ([]*netlink.ConntrackFlow, error)
	remove      func(netlink.CustomConntrackFilter) (uint, error)
	addresses   func() (map[netip.Addr]bool, error) // of the host

	cutting sync.Mutex // of one Cut at a time, guards owed
	// owed are holds that could not be written.
	owed []hold

	mu     sync.Mutex // guards the rest and the tables
	nft    knftables.Interface
	cuts   knftables.Interface // of the table of connections that were cut
	limits []string
	render *renderer
	// have is what the table holds, nil when that is not known; mark is the set that says that it was made by this
	// engine.
	have *table
	mark string
	// state was applied last. It is never written to.
	state *policyv1.State
	// gone are addresses that have changed hands since connections were looked at.
	gone map[netip.Addr]bool
	// held are the sets of answers that may have elements.
	held map[string]bool
}

// TableName is the name of the table of a pod network.
func TableName(n cniconf.Network) string { return nameOf("atoll-policy", n) }

// CutTableName is the name of the table of a pod network's connections that were cut.
func CutTableName(n cniconf.Network) string { return nameOf("atoll-cut", n) }

func nameOf(table string, n cniconf.Network) string {
	if n.Bridge == "" || n.Bridge == cniconf.DefaultBridge {
		return table
	}
	return table + "-" + n.Bridge
}

// New checks the configuration.
func New(cfg Config) (*Engine, error) {
	n, err := cfg.Network.Complete()
	if err != nil {
		return nil, fmt.Errorf("network policies: %w", err)
	}
	cfg.Network = n
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	held := map[string]bool{}
	for _, s := range answerSets() {
		held[s.name] = true
	}
	return &Engine{
		cfg: cfg, table: TableName(n), connections: connections, remove: remove, addresses: hostAddresses,
		render: &renderer{}, gone: map[netip.Addr]bool{}, held: held,
	}, nil
}

// open finds nft and what the kernel can do, once. The lock is held.
func (e *Engine) open(ctx context.Context) error {
	if e.nft != nil {
		return nil
	}
	nft, err := knftables.New(knftables.InetFamily, e.table)
	if err != nil {
		return fmt.Errorf("opening nftables: %w; install the package nftables, and a kernel with nf_tables", err)
	}
	cuts, err := knftables.New(knftables.InetFamily, CutTableName(e.cfg.Network))
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Add(&knftables.Chain{Name: "probe"})
	tx.Add(&knftables.Rule{Chain: "probe", Rule: fmt.Sprintf("log group %d", LogGroup)})
	e.limits = nil
	e.render.logs = true
	if err := nft.Check(ctx, tx); err != nil {
		e.render.logs = false
		e.limits = append(e.limits, "the kernel has no nfnetlink_log: traffic that is denied is counted (atoll network counters), but not logged")
	}
	if _, err := os.Stat("/proc/sys/net/netfilter/nf_conntrack_sctp_timeout_established"); err != nil {
		e.limits = append(e.limits, "the kernel does not track SCTP connections: answers pass by address only")
	}
	for _, l := range e.limits {
		e.cfg.Logger.Warn("network policies are limited on this host", "limit", l)
	}
	e.nft, e.cuts = nft, cuts
	return nil
}

// Limits says what the kernel of this host cannot do. It is known after the first Prepare or Apply.
func (e *Engine) Limits() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.limits)
}

// Prepare makes the table when there is none, so that no pod has traffic before its rules are known. A table that is
// there is left alone: it goes on enforcing what an earlier process has put into it.
func (e *Engine) Prepare(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	there, err := exists(e.table, "")
	if err != nil || there {
		return err
	}
	if err := e.open(ctx); err != nil {
		return err
	}
	tx := e.nft.NewTransaction()
	tx.Create(&knftables.Table{})
	e.fill(tx, e.render.render(&policyv1.State{}), "")
	if err := e.nft.Run(ctx, tx); err != nil {
		if there, _ := exists(e.table, ""); there {
			return nil // somebody else was faster
		}
		return fmt.Errorf("making the table of network policies: %w", err)
	}
	e.have = nil
	return nil
}

// exists tells whether a table is there, and with a name the set of that name in it.
func exists(table, set string) (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("opening nftables: %w", err)
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("listing nftables tables: %w", err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == table })
	if i < 0 || set == "" {
		return i >= 0, nil
	}
	_, err = conn.GetSetByName(tables[i], set)
	return err == nil, nil
}

// Damaged tells whether the tables are not the ones that Apply has made any more. The next Apply makes them anew.
func (e *Engine) Damaged() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.have == nil {
		return false
	}
	ok, err := exists(e.table, e.mark)
	if err == nil && ok {
		ok, err = exists(CutTableName(e.cfg.Network), flowsSet)
	}
	if err == nil && !ok {
		e.have = nil
	}
	return err == nil && !ok
}

// Apply makes the kernel enforce a state, in one step, writing only what differs from the one before. The first time,
// and after a failure, it writes all of it, still in one step. It reports whether Cut is to be called: something may
// be denied now that was not before, or what was cut before may be allowed. The state is not to be changed after.
func (e *Engine) Apply(ctx context.Context, s *policyv1.State) (cut bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.open(ctx); err != nil {
		return false, err
	}
	want := e.render.render(s)
	full, narrowed := e.have == nil, false
	if !full {
		tx := e.nft.NewTransaction()
		narrowed = e.change(tx, e.have, want)
		if tx.NumOperations() == 0 {
			e.note(s, false)
			return false, nil
		}
		if err := e.nft.Run(ctx, tx); err != nil {
			e.cfg.Logger.Warn("network policies could not be changed and are written anew", "err", err)
			e.have, full = nil, true
		}
	}
	if full {
		narrowed = true
		if err := e.fillCuts(ctx); err != nil {
			return false, err
		}
		mark := "made-" + strings.ToLower(rand.Text()[:10])
		tx := e.nft.NewTransaction()
		tx.Add(&knftables.Table{})
		tx.Delete(&knftables.Table{})
		tx.Add(&knftables.Table{})
		e.fill(tx, want, mark)
		if err := e.nft.Run(ctx, tx); err != nil {
			return false, fmt.Errorf("writing network policies: %w", err)
		}
		e.mark = mark
	}
	e.have = want
	e.note(s, full)
	return narrowed || len(e.held) > 0 || len(e.gone) > 0, nil
}

// note remembers the state and which addresses have changed hands. The lock is held.
func (e *Engine) note(s *policyv1.State, full bool) {
	if e.state != nil && !full {
		for a, old := range e.state.Pods {
			if now := s.Pods[a]; now == nil || now.Interface != old.Interface {
				e.gone[a] = true
			}
		}
	}
	e.state = s
}

// fill writes a whole table.
func (e *Engine) fill(tx *knftables.Transaction, want *table, mark string) {
	e.change(tx, &table{}, want)
	if mark != "" {
		tx.Add(&knftables.Set{Name: mark, Type: addressKind})
	}
	e.base(tx)
}

// change writes what differs between two tables: first what is new, then who refers to it, at last what nobody refers
// to any more. It reports whether anything but additions was among it.
func (e *Engine) change(tx *knftables.Transaction, have, want *table) (narrowed bool) {
	for _, name := range missing(want.counters, have.counters) {
		tx.Add(&knftables.Counter{Name: name, Comment: comment(want.counters[name])})
	}
	for _, name := range missing(want.sets, have.sets) {
		if s := want.sets[name]; s.verdicts {
			tx.Add(&knftables.Map{Name: name, Type: s.kind + " : verdict"})
		} else {
			tx.Add(&knftables.Set{Name: name, Type: s.kind})
		}
	}
	var written []string
	for _, name := range sorted(want.chains) {
		old, there := have.chains[name]
		switch {
		case !there:
			tx.Add(&knftables.Chain{Name: name})
		case slices.Equal(old, want.chains[name]):
			continue
		default:
			tx.Flush(&knftables.Chain{Name: name})
			narrowed = true
		}
		written = append(written, name)
	}
	for _, name := range written {
		for _, rule := range want.chains[name] {
			tx.Add(&knftables.Rule{Chain: name, Rule: rule})
		}
	}
	for _, name := range sorted(want.sets) {
		if old := have.sets[name]; old != want.sets[name] {
			narrowed = elements(tx, name, old, want.sets[name], have.sets[knownSet]) || narrowed
		}
	}
	unused := missing(have.chains, want.chains)
	for _, name := range unused {
		tx.Flush(&knftables.Chain{Name: name})
	}
	for _, name := range unused {
		tx.Delete(&knftables.Chain{Name: name})
	}
	for _, name := range missing(have.sets, want.sets) {
		tx.Delete(&knftables.Set{Name: name}) // maps among others are never deleted
	}
	for _, name := range missing(have.counters, want.counters) {
		tx.Delete(&knftables.Counter{Name: name})
	}
	return narrowed
}

// elements writes the elements of one set that differ, and reports whether that may deny something: an element of a set
// has gone, or a pod that was known has come into a map. A pod that was not has no connections.
func elements(tx *knftables.Transaction, name string, have, want, known *set) (narrowed bool) {
	var old map[string]string
	if have != nil {
		old = have.elements
	}
	element := func(key, verdict string) *knftables.Element {
		out := &knftables.Element{Key: strings.Split(key, " . ")}
		if want.verdicts {
			out.Map, out.Value = name, []string{verdict}
		} else {
			out.Set = name
		}
		return out
	}
	for _, key := range sorted(old) {
		verdict, there := want.elements[key]
		if !there || verdict != old[key] {
			tx.Delete(element(key, old[key]))
			narrowed = true
		}
	}
	for _, key := range sorted(want.elements) {
		verdict, there := old[key]
		if !there || verdict != want.elements[key] {
			tx.Add(element(key, want.elements[key]))
			if want.verdicts && known != nil {
				_, old := known.elements[key]
				narrowed = narrowed || old
			}
		}
	}
	return narrowed
}

// base writes the chains at the hooks.
func (e *Engine) base(tx *knftables.Transaction) {
	tx.Add(&knftables.Counter{Name: SpoofedCounter, Comment: comment("from pods with an address that is not theirs")})
	tx.Add(&knftables.Counter{Name: LinkLocalCounter, Comment: comment("to link-local addresses, such as a cloud's metadata server")})
	tx.Add(&knftables.Counter{Name: UnknownCounter, Comment: comment("to addresses of no pod, or of one without rules yet")})
	for _, c := range e.baseChains() {
		c.add(tx)
	}
}

// Counters that are always there.
const (
	SpoofedCounter   = "denied-spoofed"
	LinkLocalCounter = "denied-link-local"
	UnknownCounter   = "denied-unknown"
	CutCounter       = "denied-cut"
)

type baseChain struct {
	name     string
	hook     knftables.BaseChainHook
	priority knftables.BaseChainPriority
	rules    []string
}

func (c baseChain) add(tx *knftables.Transaction) {
	tx.Add(&knftables.Chain{
		Name: c.name, Type: new(knftables.FilterType), Hook: new(c.hook),
		Priority: new(c.priority), Policy: new(knftables.AcceptPolicy),
	})
	for _, rule := range c.rules {
		tx.Add(&knftables.Rule{Chain: c.name, Rule: rule})
	}
}

// established passes what follows the beginning of a connection.
const established = "ct state established,related accept"

func (e *Engine) baseChains() []baseChain {
	subnet := e.cfg.Network.Subnet.String()
	decide := func(d direction, tier policyv1.Tier) []string {
		return []string{
			established,
			"ip saddr . ip daddr @" + selfSet + " accept",
			d.own() + " vmap @" + mapName(d, tier),
		}
	}
	out := []baseChain{
		{"guard", knftables.PreroutingHook, knftables.RawPriority, []string{
			`iifname != "` + wirePrefix + `*" accept`,
			"meta nfproto ipv6 counter name " + SpoofedCounter + " drop",
			// Nobody routes these (RFC 3927, 7); at one of them a cloud gives its host's credentials. Some have DNS there.
			"ip daddr 169.254.0.0/16 th dport != 53 counter name " + LinkLocalCounter + " drop",
			"iifname . ether saddr . ip saddr @" + wiresSet + " accept",
			"ip saddr " + subnet + " counter name " + SpoofedCounter + " drop",
		}},
		{"silence", knftables.OutputHook, knftables.RawPriority, []string{
			`oifname "` + wirePrefix + `*" meta nfproto ipv6 drop`,
		}},
		{"known", knftables.ForwardHook, knftables.FilterPriority + "-1", []string{
			established,
			`oifname "` + wirePrefix + `*" ip daddr ` + subnet + " ip daddr != @" + knownSet + " counter name " + UnknownCounter + " drop",
		}},
	}
	priority := 0
	for _, d := range []direction{egress, ingress} {
		for _, tier := range tiers() {
			at := knftables.FilterPriority
			if priority > 0 {
				at += knftables.BaseChainPriority(fmt.Sprintf("+%d", priority))
			}
			priority++
			out = append(out, baseChain{mapName(d, tier), knftables.ForwardHook, at, decide(d, tier)})
			if d == egress {
				out = append(out, baseChain{"input-" + string(tier), knftables.InputHook, at, decide(d, tier)})
			}
		}
	}
	return out
}

// comment is what people read beside an object. nft takes up to 128 bytes.
func comment(s string) *string {
	if len(s) > knftables.CommentLengthMax {
		s = s[:knftables.CommentLengthMax]
	}
	return &s
}

// missing are the keys of a that b does not have, sorted.
func missing[V any](a, b map[string]V) []string {
	var out []string
	for k := range a {
		if _, ok := b[k]; !ok {
			out = append(out, k)
		}
	}
	slices.Sort(out)
	return out
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

var errNoTable = errors.New("there is no table of network policies; is atoll running?")

// Counters returns what the table of a pod network has counted, by what it counts: "allowed DIRECTION POLICY" and
// "denied DIRECTION TIER NAMESPACE" with names as the kernel keeps them (hashed) resolved by names.
func Counters(ctx context.Context, n cniconf.Network) (map[string]uint64, error) {
	out := map[string]uint64{}
	for _, table := range []string{TableName(n), CutTableName(n)} {
		nft, err := knftables.New(knftables.InetFamily, table)
		if err != nil {
			return nil, fmt.Errorf("opening nftables: %w", err)
		}
		list, err := nft.ListCounters(ctx)
		switch {
		case knftables.IsNotFound(err) && table == TableName(n):
			return nil, errNoTable
		case err != nil && !knftables.IsNotFound(err):
			return nil, fmt.Errorf("listing counters: %w", err)
		}
		for _, c := range list {
			if c.Packets != nil {
				out[c.Name] = *c.Packets
			}
		}
	}
	return out, nil
}

// Labels says what the counters of the state that was applied last count.
func (e *Engine) Labels() map[string]string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.have == nil {
		return nil
	}
	out := maps.Clone(e.have.counters)
	return out
}
