// Package channel is what the shim and the guest init must agree on around the guest protocol
// (api/guest/v1): the barrier handshake, the yamux settings, the one-line header that opens every
// stream, and the well-known paths inside a guest.
//
// It is not the protocol itself and holds no state. internal/shim calls Client, internal/guest
// calls Server. Headers come from the other, untrusted side of the port: ReadHeader reads at most
// MaxHeader bytes and accepts only what Header.String could have written.
package channel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	// PortName is the name of the virtio-serial port that carries everything.
	PortName = "atoll.ctl"
	// Ready is what the guest writes once, when it may be cloned.
	Ready = "ATOLLRDY"
	// Go is what the host writes after a clone (or the booted template itself) runs.
	Go = "ATOLLGO\n"

	// VolumesDir holds one entry per pod volume in the guest: VolumesDir/<id>.
	VolumesDir = "/run/atoll/volumes"
	// ShmPath is the pod's shared /dev/shm in the guest, to be used as a bind source.
	ShmPath = "/run/atoll/shm"

	// RehearseEnv in init's environment, which the kernel makes of its command line, says how many pod starts
	// to rehearse before Ready, on RehearseImage and RehearseScratch.
	RehearseEnv = "ATOLL_REHEARSE"
	// RehearseImage is the serial of the disk with the image of rehearsals.
	RehearseImage = "img0"
	// RehearseScratch is the serial of the scratch disk of rehearsals.
	RehearseScratch = "scratch"

	// MaxHeader bounds the header line of a stream, newline included.
	MaxHeader = 512
	// MaxID bounds the ids of containers, execs, images and volumes.
	MaxID = 200
	// MaxFrame bounds the file data of one PutFiles call.
	MaxFrame = 1 << 20
)

// ErrBadHeader is wrapped by every error about the content of a stream header.
var ErrBadHeader = errors.New("bad stream header")

// ErrNotReady is wrapped when the guest wrote something else than Ready.
var ErrNotReady = errors.New("guest did not announce itself")

// Kind says what a stream carries.
type Kind string

// The kinds of streams.
const (
	KindRPC  Kind = "rpc"
	KindIO   Kind = "io"
	KindDial Kind = "dial"
)

// Header opens a yamux stream. Container, Exec ("" for the container's first process) and FD
// belong to KindIO, Port to KindDial.
type Header struct {
	Kind      Kind
	Container string
	Exec      string
	FD        int
	Port      uint16
}

// String renders the header as it goes over the wire, newline included.
func (h Header) String() string {
	switch h.Kind {
	case KindIO:
		exec := h.Exec
		if exec == "" {
			exec = "-"
		}
		return "io " + h.Container + " " + exec + " " + strconv.Itoa(h.FD) + "\n"
	case KindDial:
		return "dial " + strconv.Itoa(int(h.Port)) + "\n"
	default:
		return string(h.Kind) + "\n"
	}
}

// ValidID reports whether id may name a container, exec, image or volume: 1 to MaxID of letters,
// digits, "_", "-" and ".", not starting with a dot or a dash.
func ValidID(id string) bool {
	if id == "" || len(id) > MaxID || id[0] == '.' || id[0] == '-' {
		return false
	}
	for i := range len(id) {
		c := id[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '_', c == '-', c == '.':
		default:
			return false
		}
	}
	return true
}

// ParseHeader parses one header line without its newline.
func ParseHeader(line string) (Header, error) {
	f := strings.Split(line, " ")
	switch {
	case f[0] == "rpc" && len(f) == 1:
		return Header{Kind: KindRPC}, nil
	case f[0] == "io" && len(f) == 4:
		h := Header{Kind: KindIO, Container: f[1], Exec: f[2]}
		if h.Exec == "-" {
			h.Exec = ""
		} else if !ValidID(h.Exec) {
			return Header{}, fmt.Errorf("%w: exec id %q", ErrBadHeader, f[2])
		}
		if !ValidID(h.Container) {
			return Header{}, fmt.Errorf("%w: container id %q", ErrBadHeader, f[1])
		}
		if len(f[3]) != 1 || f[3][0] < '0' || f[3][0] > '2' {
			return Header{}, fmt.Errorf("%w: descriptor %q", ErrBadHeader, f[3])
		}
		h.FD = int(f[3][0] - '0')
		return h, nil
	case f[0] == "dial" && len(f) == 2:
		port, err := strconv.ParseUint(f[1], 10, 16)
		if err != nil || port == 0 || f[1] != strconv.FormatUint(port, 10) {
			return Header{}, fmt.Errorf("%w: port %q", ErrBadHeader, f[1])
		}
		return Header{Kind: KindDial, Port: uint16(port)}, nil
	}
	return Header{}, fmt.Errorf("%w: %q", ErrBadHeader, line)
}

// ReadLine reads up to and including a newline, never past it and never more than limit bytes. The
// newline is not returned.
func ReadLine(r io.Reader, limit int) (string, error) {
	line := make([]byte, 0, 64)
	var b [1]byte
	for len(line) < limit {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return "", fmt.Errorf("reading line: %w", err)
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
	return "", fmt.Errorf("%w: longer than %d bytes", ErrBadHeader, limit)
}

// ReadHeader reads the header of a stream and not a byte more.
func ReadHeader(r io.Reader) (Header, error) {
	line, err := ReadLine(r, MaxHeader)
	if err != nil {
		return Header{}, err
	}
	return ParseHeader(line)
}

// Open opens a stream with the given header on the host's session.
func Open(s *yamux.Session, h Header) (*yamux.Stream, error) {
	if _, err := ParseHeader(strings.TrimSuffix(h.String(), "\n")); err != nil {
		return nil, err
	}
	st, err := s.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("opening %s stream: %w", h.Kind, err)
	}
	if _, err := io.WriteString(st, h.String()); err != nil {
		_ = st.Close()
		return nil, fmt.Errorf("writing %s stream header: %w", h.Kind, err)
	}
	return st, nil
}

// Dial opens a stream to a TCP port of the pod's loopback and waits for the guest's answer.
func Dial(s *yamux.Session, port uint16) (*yamux.Stream, error) {
	st, err := Open(s, Header{Kind: KindDial, Port: port})
	if err != nil {
		return nil, err
	}
	answer, err := ReadLine(st, MaxHeader)
	if err == nil && answer != "ok" {
		err = fmt.Errorf("dialing port %d in the pod: %s", port, strings.TrimPrefix(answer, "err "))
	}
	if err != nil {
		_ = st.Close()
		return nil, err
	}
	return st, nil
}

// WaitReady reads Ready from a freshly booted template. The caller bounds the time by closing conn
// or by a deadline.
func WaitReady(conn io.Reader) error {
	buf := make([]byte, len(Ready))
	if _, err := io.ReadFull(conn, buf); err != nil {
		return fmt.Errorf("waiting for the guest: %w", err)
	}
	if string(buf) != Ready {
		return fmt.Errorf("%w: got %q", ErrNotReady, buf)
	}
	return nil
}

// Client lets a guest that waits at the barrier go and starts the host's end of the session.
func Client(conn io.ReadWriteCloser) (*yamux.Session, error) {
	if _, err := io.WriteString(conn, Go); err != nil {
		return nil, fmt.Errorf("releasing the guest: %w", err)
	}
	return Attach(conn)
}

// Attach starts the host's end of the session with a guest that was let go already, as vm.Clone and
// vm.Boot do.
func Attach(conn io.ReadWriteCloser) (*yamux.Session, error) {
	s, err := yamux.Client(&frames{ReadWriteCloser: conn}, config())
	if err != nil {
		return nil, fmt.Errorf("starting session: %w", err)
	}
	return s, nil
}

// Server starts the guest's end of the session; the handshake is behind it.
func Server(conn io.ReadWriteCloser) (*yamux.Session, error) {
	s, err := yamux.Server(&frames{ReadWriteCloser: conn}, config())
	if err != nil {
		return nil, fmt.Errorf("starting session: %w", err)
	}
	return s, nil
}

// config is the yamux configuration of both ends. A stopped virtual machine answers nothing for as
// long as it is stopped, so nothing may time out: no keep-alive, no close timer (half-closed stdio
// may stay that way for ever), no write timeout to speak of.
func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = 1024
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = 10 * 365 * 24 * time.Hour
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 0
	c.LogOutput = io.Discard
	return c
}

// yamux frame header, https://github.com/hashicorp/yamux/blob/master/spec.md.
const (
	frameHeader = 12
	typeData    = 0
)

// frames joins the header of a yamux data frame with its body into one write: yamux writes the two
// one after the other, and every write to a virtio port costs an exit from the virtual machine.
// Only yamux's single send loop writes, so there is no lock.
type frames struct {
	io.ReadWriteCloser
	header []byte
	buf    []byte
}

func (f *frames) Write(p []byte) (int, error) {
	if len(f.header) > 0 {
		f.buf = append(append(f.buf[:0], f.header...), p...)
		f.header = f.header[:0]
		n, err := f.ReadWriteCloser.Write(f.buf)
		return max(0, n-frameHeader), err
	}
	if len(p) == frameHeader && p[1] == typeData && (p[8]|p[9]|p[10]|p[11]) != 0 {
		f.header = append(f.header[:0], p...)
		return len(p), nil
	}
	return f.ReadWriteCloser.Write(p)
}

// Listener hands out one connection, which is all a ttrpc server over a yamux stream needs.
type Listener struct {
	conns chan net.Conn
	done  <-chan struct{}
}

// NewListener makes a listener whose first Accept returns conn and whose second blocks until done
// is closed.
func NewListener(conn net.Conn, done <-chan struct{}) *Listener {
	l := &Listener{conns: make(chan net.Conn, 1), done: done}
	l.conns <- conn
	return l
}

// Accept returns the connection, once.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close does nothing: the end of done ends the listener.
func (*Listener) Close() error { return nil }

// Addr names the listener.
func (*Listener) Addr() net.Addr { return addr{} }

type addr struct{}

func (addr) Network() string { return "yamux" }
func (addr) String() string  { return PortName }
