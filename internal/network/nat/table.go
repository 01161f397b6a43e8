package nat

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/network/lease"
)

// table holds the objects of the nftables table that have names.
type table struct {
	table *nftables.Table
	// ports leads protocol and port to a pod; addressPorts also matches the
	// host's address.
	ports, addressPorts *nftables.Set
	// hairpin holds each pod with hostPorts as source and destination.
	hairpin *nftables.Set
}

func newTable(name string) *table {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: name}
	target := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	return &table{
		table: t,
		ports: &nftables.Set{
			Table: t, Name: "host-ports", IsMap: true, Concatenation: true, DataType: target,
			KeyType: nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService),
		},
		addressPorts: &nftables.Set{
			Table: t, Name: "host-address-ports", IsMap: true, Concatenation: true, DataType: target,
			KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService),
		},
		hairpin: &nftables.Set{
			Table: t, Name: "hairpin", Concatenation: true,
			KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr),
		},
	}
}

// add creates the table and its sets where they are missing.
func (t *table) add(conn *nftables.Conn) error {
	conn.AddTable(t.table)
	for _, s := range []*nftables.Set{t.ports, t.addressPorts, t.hairpin} {
		if err := conn.AddSet(s, nil); err != nil {
			return fmt.Errorf("adding set %s: %w", s.Name, err)
		}
	}
	return nil
}

// element is the map element of one hostPort.
func (t *table) element(p Pod, port lease.HostPort) (*nftables.Set, nftables.SetElement, error) {
	proto, err := protocol(port.Protocol)
	if err != nil {
		return nil, nftables.SetElement{}, err
	}
	el := nftables.SetElement{
		Key:     binary.BigEndian.AppendUint16([]byte{proto, 0, 0, 0}, port.Port),
		Val:     binary.BigEndian.AppendUint16(p.Address.AsSlice(), port.PodPort),
		Comment: p.Owner,
	}
	// Parts of a concatenation are padded to four bytes.
	el.Key = append(el.Key, 0, 0)
	el.Val = append(el.Val, 0, 0)
	if !port.HostIP.IsValid() || port.HostIP.IsUnspecified() {
		return t.ports, el, nil
	}
	el.Key = append(port.HostIP.AsSlice(), el.Key...)
	return t.addressPorts, el, nil
}

func hairpinElement(p Pod) nftables.SetElement {
	return nftables.SetElement{Key: append(p.Address.AsSlice(), p.Address.AsSlice()...)}
}

func protocol(name string) (byte, error) {
	switch name {
	case "tcp":
		return unix.IPPROTO_TCP, nil
	case "udp":
		return unix.IPPROTO_UDP, nil
	case "sctp":
		return unix.IPPROTO_SCTP, nil
	}
	return 0, fmt.Errorf("host port protocol %q is not tcp, udp or sctp", name)
}

type chain struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

// chains is the whole rule set:
//
//	chain guard       { prerouting, raw; iifname "atl*" ip daddr 127.0.0.0/8 drop
//	                    iifname "atl*" fib saddr . iif oif 0 drop }
//	chain in          { prerouting, dstnat + 5; fib daddr type local dnat to HOST-ADDRESS-PORTS, HOST-PORTS }
//	chain out         { output, dstnat + 5; as in }
//	chain postrouting { oifname "atl*" ip saddr 127.0.0.0/8 snat to GATEWAY
//	                    ip saddr . ip daddr @hairpin snat to GATEWAY
//	                    ip saddr SUBNET ip daddr != CLUSTER masquerade fully-random }
func (t *table) chains(c Config) []chain {
	dnat := [][]expr.Any{t.dnat(t.addressPorts, true), t.dnat(t.ports, false)}
	after := new(*nftables.ChainPriorityNATDest + 5)
	loopback := netip.MustParsePrefix("127.0.0.0/8")
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		return &nftables.Chain{Table: t.table, Name: name, Type: typ, Hooknum: hook, Priority: prio}
	}
	return []chain{
		{base("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw), [][]expr.Any{
			join(ifacePrefix(expr.MetaKeyIIFNAME, gateway.Prefix), address(dst, loopback, true), drop()),
			join(ifacePrefix(expr.MetaKeyIIFNAME, gateway.Prefix), noReturnRoute(), drop()),
		}},
		{base("in", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, after), dnat},
		{base("out", nftables.ChainTypeNAT, nftables.ChainHookOutput, after), dnat},
		{base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), [][]expr.Any{
			join(ifacePrefix(expr.MetaKeyOIFNAME, gateway.Prefix), address(src, loopback, true), snat(c.Gateway)),
			join(load(src, 8), load(dst, 9), []expr.Any{&expr.Lookup{SourceRegister: 8, SetName: t.hairpin.Name}}, snat(c.Gateway)),
			join(address(src, c.Subnet, true), address(dst, c.Cluster, false), []expr.Any{&expr.Masq{FullyRandom: true}}),
		}},
	}
}

// dnat is "fib daddr type local dnat to MAP[(daddr,) protocol, port]".
func (t *table) dnat(m *nftables.Set, withAddress bool) []expr.Any {
	out := []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)},
	}
	// Registers 8 to 23 are the 4-byte views of registers 1 to 4.
	reg := uint32(8)
	if withAddress {
		out = append(out, load(dst, reg)...)
		reg++
	}
	return append(
		out,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		&expr.Payload{DestRegister: reg + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: 8, DestRegister: 8, IsDestRegSet: true, SetName: m.Name},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 8, RegProtoMin: 9},
	)
}

// Offsets of the addresses in an IPv4 header.
const (
	src = 12
	dst = 16
)

func load(offset, register uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}}
}

func compare(equal bool, data []byte) expr.Any {
	op := expr.CmpOpEq
	if !equal {
		op = expr.CmpOpNeq
	}
	return &expr.Cmp{Op: op, Register: 1, Data: data}
}

func address(offset uint32, p netip.Prefix, equal bool) []expr.Any {
	return join(load(offset, 1), []expr.Any{
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4)},
		compare(equal, p.Masked().Addr().AsSlice()),
	})
}

// ifacePrefix matches interfaces whose name begins with prefix: the comparison
// is as long as its data.
func ifacePrefix(key expr.MetaKey, prefix string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, compare(true, []byte(prefix))}
}

// noReturnRoute matches packets whose source is not routed through the
// interface they came from.
func noReturnRoute() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
		compare(true, make([]byte, 4)),
	}
}

func drop() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

func accept() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}}
}

func snat(to netip.Addr) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: to.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}

func join(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}
