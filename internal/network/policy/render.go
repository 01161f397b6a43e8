package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// table is the content of the nftables table.
type table struct {
	counters map[string]string // by name: what it counts, for people
	sets     map[string]*set
	chains   map[string][]string // rules of chains that are no base chains
}

// set is a set or, with verdicts, a map.
type set struct {
	kind     string
	verdicts bool
	elements map[string]string // by key; the verdict
}

// direction of traffic as seen from the pod.
type direction string

const (
	ingress direction = "ingress"
	egress  direction = "egress"
)

// peer is the address of the other end in a rule, own that of the pod.
func (d direction) peer() string {
	if d == ingress {
		return "ip saddr"
	}
	return "ip daddr"
}

func (d direction) own() string {
	if d == ingress {
		return "ip daddr"
	}
	return "ip saddr"
}

func (d direction) of(p *policyv1.Policy) *policyv1.Direction {
	if d == ingress {
		return p.Ingress
	}
	return p.Egress
}

func directions() []direction { return []direction{ingress, egress} }

func tiers() []policyv1.Tier {
	return []policyv1.Tier{policyv1.TierAdministrator, policyv1.TierOwner}
}

// Names of sets and maps that are always there.
const (
	wiresSet = "wires"
	knownSet = "known"
	selfSet  = "self"
)

const (
	addressKind  = "ipv4_addr"
	endpointKind = "ipv4_addr . inet_proto . inet_service"
	pairKind     = "ipv4_addr . ipv4_addr"
	wireKind     = "ifname . ether_addr . ipv4_addr"
)

// hash makes a name of fixed length out of one of any length.
func hash(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:8])
}

// renderer keeps what was rendered before, by what it was rendered from.
type renderer struct {
	logs     bool
	sets     map[*policyv1.Set]*set
	policies map[*policyv1.Policy]map[direction][]string
}

// render makes the table of a state.
func (r *renderer) render(s *policyv1.State) *table {
	t := &table{counters: map[string]string{}, sets: map[string]*set{}, chains: map[string][]string{}}
	sets := map[*policyv1.Set]*set{}
	for id, from := range s.Sets {
		to := r.sets[from]
		if to == nil {
			to = renderSet(from)
		}
		sets[from] = to
		t.sets[setName(id)] = to
	}
	r.sets = sets
	policies := map[*policyv1.Policy]map[direction][]string{}
	for _, p := range s.Policies {
		rules := r.policies[p]
		if rules == nil {
			rules = map[direction][]string{}
			for _, d := range directions() {
				if part := d.of(p); part != nil {
					rules[d] = renderRules(p, d, part.Rules)
				}
			}
		}
		policies[p] = rules
		for d, chain := range rules {
			t.chains[policyChain(p.ID, d)] = chain
			t.counters[policyCounter(p.ID, d)] = "allowed " + string(d) + " " + p.ID
		}
	}
	r.policies = policies
	r.pods(t, s)
	return t
}

// setName tells the two kinds apart for people who list the table.
func setName(id string) string { return "s-" + hash(id) }

func policyChain(id string, d direction) string { return "p-" + string(d) + "-" + hash(id) }

func policyCounter(id string, d direction) string { return "allowed-" + string(d) + "-" + hash(id) }

func mapName(d direction, tier policyv1.Tier) string { return string(d) + "-" + string(tier) }

func renderSet(from *policyv1.Set) *set {
	out := &set{kind: addressKind, elements: make(map[string]string, len(from.Addresses)+len(from.Endpoints))}
	for _, a := range from.Addresses {
		out.elements[a.String()] = ""
	}
	if from.Endpoints != nil {
		out.kind = endpointKind
	}
	for _, e := range from.Endpoints {
		out.elements[fmt.Sprintf("%s . %s . %d", e.Address, e.Protocol, e.Port)] = ""
	}
	return out
}

// pods puts pods into the maps and makes the chains of their groups.
func (r *renderer) pods(t *table, s *policyv1.State) {
	wires := &set{kind: wireKind, elements: map[string]string{}}
	known := &set{kind: addressKind, elements: map[string]string{}}
	self := &set{kind: pairKind, elements: map[string]string{}}
	t.sets[wiresSet], t.sets[knownSet], t.sets[selfSet] = wires, known, self
	for _, d := range directions() {
		for _, tier := range tiers() {
			t.sets[mapName(d, tier)] = &set{kind: addressKind, verdicts: true, elements: map[string]string{}}
		}
	}
	for a, p := range s.Pods {
		address := a.String()
		wires.elements[fmt.Sprintf("%s . %s . %s", p.Interface, p.MAC, address)] = ""
		known.elements[address] = ""
		self.elements[address+" . "+address] = ""
		for _, d := range directions() {
			for _, tier := range tiers() {
				if chain := r.group(t, s, p, d, tier); chain != "" {
					t.sets[mapName(d, tier)].elements[address] = "goto " + chain
				}
			}
		}
	}
}

// group makes the chain of the pods that have the same policies as this one, and returns its name; "" for a pod that
// is not isolated in this direction and tier.
func (r *renderer) group(t *table, s *policyv1.State, pod *policyv1.Pod, d direction, tier policyv1.Tier) string {
	ids := selecting(s, pod, d, tier)
	if len(ids) == 0 {
		return ""
	}
	name := "g-" + string(d) + "-" + hash(append([]string{string(tier)}, ids...)...)
	if _, ok := t.chains[name]; ok {
		return name
	}
	rules := make([]string, 0, len(ids)+1)
	for _, id := range ids {
		rules = append(rules, "jump "+policyChain(id, d))
	}
	namespace := policyv1.NamespaceOf(pod.Name)
	deny := "d-" + string(d) + "-" + hash(string(tier), namespace)
	t.chains[name] = append(rules, "goto "+deny)
	counter := deniedCounter(namespace, d, tier)
	t.counters[counter] = fmt.Sprintf("denied %s %s %s", d, tier, namespace)
	t.chains[deny] = r.deny(counter, Prefix{Ingress: d == ingress, Tier: tier, Namespace: namespace})
	return name
}

func deniedCounter(namespace string, d direction, tier policyv1.Tier) string {
	return "denied-" + string(d) + "-" + hash(string(tier), namespace)
}

// deny is the rules that end a packet. What does not belong to a connection is not worth a line in a log.
func (r *renderer) deny(counter string, p Prefix) []string {
	rules := []string{"ct state invalid drop", "counter name " + counter}
	if r.logs {
		rules = append(rules, fmt.Sprintf("limit rate %d/second burst %d packets log prefix %q group %d snaplen %d", logRate, logBurst, p.String(), LogGroup, logBytes))
	}
	return append(rules, "drop")
}

// selecting returns the policies that isolate a pod in a direction and tier.
func selecting(s *policyv1.State, pod *policyv1.Pod, d direction, tier policyv1.Tier) []string {
	var out []string
	for _, id := range pod.Policies {
		if p := s.Policies[id]; p != nil && p.Tier == tier && d.of(p) != nil {
			out = append(out, id)
		}
	}
	return out
}

// renderRules makes the rules of a policy's chain. Each accepts, which ends the base chain.
func renderRules(p *policyv1.Policy, d direction, rules []policyv1.Rule) []string {
	verdict := "counter name " + policyCounter(p.ID, d) + " accept"
	out := []string{}
	for _, r := range rules {
		for _, peer := range peers(r, d) {
			for _, port := range ports(r) {
				out = append(out, strings.TrimLeft(peer+port+verdict, " "))
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func peers(r policyv1.Rule, d direction) []string {
	if r.AnyPeer {
		return []string{""}
	}
	var out []string
	for _, id := range r.Peers {
		out = append(out, d.peer()+" @"+setName(id)+" ")
	}
	if spans := blockSpans(r.Blocks); len(spans) > 0 {
		out = append(out, d.peer()+" "+anonymous(spans, span.text)+" ")
	}
	return out
}

func ports(r policyv1.Rule) []string {
	if r.AnyPort {
		return []string{""}
	}
	var out []string
	for _, p := range []policyv1.Protocol{policyv1.TCP, policyv1.UDP, policyv1.SCTP} {
		spans := portSpans(r.Ports, p)
		switch {
		case len(spans) == 0:
		case spans[0] == span{0, 65535}:
			out = append(out, "meta l4proto "+string(p)+" ")
		default:
			out = append(out, string(p)+" dport "+anonymous(spans, span.portText)+" ")
		}
	}
	for _, id := range r.Named {
		out = append(out, "ip daddr . meta l4proto . th dport @"+setName(id)+" ")
	}
	return out
}

// anonymous is a set that is written where it is used.
func anonymous(spans []span, text func(span) string) string {
	parts := make([]string, len(spans))
	for i, s := range spans {
		parts[i] = text(s)
	}
	return "{ " + strings.Join(parts, ", ") + " }"
}
