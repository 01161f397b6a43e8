package denied

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
)

// ipv4 is the beginning of a packet from 10.0.0.1 to 10.0.0.2.
func ipv4(protocol byte, port uint16) []byte {
	a, b := netip.MustParseAddr("10.0.0.1").As4(), netip.MustParseAddr("10.0.0.2").As4()
	head := []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0}
	head = append(append(head, a[:]...), b[:]...)
	return append(head, 0x30, 0x39, byte(port>>8), byte(port), 0, 0, 0, 0)
}

func TestParse(t *testing.T) {
	later := ipv4(6, 80)
	later[7] = 1 // the second part of a datagram
	for _, tc := range []struct {
		in   []byte
		want string
	}{
		{ipv4(6, 80), "{10.0.0.1 10.0.0.2 TCP 80 true} true"},
		{ipv4(17, 53), "{10.0.0.1 10.0.0.2 UDP 53 true} true"},
		{ipv4(132, 7), "{10.0.0.1 10.0.0.2 SCTP 7 true} true"},
		{ipv4(1, 7), "{10.0.0.1 10.0.0.2 ICMP 0 false} true"},
		{ipv4(47, 7), "{10.0.0.1 10.0.0.2 47 0 false} true"},
		{later, "{10.0.0.1 10.0.0.2 TCP 0 false} true"},
		{ipv4(6, 80)[:22], "{10.0.0.1 10.0.0.2 TCP 0 false} true"},
		{ipv4(6, 80)[:19], "{invalid IP invalid IP  0 false} false"},
		{append([]byte{0x60}, make([]byte, 60)...), "{invalid IP invalid IP  0 false} false"},
		{append([]byte{0x41}, make([]byte, 60)...), "{invalid IP invalid IP  0 false} false"},
	} {
		p, ok := Parse(tc.in)
		if got := fmt.Sprint(p, ok); got != tc.want {
			t.Errorf("%x: %s, want %s", tc.in, got, tc.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(ipv4(6, 80))
	f.Add([]byte{0x4f, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, ok := Parse(b); ok && (!p.From.Is4() || !p.To.Is4() || p.Protocol == "") {
			t.Errorf("%x: %v", b, p)
		}
		_, _, _ = parseMessage(netlink.Message{Header: netlink.Header{Type: messagePacket}, Data: b})
	})
}

func TestLog(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	dir := t.TempDir()
	names := map[string]string{"10.0.0.1": "shop/client"}
	l := New(Config{Dir: dir, Now: func() time.Time { return now }, Name: func(a netip.Addr) string { return names[a.String()] }})
	packet := ipv4(6, 80)
	for range 5 {
		l.packet("ingress/owner/shop", packet)
	}
	l.packet("egress/administrator/other", packet)
	l.packet("egress/administrator/..", packet)
	l.packet("something else", packet)
	l.expire()
	now = now.Add(11 * time.Second)
	l.expire()
	l.packet("ingress/owner/shop", packet)
	text, err := os.ReadFile(Path(dir, "shop"))
	if err != nil {
		t.Fatal(err)
	}
	want := `2026-01-02T03:04:05.000Z denied=ingress tier=owner from=shop/client(10.0.0.1) to=10.0.0.2 port=80/TCP count=1
2026-01-02T03:04:16.000Z denied=ingress tier=owner from=shop/client(10.0.0.1) to=10.0.0.2 port=80/TCP count=4
2026-01-02T03:04:16.000Z denied=ingress tier=owner from=shop/client(10.0.0.1) to=10.0.0.2 port=80/TCP count=1
`
	if string(text) != want {
		t.Errorf("got\n%swant\n%s", text, want)
	}
	if text, err := os.ReadFile(Path(dir, "other")); err != nil || !strings.Contains(string(text), "denied=egress tier=administrator") {
		t.Errorf("%s, %v", text, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestFilesStaySmall(t *testing.T) {
	dir := t.TempDir()
	l := New(Config{Dir: dir})
	if err := os.WriteFile(Path(dir, "shop"), make([]byte, maxFile), 0o600); err != nil {
		t.Fatal(err)
	}
	l.packet("ingress/owner/shop", ipv4(6, 80))
	l.packet("ingress/owner/shop", ipv4(6, 81))
	if info, err := os.Stat(Path(dir, "shop")); err != nil || info.Size() > 1000 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := os.Stat(Path(dir, "shop") + ".1"); err != nil {
		t.Error(err)
	}
}
