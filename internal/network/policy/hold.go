package policy

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// Sets of the table of connections that were cut, from the narrowest to the widest.
const (
	// flowsSet are connections whose peer may not begin any more what the other may: it has no answers in them.
	flowsSet = "flows"
	// portsSet are the same whatever the port of who may not begin, protocolsSet those of protocols without ports.
	portsSet     = "ports"
	protocolsSet = "protocols"
	// peersSet are addresses of which one does not answer the other over a protocol.
	peersSet = "peers"
	// sendersSet and receiversSet are a pod and a port at its peers or at itself: it does not answer to that port, and is
	// not answered there.
	sendersSet   = "senders"
	receiversSet = "receivers"
	// silentSet are pods that answer nobody over UDP and the like, deafSet those that nobody answers.
	silentSet = "silent"
	deafSet   = "deaf"
	// pairsSet are addresses between which a connection over TCP was cut, looseSet pods that have too many of them.
	pairsSet = "pairs"
	looseSet = "loose"
)

const (
	// flowFor is how long a peer must have been silent to be one who answers.
	flowFor = 10 * time.Minute
	// wideFor is how long an element holds that answers which are allowed do not prolong, and how long a TCP connection
	// cannot be taken up in the middle. A peer that has not sent for so long has given up by itself.
	wideFor = time.Hour
	// cutMost are the elements of a set, which costs nothing before they are there. ownMost keeps it from being full.
	cutMost = 1 << 20
)

const (
	// pairMost are the elements that one address has for another and a protocol, before wider ones take their place.
	pairMost = 64
	// ownMost are those of one pod in narrow sets. It has as many again in all others together, then one that is for all.
	ownMost = 512
	// portsMost are the ports of one pod in sendersSet or receiversSet: addresses may be fewer.
	portsMost = 128
	// batchMost are the elements of one transaction, between which others may write.
	batchMost = 1000
)

// cutSet is a set with the parts of its key: p is the protocol, f and t are the addresses, s and d the ports of who
// may not begin and of its peer.
type cutSet struct {
	name, fields string
	// prolonged by packets, which count as sent
	prolonged bool
}

// answerSets are those of answers that are dropped.
func answerSets() []cutSet {
	return []cutSet{
		{flowsSet, "pfstd", true},
		{portsSet, "pftd", true},
		{protocolsSet, "pft", true},
		{peersSet, "pft", false},
		{sendersSet, "pfd", false},
		{receiversSet, "ptd", false},
		{silentSet, "f", false},
		{deafSet, "t", false},
	}
}

func cutSets() []cutSet {
	return append(answerSets(), cutSet{pairsSet, "ft", false}, cutSet{looseSet, "f", false})
}

// concat joins what nft calls the parts of the key.
func (s cutSet) concat(protocol, from, source, to, port string) string {
	var out []string
	for _, f := range s.fields {
		out = append(out, map[rune]string{'p': protocol, 'f': from, 's': source, 't': to, 'd': port}[f])
	}
	return strings.Join(out, " . ")
}

func (s cutSet) kind() string {
	return s.concat("inet_proto", addressKind, "inet_service", addressKind, "inet_service")
}

func (s cutSet) match() string {
	return s.concat("meta l4proto", "ip saddr", "th sport", "ip daddr", "th dport")
}

func (s cutSet) object() *knftables.Set {
	out := &knftables.Set{Name: s.name, Type: s.kind(), Timeout: new(wideFor)}
	if s.prolonged {
		out.Timeout, out.Size = new(flowFor), new(uint64(cutMost))
		out.Flags = []knftables.SetFlag{knftables.DynamicFlag, knftables.TimeoutFlag}
	}
	return out
}

// hold is an element of one of the sets. What the set has no part for is zero.
type hold struct {
	set, protocol string
	from, to      netip.Addr
	source, port  uint16
}

// holds keep a connection from going on.
func (c connection) holds() []hold {
	switch {
	case c.Protocol == policyv1.TCP:
		return []hold{{set: pairsSet, from: c.From, to: c.To}}
	case c.number == unix.IPPROTO_ICMP: // an answer begins nothing
		return nil
	case c.Port == 0 && c.source == 0: // nor are those of SCTP known
		return []hold{{set: protocolsSet, protocol: strconv.Itoa(int(c.number)), from: c.From, to: c.To}}
	}
	return []hold{{set: flowsSet, protocol: string(c.Protocol), from: c.From, to: c.To, source: c.source, port: c.Port}}
}

func fieldsOf(set string) string {
	for _, s := range cutSets() {
		if s.name == set {
			return s.fields
		}
	}
	return ""
}

func (h hold) element() *knftables.Element {
	out := &knftables.Element{Set: h.set}
	for _, f := range fieldsOf(h.set) {
		part := h.protocol
		switch f {
		case 'f':
			part = h.from.String()
		case 't':
			part = h.to.String()
		case 's':
			part = strconv.Itoa(int(h.source))
		case 'd':
			part = strconv.Itoa(int(h.port))
		}
		out.Key = append(out.Key, part)
	}
	return out
}

// holdOf reads an element.
func holdOf(el *knftables.Element) (h hold, ok bool) {
	fields := fieldsOf(el.Set)
	if len(fields) != len(el.Key) {
		return h, false
	}
	h.set = el.Set
	port := func(s string) uint16 {
		n, err := strconv.ParseUint(s, 10, 16)
		ok = ok && err == nil
		return uint16(n)
	}
	address := func(s string) netip.Addr {
		a, err := netip.ParseAddr(s)
		ok = ok && err == nil
		return a
	}
	ok = true
	for i, f := range fields {
		switch part := el.Key[i]; f {
		case 'p':
			h.protocol = part
		case 'f':
			h.from = address(part)
		case 't':
			h.to = address(part)
		case 's':
			h.source = port(part)
		case 'd':
			h.port = port(part)
		}
	}
	return h, ok
}

// flow is what the policies must allow for a hold to end, false when they are not asked: one that is for several
// addresses ends with its time.
func (h hold) flow() (f Flow, ok bool) {
	switch h.set {
	case flowsSet, portsSet, protocolsSet, peersSet:
	default:
		return f, false
	}
	f = Flow{From: h.from, To: h.to, Port: h.port}
	switch p := policyv1.Protocol(h.protocol); p {
	case policyv1.TCP, policyv1.UDP, policyv1.SCTP:
		f.Protocol = p
	}
	return f, true
}

// narrow are holds that wider ones can take the place of because of their ports.
func (h hold) narrow() bool { return h.set == flowsSet || h.set == portsSet }

// anySource is for all ports of who may not begin.
func (h hold) anySource() hold {
	h.set, h.source = portsSet, 0
	return h
}

// anyPort is for all ports.
func (h hold) anyPort() hold {
	h.set, h.source, h.port = peersSet, 0, 0
	return h
}

// owner is the hold that is for all of the pod which has to answer for this one: the one that began the connection when
// it is of this host, else the one whose policies do not allow it.
func (f *finder) owner(h hold) hold {
	if h.from.IsValid() && (f.state.Pods[h.from] != nil || !h.to.IsValid()) {
		return hold{set: silentSet, from: h.from}
	}
	return hold{set: deafSet, to: h.to}
}

// plan chooses what keeps the connections that were found from going on, beside what is held already, and what could not
// be written before. Who has many connections gets wider holds: nobody fills a set that is for all pods of the host.
func (f *finder) plan(held, owed []hold) []hold {
	want := map[hold]bool{}
	for _, h := range owed {
		want[h] = true
	}
	for c, forbidden := range f.found {
		if forbidden {
			for _, h := range c.holds() {
				want[h] = true
			}
		}
	}
	want = widen(want, hold.anySource)
	want = widen(want, hold.anyPort)
	few, all, pairs := map[hold]int{}, map[hold]int{}, map[hold]int{} // by owner
	for _, h := range held {
		owner := f.owner(h)
		switch h.set {
		case pairsSet:
			pairs[owner]++
		case silentSet, deafSet, looseSet:
		case sendersSet, receiversSet:
			all[owner]++
		default:
			few[owner]++
			all[owner]++
		}
	}
	var out []hold
	owned, paired := map[hold][]hold{}, map[hold][]hold{}
	for h := range want {
		switch owner := f.owner(h); h.set {
		case pairsSet:
			paired[owner] = append(paired[owner], h)
		case silentSet, deafSet, looseSet:
			out = append(out, h)
		default:
			owned[owner] = append(owned[owner], h)
		}
	}
	for owner, list := range owned {
		if few[owner]+len(list) > ownMost {
			list = widest(list, owner.set)
		}
		if all[owner]+len(list) > 2*ownMost {
			list = []hold{owner}
		}
		out = append(out, list...)
	}
	for owner, list := range paired {
		if pairs[owner]+len(list) > ownMost {
			list = []hold{{set: looseSet, from: owner.from}}
			if owner.set == deafSet {
				list[0].from = owner.to
			}
		}
		out = append(out, list...)
	}
	return out
}

// widen has wider holds take the place of those of one address for another that are too many.
func widen(want map[hold]bool, wider func(hold) hold) map[hold]bool {
	count := map[hold]int{}
	for h := range want {
		if h.narrow() {
			count[h.anyPort()]++
		}
	}
	out := map[hold]bool{}
	for h := range want {
		if h.narrow() && count[h.anyPort()] > pairMost {
			h = wider(h)
		}
		out[h] = true
	}
	return out
}

// widest are holds of one pod that take the place of those with ports: one for each port, or for each peer when these
// are fewer and the ports many. Those for ports stand in the way of least.
func widest(list []hold, owner string) []hold {
	ports, peers := map[hold]bool{}, map[hold]bool{}
	for _, h := range list {
		if !h.narrow() {
			ports[h], peers[h] = true, true
			continue
		}
		peers[h.anyPort()] = true
		if owner == silentSet {
			ports[hold{set: sendersSet, protocol: h.protocol, from: h.from, port: h.port}] = true
		} else {
			ports[hold{set: receiversSet, protocol: h.protocol, to: h.to, port: h.port}] = true
		}
	}
	if len(ports) > portsMost && len(peers) < len(ports) {
		ports = peers
	}
	return slices.Collect(maps.Keys(ports))
}
