package rtnl

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func TestBroadcast(t *testing.T) {
	for in, want := range map[string][]byte{
		"10.244.1.7/22": {10, 244, 3, 255}, "192.168.0.1/24": {192, 168, 0, 255}, "1.2.3.4/0": {255, 255, 255, 255},
	} {
		if got := broadcast(netip.MustParsePrefix(in)); !bytes.Equal(got, want) {
			t.Errorf("%s: %v", in, got)
		}
	}
}

func TestAttributesAreAligned(t *testing.T) {
	m := newMessage(unix.RTM_NEWLINK, 0, ifinfo(1, 0, 0)...)
	m.attr(unix.IFLA_ADDRESS, []byte{1, 2, 3, 4, 5, 6})
	m.attr32(unix.IFLA_MTU, 1500)
	if len(m.b) != 16+16+12+8 || binary.NativeEndian.Uint16(m.b[32:]) != 10 {
		t.Errorf("%x", m.b)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte{20, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, uint32(1))
	f.Fuzz(func(_ *testing.T, b []byte, seq uint32) { answer(b, seq) })
}
