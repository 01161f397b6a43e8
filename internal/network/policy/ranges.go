package policy

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// span is numbers from first to last: IPv4 addresses or ports.
type span struct{ first, last uint32 }

// merge sorts spans and joins those that touch.
func merge(in []span) []span {
	slices.SortFunc(in, func(a, b span) int { return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.last, b.last)) })
	var out []span
	for _, s := range in {
		if n := len(out); n > 0 && uint64(s.first) <= uint64(out[n-1].last)+1 {
			out[n-1].last = max(out[n-1].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// without cuts merged spans out of one.
func without(whole span, parts []span) []span {
	var out []span
	next := uint64(whole.first)
	for _, p := range parts {
		if uint64(p.last) < next || p.first > whole.last {
			continue
		}
		if uint64(p.first) > next {
			out = append(out, span{uint32(next), p.first - 1})
		}
		next = uint64(p.last) + 1
	}
	if next <= uint64(whole.last) {
		out = append(out, span{uint32(next), whole.last})
	}
	return out
}

// spanOf is the addresses of an IPv4 network; ok is false for others.
func spanOf(p netip.Prefix) (s span, ok bool) {
	if !p.IsValid() || !p.Addr().Is4() {
		return span{}, false
	}
	s.first = number(p.Masked().Addr())
	s.last = s.first | uint32(uint64(1)<<(32-p.Bits())-1)
	return s, true
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func addressOf(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// blockSpans is all addresses of any of the blocks, as few spans as possible. An exception only holds for its own block.
func blockSpans(blocks []policyv1.Block) []span {
	var all []span
	for _, b := range blocks {
		whole, ok := spanOf(b.CIDR)
		if !ok {
			continue
		}
		var except []span
		for _, e := range b.Except {
			if s, ok := spanOf(e); ok {
				except = append(except, s)
			}
		}
		all = append(all, without(whole, merge(except))...)
	}
	return merge(all)
}

// text is a span of addresses as nft reads it.
func (s span) text() string {
	size := uint64(s.last) - uint64(s.first) + 1
	switch {
	case size == 1:
		return addressOf(s.first).String()
	case size&(size-1) == 0 && uint64(s.first)%size == 0:
		bits := 32
		for ; size > 1; size /= 2 {
			bits--
		}
		return netip.PrefixFrom(addressOf(s.first), bits).String()
	}
	return addressOf(s.first).String() + "-" + addressOf(s.last).String()
}

// portSpans is the ports of one protocol.
func portSpans(ports []policyv1.PortRange, p policyv1.Protocol) []span {
	var out []span
	for _, r := range ports {
		if r.Protocol == p && r.First <= r.Last {
			out = append(out, span{uint32(r.First), uint32(r.Last)})
		}
	}
	return merge(out)
}

func (s span) portText() string {
	if s.first == s.last {
		return fmt.Sprint(s.first)
	}
	return fmt.Sprintf("%d-%d", s.first, s.last)
}
