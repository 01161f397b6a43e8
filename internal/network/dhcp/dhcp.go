// Package dhcp answers the DHCP requests of one virtual machine: the guest gets exactly the address of its pod, the
// router, name servers, MTU and host name, and nobody else gets anything.
//
// It is not a DHCP server: there is no pool of addresses and nothing to remember, every request is answered from the
// same Config. It listens with a packet socket on the interface of the pod's network namespace that leads to the
// guest, beside the redirect that passes all frames on (package network). The shim of a virtual machine calls Serve.
//
// What can go wrong: what the guest sends is no DHCP, or for somebody else; it is not answered. The interface goes
// away with the pod, which ends Serve.
package dhcp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
)

// Config is what the guest is told.
type Config struct {
	// MAC is the guest's; others are not answered. ServerMAC is whom answers seem to come from.
	MAC, ServerMAC net.HardwareAddr
	Address        netip.Prefix // IPv4
	Router         netip.Addr   // IPv4; may be outside of Address
	DNS            []netip.Addr
	Search         []string
	Hostname       string
	Domain         string
	MTU            int
}

const (
	serverPort = 67
	clientPort = 68
	// forever is a lease without an end: the address is the machine's for as long as it exists.
	forever = 0xffffffff * time.Second
	// optionMicrosoftRoutes is what Windows asks for in the place of option 121.
	optionMicrosoftRoutes = 249

	ethernetHeader = 14
	ipHeader       = 20
	udpHeader      = 8
	maxFrame       = 2048
)

// Serve answers on an interface of the network namespace at path until ctx ends, and returns nil then.
func Serve(ctx context.Context, path, ifName string, cfg Config) error {
	if err := cfg.check(); err != nil {
		return fmt.Errorf("serving DHCP: %w", err)
	}
	var f *os.File
	err := netns.Do(path, func() (err error) {
		f, err = open(ifName)
		return err
	})
	if err != nil {
		return fmt.Errorf("serving DHCP on %s: %w", ifName, err)
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	defer stop()
	buf := make([]byte, maxFrame)
	for {
		n, err := f.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENETDOWN): // the interface is being brought up or down
			continue
		case err != nil:
			return fmt.Errorf("serving DHCP on %s: %w", ifName, err)
		}
		if frame := cfg.answer(buf[:n]); frame != nil {
			_, _ = f.Write(frame) // the guest asks again
		}
	}
}

func (c Config) check() error {
	switch {
	case len(c.MAC) != 6 || len(c.ServerMAC) != 6:
		return errors.New("no MAC address")
	case !c.Address.Addr().Is4() || !c.Router.Is4():
		return errors.New("no IPv4 address and router")
	}
	return nil
}

// open makes a packet socket that gets what is sent to DHCP servers, on an interface of the thread's namespace.
func open(ifName string) (*os.File, error) {
	link, err := net.InterfaceByName(ifName)
	if err != nil {
		return nil, err
	}
	filter, err := bpf.Assemble(toServer())
	if err != nil {
		return nil, fmt.Errorf("making filter: %w", err)
	}
	// It gets nothing before it is bound to a protocol.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening packet socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "dhcp:"+ifName)
	raw := make([]unix.SockFilter, 0, len(filter))
	for _, i := range filter {
		raw = append(raw, unix.SockFilter{Code: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(raw)), Filter: &raw[0]})
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	}
	if err == nil {
		// Only sockets of all protocols see frames before the redirect takes them away.
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ALL), Ifindex: link.Index})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("setting up packet socket: %w", err), f.Close())
	}
	return f, nil
}

func bigEndian(n uint16) uint16 { return n<<8 | n>>8 }

// toServer is "udp dst port 67", not a fragment, on Ethernet.
func toServer() []bpf.Instruction {
	const (
		etherType = 12
		fragment  = ethernetHeader + 6
		protocol  = ethernetHeader + 9
		dstPort   = ethernetHeader + 2
	)
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: etherType, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_IP, SkipTrue: 8},
		bpf.LoadAbsolute{Off: protocol, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 6},
		bpf.LoadAbsolute{Off: fragment, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff, SkipTrue: 4},
		bpf.LoadMemShift{Off: ethernetHeader},
		bpf.LoadIndirect{Off: dstPort, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: serverPort, SkipTrue: 1},
		bpf.RetConstant{Val: maxFrame},
		bpf.RetConstant{Val: 0},
	}
}

// answer is the frame to send back for one that came, nil for none.
func (c Config) answer(frame []byte) []byte {
	payload := toDHCP(frame)
	if payload == nil {
		return nil
	}
	req, err := dhcpv4.FromBytes(payload)
	if err != nil || req.OpCode != dhcpv4.OpcodeBootRequest || req.ClientHWAddr.String() != c.MAC.String() {
		return nil
	}
	resp, err := c.reply(req)
	if err != nil || resp == nil {
		return nil
	}
	return c.frame(req, resp)
}

// toDHCP returns what is in a UDP packet to the port of DHCP servers, or nil.
func toDHCP(frame []byte) []byte {
	if len(frame) < ethernetHeader+ipHeader+udpHeader || binary.BigEndian.Uint16(frame[12:]) != unix.ETH_P_IP {
		return nil
	}
	ip := frame[ethernetHeader:]
	header := int(ip[0]&0xf) * 4
	if ip[0]>>4 != 4 || header < ipHeader || len(ip) < header+udpHeader || ip[9] != unix.IPPROTO_UDP {
		return nil
	}
	udp := ip[header:]
	length := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp[2:]) != serverPort || length < udpHeader || length > len(udp) {
		return nil
	}
	return udp[udpHeader:length]
}

// reply decides what to answer; nil is nothing.
func (c Config) reply(req *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error) {
	server := net.IP(c.Router.AsSlice())
	if id := req.ServerIdentifier(); len(id) > 0 && !id.Equal(server) {
		return nil, nil // it has chosen another server
	}
	var kind dhcpv4.MessageType
	ours := net.IP(c.Address.Addr().AsSlice())
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeInform:
		kind = dhcpv4.MessageTypeAck
	case dhcpv4.MessageTypeRequest:
		kind = dhcpv4.MessageTypeAck
		wanted := req.RequestedIPAddress()
		if len(wanted) == 0 || wanted.IsUnspecified() {
			wanted = req.ClientIPAddr
		}
		if !wanted.Equal(ours) {
			return dhcpv4.NewReplyFromRequest(
				req,
				dhcpv4.WithMessageType(dhcpv4.MessageTypeNak), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(server)),
			)
		}
	default:
		return nil, nil
	}
	mods := append(c.options(req), dhcpv4.WithMessageType(kind), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(server)))
	if req.MessageType() != dhcpv4.MessageTypeInform {
		mods = append(mods, dhcpv4.WithYourIP(ours), dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(forever)))
	}
	return dhcpv4.NewReplyFromRequest(req, mods...)
}

// options are what the guest configures besides its address.
func (c Config) options(req *dhcpv4.DHCPv4) []dhcpv4.Modifier {
	router := net.IP(c.Router.AsSlice())
	bits := c.Address.Bits()
	opts := []dhcpv4.Option{dhcpv4.OptSubnetMask(net.CIDRMask(bits, 32)), dhcpv4.OptRouter(router)}
	if !c.Address.Contains(c.Router) {
		// On-link first, so that the router can be reached. A guest that knows routes ignores the router above.
		routes := dhcpv4.Routes{
			{Dest: &net.IPNet{IP: router, Mask: net.CIDRMask(32, 32)}, Router: net.IPv4zero.To4()},
			{Dest: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, Router: router},
		}
		if req.IsOptionRequested(dhcpv4.OptionClasslessStaticRoute) {
			opts = append(opts, dhcpv4.OptClasslessStaticRoute(routes...))
		}
		if req.IsOptionRequested(dhcpv4.GenericOptionCode(optionMicrosoftRoutes)) {
			opts = append(opts, dhcpv4.OptGeneric(dhcpv4.GenericOptionCode(optionMicrosoftRoutes), routes.ToBytes()))
		}
	}
	if dns := ipv4(c.DNS); len(dns) > 0 {
		opts = append(opts, dhcpv4.OptDNS(dns...))
	}
	if c.MTU > 0 {
		opts = append(opts, dhcpv4.Option{Code: dhcpv4.OptionInterfaceMTU, Value: dhcpv4.Uint16(c.MTU)})
	}
	if c.Hostname != "" {
		opts = append(opts, dhcpv4.OptHostName(c.Hostname))
	}
	if c.Domain != "" {
		opts = append(opts, dhcpv4.OptDomainName(c.Domain))
	}
	if len(c.Search) > 0 {
		opts = append(opts, dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: c.Search}))
	}
	mods := make([]dhcpv4.Modifier, 0, len(opts)+2)
	for _, o := range opts {
		mods = append(mods, dhcpv4.WithOption(o))
	}
	return mods
}

func ipv4(all []netip.Addr) []net.IP {
	var out []net.IP
	for _, a := range all {
		if a.Is4() {
			out = append(out, a.AsSlice())
		}
	}
	return out
}

// frame puts an answer into UDP, IP and Ethernet.
func (c Config) frame(req, resp *dhcpv4.DHCPv4) []byte {
	payload := resp.ToBytes()
	src, dst, mac := c.Router.As4(), [4]byte{255, 255, 255, 255}, net.HardwareAddr{255, 255, 255, 255, 255, 255}
	if !req.IsBroadcast() && resp.MessageType() != dhcpv4.MessageTypeNak {
		dst, mac = c.Address.Addr().As4(), c.MAC
	}
	out := make([]byte, 0, ethernetHeader+ipHeader+udpHeader+len(payload))
	out = append(append(append(out, mac...), c.ServerMAC...), 8, 0)
	ip := make([]byte, ipHeader)
	const version, ttl = 0x45, 64
	ip[0], ip[8], ip[9] = version, ttl, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(ipHeader+udpHeader+len(payload)))
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], checksum(0, ip))
	udp := make([]byte, udpHeader, udpHeader+len(payload))
	binary.BigEndian.PutUint16(udp[0:], serverPort)
	binary.BigEndian.PutUint16(udp[2:], clientPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(udpHeader+len(payload)))
	udp = append(udp, payload...)
	pseudo := uint32(unix.IPPROTO_UDP + len(udp))
	for _, half := range [][]byte{ip[12:14], ip[14:16], ip[16:18], ip[18:20]} {
		pseudo += uint32(binary.BigEndian.Uint16(half))
	}
	sum := checksum(pseudo, udp)
	if sum == 0 {
		sum = 0xffff // 0 is for none
	}
	binary.BigEndian.PutUint16(udp[6:], sum)
	return append(append(out, ip...), udp...)
}

// checksum is that of RFC 1071.
func checksum(sum uint32, data []byte) uint16 {
	for i := 0; i+1 < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	if len(data)%2 == 1 {
		sum += uint32(data[len(data)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
