package denied

import (
	"encoding/binary"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// Packet is what is told of a packet.
type Packet struct {
	From, To netip.Addr
	// Protocol is TCP, UDP, SCTP, ICMP or a number.
	Protocol string
	Port     uint16 // of To
	HasPort  bool
}

// Parse reads the beginning of an IPv4 packet. ok is false for anything else.
func Parse(b []byte) (p Packet, ok bool) {
	if len(b) < 20 || b[0]>>4 != 4 {
		return Packet{}, false
	}
	header := int(b[0]&0xf) * 4
	if header < 20 {
		return Packet{}, false
	}
	p.From, p.To = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	switch b[9] {
	case unix.IPPROTO_TCP:
		p.Protocol = "TCP"
	case unix.IPPROTO_UDP:
		p.Protocol = "UDP"
	case unix.IPPROTO_SCTP:
		p.Protocol = "SCTP"
	case unix.IPPROTO_ICMP:
		p.Protocol = "ICMP"
		return p, true
	default:
		p.Protocol = strconv.Itoa(int(b[9]))
		return p, true
	}
	// Only the first fragment has ports.
	if first := binary.BigEndian.Uint16(b[6:8])&0x1fff == 0; first && len(b) >= header+4 {
		p.Port, p.HasPort = binary.BigEndian.Uint16(b[header+2:header+4]), true
	}
	return p, true
}
