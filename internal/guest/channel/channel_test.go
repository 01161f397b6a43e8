package channel

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
)

func TestHeaderRoundTrip(t *testing.T) {
	for _, h := range []Header{
		{Kind: KindRPC},
		{Kind: KindIO, Container: "c1", FD: 2},
		{Kind: KindIO, Container: "c1", Exec: "e-1", FD: 0},
		{Kind: KindDial, Port: 65535},
	} {
		got, err := ReadHeader(strings.NewReader(h.String() + "payload"))
		if err != nil || got != h {
			t.Errorf("%q: got %+v, %v", h.String(), got, err)
		}
	}
}

func TestHeaderRefused(t *testing.T) {
	for _, line := range []string{
		"", "rpc x", "io", "io c - 3", "io c - 10", "io ../c - 1", "io c /e 1", "io .. - 0",
		"dial", "dial 0", "dial 65536", "dial -1", "dial +1", "dial 080", "DIAL 80", "io  - 1",
	} {
		if h, err := ParseHeader(line); err == nil {
			t.Errorf("%q: accepted as %+v", line, h)
		}
	}
	if _, err := ReadHeader(strings.NewReader(strings.Repeat("a", 2*MaxHeader))); err == nil {
		t.Error("endless header accepted")
	}
}

func FuzzParseHeader(f *testing.F) {
	for _, s := range []string{"rpc", "io a - 0", "io a b 2", "dial 80", "dial 99999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		h, err := ParseHeader(line)
		if err == nil && h.String() != line+"\n" {
			t.Errorf("%q parsed to %q", line, h.String())
		}
	})
}

func TestSession(t *testing.T) {
	host, guest := net.Pipe()
	released := make(chan error, 1)
	payload := bytes.Repeat([]byte("0123456789abcdef"), 64<<10) // 1 MiB, four windows
	go func() {
		buf := make([]byte, len(Go))
		if _, err := io.ReadFull(guest, buf); err != nil || string(buf) != Go {
			released <- io.ErrUnexpectedEOF
			return
		}
		s, err := Server(guest)
		if err != nil {
			released <- err
			return
		}
		st, err := s.AcceptStream()
		if err != nil {
			released <- err
			return
		}
		h, err := ReadHeader(st)
		if err == nil && h.Kind != KindIO {
			err = ErrBadHeader
		}
		if err == nil {
			_, err = io.Copy(st, st) // the host half-closes, then we do
			_ = st.Close()
		}
		released <- err
	}()
	s, err := Client(host)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := Open(s, Header{Kind: KindIO, Container: "c"})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = st.Write(payload)
		_ = st.Close()
	}()
	got, err := io.ReadAll(st)
	if err != nil || !bytes.Equal(got, payload) {
		t.Fatalf("echo: %d bytes, %v", len(got), err)
	}
	if err := <-released; err != nil {
		t.Fatal(err)
	}
}
