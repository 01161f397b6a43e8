package dhcp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/net/bpf"
)

func config() Config {
	return Config{
		MAC: net.HardwareAddr{2, 0, 0, 0, 0, 7}, ServerMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1},
		Address: netip.MustParsePrefix("10.244.0.7/32"), Router: netip.MustParseAddr("10.244.0.1"),
		DNS: []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("::1")}, Search: []string{"ns.svc.cluster.local", "cluster.local"},
		Hostname: "db-0", Domain: "example.com", MTU: 1450,
	}
}

// fromGuest is a frame as a guest sends it.
func fromGuest(t testing.TB, mac net.HardwareAddr, mods ...dhcpv4.Modifier) []byte {
	t.Helper()
	req, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(mac)}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	c := Config{MAC: mac, ServerMAC: mac, Router: netip.IPv4Unspecified(), Address: netip.MustParsePrefix("0.0.0.0/32")}
	frame := c.frame(req, req)
	udp := frame[ethernetHeader+ipHeader:]
	binary.BigEndian.PutUint16(udp[0:], clientPort)
	binary.BigEndian.PutUint16(udp[2:], serverPort)
	return frame
}

// parse reads an answer and checks what is around it.
func parse(t *testing.T, frame []byte) *dhcpv4.DHCPv4 {
	t.Helper()
	if frame == nil {
		t.Fatal("no answer")
	}
	ip := frame[ethernetHeader:]
	if checksum(0, ip[:ipHeader]) != 0 {
		t.Error("the checksum of the IP header is wrong")
	}
	udp := ip[ipHeader:]
	pseudo := uint32(17 + len(udp))
	for i := 12; i < ipHeader; i += 2 {
		pseudo += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	if checksum(pseudo, udp) != 0 {
		t.Error("the checksum of the UDP packet is wrong")
	}
	m, err := dhcpv4.FromBytes(udp[udpHeader:])
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestAnswers(t *testing.T) {
	c := config()
	asks := dhcpv4.WithRequestedOptions(dhcpv4.OptionClasslessStaticRoute, dhcpv4.OptionRouter)
	offer := parse(t, c.answer(fromGuest(t, c.MAC, dhcpv4.WithMessageType(dhcpv4.MessageTypeDiscover), asks)))
	if offer.MessageType() != dhcpv4.MessageTypeOffer || offer.YourIPAddr.String() != "10.244.0.7" {
		t.Errorf("offer: %s", offer.Summary())
	}
	ones, _ := offer.SubnetMask().Size()
	routes := offer.ClasslessStaticRoute()
	switch {
	case ones != 32 || offer.Router()[0].String() != "10.244.0.1":
		t.Errorf("mask %d, router %v", ones, offer.Router())
	case len(routes) != 2 || routes[0].Dest.String() != "10.244.0.1/32" || routes[1].Router.String() != "10.244.0.1":
		t.Errorf("routes %v", routes)
	case len(offer.DNS()) != 1 || offer.DNS()[0].String() != "10.96.0.10" || offer.DomainSearch().Labels[1] != "cluster.local":
		t.Errorf("name servers %v, search %v", offer.DNS(), offer.DomainSearch())
	case offer.HostName() != "db-0" || offer.DomainName() != "example.com":
		t.Errorf("names %s %s", offer.HostName(), offer.DomainName())
	case binary.BigEndian.Uint16(offer.Options.Get(dhcpv4.OptionInterfaceMTU)) != 1450:
		t.Errorf("MTU %v", offer.Options.Get(dhcpv4.OptionInterfaceMTU))
	case binary.BigEndian.Uint32(offer.Options.Get(dhcpv4.OptionIPAddressLeaseTime)) != 0xffffffff:
		t.Error("the lease ends")
	}
	request := func(mods ...dhcpv4.Modifier) []byte {
		return c.answer(fromGuest(t, c.MAC, append(mods, dhcpv4.WithMessageType(dhcpv4.MessageTypeRequest))...))
	}
	ours := dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 244, 0, 7)))
	if ack := parse(t, request(ours, dhcpv4.WithRequestedOptions(dhcpv4.OptionRouter))); ack.MessageType() != dhcpv4.MessageTypeAck || ack.ClasslessStaticRoute() != nil {
		t.Errorf("ack: %s", ack.Summary())
	}
	if ack := parse(t, request(dhcpv4.WithClientIP(net.IPv4(10, 244, 0, 7)))); ack.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("renewal: %s", ack.Summary())
	}
	other := dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 244, 0, 8)))
	if nak := parse(t, request(other)); nak.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("another address: %s", nak.Summary())
	}
	if frame := request(ours, dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 0, 2, 1)))); frame != nil {
		t.Error("a request to another server was answered")
	}
	inform := parse(t, c.answer(fromGuest(t, c.MAC, dhcpv4.WithMessageType(dhcpv4.MessageTypeInform))))
	if inform.MessageType() != dhcpv4.MessageTypeAck || !inform.YourIPAddr.IsUnspecified() {
		t.Errorf("inform: %s", inform.Summary())
	}
	for _, kind := range []dhcpv4.MessageType{dhcpv4.MessageTypeRelease, dhcpv4.MessageTypeDecline} {
		if c.answer(fromGuest(t, c.MAC, dhcpv4.WithMessageType(kind))) != nil {
			t.Errorf("%s was answered", kind)
		}
	}
	if c.answer(fromGuest(t, net.HardwareAddr{2, 0, 0, 0, 0, 9}, dhcpv4.WithMessageType(dhcpv4.MessageTypeDiscover))) != nil {
		t.Error("somebody else was answered")
	}
}

// TestFilter: the socket gets what is for DHCP servers and nothing else.
func TestFilter(t *testing.T) {
	vm, err := bpf.NewVM(toServer())
	if err != nil {
		t.Fatal(err)
	}
	c := config()
	frame := fromGuest(t, c.MAC, dhcpv4.WithMessageType(dhcpv4.MessageTypeDiscover))
	for name, tc := range map[string]struct {
		spoil func([]byte)
		want  bool
	}{
		"a request":        {func([]byte) {}, true},
		"TCP":              {func(f []byte) { f[ethernetHeader+9] = 6 }, false},
		"IPv6":             {func(f []byte) { f[12], f[13] = 0x86, 0xdd }, false},
		"a fragment":       {func(f []byte) { f[ethernetHeader+7] = 1 }, false},
		"another UDP port": {func(f []byte) { f[ethernetHeader+ipHeader+3] = 53 }, false},
	} {
		f := append([]byte(nil), frame...)
		tc.spoil(f)
		if n, err := vm.Run(f); err != nil || n > 0 != tc.want {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	c := config()
	f.Add(fromGuest(f, c.MAC, dhcpv4.WithMessageType(dhcpv4.MessageTypeDiscover)))
	f.Add(fromGuest(f, c.MAC, dhcpv4.WithMessageType(dhcpv4.MessageTypeRequest)))
	f.Fuzz(func(t *testing.T, frame []byte) {
		if out := c.answer(frame); len(out) > maxFrame {
			t.Errorf("an answer of %d bytes", len(out))
		}
	})
}
