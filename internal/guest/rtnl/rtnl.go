// Package rtnl sets links, addresses and routes over rtnetlink: the few requests guest init needs
// at pod start, small enough to be cheap under emulation.
//
// It is not a general netlink library; internal/network on the host uses one. Protocol:
// rtnetlink(7), linux/rtnetlink.h.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Conn is a routing socket. It is not safe for concurrent use.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

// Open opens a routing socket in the current network namespace.
func Open() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening routing socket: %w", err)
	}
	return &Conn{fd: fd, buf: make([]byte, 4096)}, nil
}

// Close closes the socket.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// Index returns the index of an interface.
func (c *Conn) Index(name string) (int, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("interface %q: %w", name, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	return int(req.Uint32()), nil
}

// message builds one request: header, fixed part, attributes.
type message struct{ b []byte }

func newMessage(typ, flags uint16, fixed ...byte) *message {
	m := &message{b: make([]byte, unix.SizeofNlMsghdr, 128)}
	binary.NativeEndian.PutUint16(m.b[4:], typ)
	binary.NativeEndian.PutUint16(m.b[6:], flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m.b = append(m.b, fixed...)
	return m
}

func (m *message) attr(typ uint16, data []byte) {
	m.b = binary.NativeEndian.AppendUint16(m.b, uint16(unix.SizeofRtAttr+len(data)))
	m.b = binary.NativeEndian.AppendUint16(m.b, typ)
	m.b = append(m.b, data...)
	for len(m.b)%4 != 0 {
		m.b = append(m.b, 0)
	}
}

func (m *message) attr32(typ uint16, v uint32) {
	m.attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

// do sends a request and waits for the kernel's acknowledgement.
func (c *Conn) do(m *message) error {
	c.seq++
	binary.NativeEndian.PutUint32(m.b[0:], uint32(len(m.b)))
	binary.NativeEndian.PutUint32(m.b[8:], c.seq)
	if err := unix.Sendto(c.fd, m.b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("sending request: %w", err)
	}
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("receiving answer: %w", err)
		}
		if errno, ok := answer(c.buf[:n], c.seq); ok {
			if errno != 0 {
				return errno
			}
			return nil
		}
	}
}

// answer finds the acknowledgement of a request in what was received.
func answer(b []byte, seq uint32) (unix.Errno, bool) {
	for len(b) >= unix.SizeofNlMsghdr {
		length := binary.NativeEndian.Uint32(b[0:])
		if length < unix.SizeofNlMsghdr || int(length) > len(b) {
			return 0, false
		}
		typ, got := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
		if typ == unix.NLMSG_ERROR && got == seq && length >= unix.SizeofNlMsghdr+4 {
			return unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))), true
		}
		b = b[min(len(b), int(length+3)&^3):]
	}
	return 0, false
}

func ifinfo(index int, flags, change uint32) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	binary.NativeEndian.PutUint32(b[8:], flags)
	binary.NativeEndian.PutUint32(b[12:], change)
	return b
}

// SetLink sets MAC (unless nil), MTU (unless 0) and the administrative state of an interface.
func (c *Conn) SetLink(index int, mac net.HardwareAddr, mtu uint32, up bool) error {
	var flags uint32
	if up {
		flags = unix.IFF_UP
	}
	m := newMessage(unix.RTM_NEWLINK, 0, ifinfo(index, flags, unix.IFF_UP)...)
	if mac != nil {
		m.attr(unix.IFLA_ADDRESS, mac)
	}
	if mtu != 0 {
		m.attr32(unix.IFLA_MTU, mtu)
	}
	if err := c.do(m); err != nil {
		return fmt.Errorf("setting link %d: %w", index, err)
	}
	return nil
}

// AddAddress adds an address with its prefix length. IPv6 addresses are used without duplicate
// address detection: the host assigned them.
func (c *Conn) AddAddress(index int, p netip.Prefix) error {
	return c.address(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, index, p)
}

// DeleteAddress removes an address.
func (c *Conn) DeleteAddress(index int, p netip.Prefix) error {
	return c.address(unix.RTM_DELADDR, 0, index, p)
}

func (c *Conn) address(typ, flags uint16, index int, p netip.Prefix) error {
	fixed := make([]byte, unix.SizeofIfAddrmsg)
	fixed[0], fixed[1] = family(p.Addr()), byte(p.Bits())
	if p.Addr().Is6() {
		fixed[2] = unix.IFA_F_NODAD
	}
	binary.NativeEndian.PutUint32(fixed[4:], uint32(index))
	m := newMessage(typ, flags, fixed...)
	ip := p.Addr().AsSlice()
	m.attr(unix.IFA_LOCAL, ip)
	m.attr(unix.IFA_ADDRESS, ip)
	if p.Addr().Is4() && p.Bits() < 31 && !p.Addr().IsLoopback() {
		m.attr(unix.IFA_BROADCAST, broadcast(p))
	}
	if err := c.do(m); err != nil {
		return fmt.Errorf("setting address %s: %w", p, err)
	}
	return nil
}

func broadcast(p netip.Prefix) []byte {
	a := p.Addr().As4()
	host := uint32(1)<<(32-p.Bits()) - 1
	return binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(a[:])|host)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// AddRoute adds a route through an interface; an invalid gateway means on-link. A gateway outside
// every on-link prefix is taken to be on-link as well.
func (c *Conn) AddRoute(index int, dst netip.Prefix, gateway netip.Addr) error {
	fixed := make([]byte, unix.SizeofRtMsg)
	fixed[0], fixed[1] = family(dst.Addr()), byte(dst.Bits())
	fixed[4], fixed[5] = unix.RT_TABLE_MAIN, unix.RTPROT_BOOT
	fixed[6], fixed[7] = unix.RT_SCOPE_LINK, unix.RTN_UNICAST
	if gateway.IsValid() {
		fixed[6] = unix.RT_SCOPE_UNIVERSE
		binary.NativeEndian.PutUint32(fixed[8:], unix.RTNH_F_ONLINK)
	}
	m := newMessage(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, fixed...)
	if dst.Bits() > 0 {
		m.attr(unix.RTA_DST, dst.Masked().Addr().AsSlice())
	}
	if gateway.IsValid() {
		m.attr(unix.RTA_GATEWAY, gateway.AsSlice())
	}
	m.attr32(unix.RTA_OIF, uint32(index))
	if err := c.do(m); err != nil {
		return fmt.Errorf("adding route to %s: %w", dst, err)
	}
	return nil
}
