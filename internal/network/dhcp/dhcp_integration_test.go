//go:build integration

package dhcp

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
)

// redirect sends what arrives on one interface out of another.
func redirect(from, to string) error {
	in, err := netlink.LinkByName(from)
	if err != nil {
		return err
	}
	out, err := netlink.LinkByName(to)
	if err != nil {
		return err
	}
	attrs := netlink.QdiscAttrs{LinkIndex: in.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}
	if err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: attrs}); err != nil {
		return err
	}
	return netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: attrs.LinkIndex, Parent: attrs.Handle, Priority: 1, Protocol: unix.ETH_P_ALL},
		Actions:     []netlink.Action{netlink.NewMirredAction(out.Attrs().Index)},
	})
}

// TestServe asks over a wire as a guest does.
func TestServe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pod")
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	c := config()
	var guest *os.File
	err := netns.Do(path, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "vm0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "guest"}); err != nil {
			return err
		}
		for _, name := range []string{"vm0", "guest"} {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(link); err != nil {
				return err
			}
		}
		if err := redirect("vm0", "lo"); err != nil { // as package network does
			return err
		}
		link, err := net.InterfaceByName("guest")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(bigEndian(unix.ETH_P_IP)))
		if err != nil {
			return err
		}
		guest = os.NewFile(uintptr(fd), "guest")
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_IP), Ifindex: link.Index})
	})
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, path, "vm0", c) }()
	discover := fromGuest(t, c.MAC, dhcpv4.WithMessageType(dhcpv4.MessageTypeDiscover))
	buf := make([]byte, maxFrame)
	for end := time.Now().Add(time.Minute); ; {
		if time.Now().After(end) {
			t.Fatal("no offer")
		}
		if _, err := guest.Write(discover); err != nil {
			t.Fatal(err)
		}
		_ = guest.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := guest.Read(buf)
		if err != nil || n < ethernetHeader+ipHeader+udpHeader || net.HardwareAddr(buf[6:12]).String() != c.ServerMAC.String() {
			continue
		}
		offer := parse(t, buf[:n])
		if offer.MessageType() != dhcpv4.MessageTypeOffer || offer.YourIPAddr.String() != "10.244.0.7" {
			t.Errorf("%s", offer.Summary())
		}
		break
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
