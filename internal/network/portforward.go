package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
)

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST of
// linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h.
const soOriginalDst = 80

// maxForwards bounds the connections one pod forwards at a time.
const maxForwards = 512

// ServePortForward makes the loopback addresses of the pod's namespace at
// netnsPath lead into the guest: a TCP connection to any port of 127.0.0.0/8
// or ::1 is accepted here, and its bytes are copied to and from what dial
// returns for that port. This is what the CRI port-forward of containerd
// connects to, which knows nothing of micro-VMs.
//
// It returns nil when ctx ends, after every connection was closed. End it when
// the pod stops: its sockets keep the namespace alive. Unused it costs two
// sockets and two parked goroutines.
//
// A connection whose dial fails is reset. When the connection dial returns has
// a CloseWrite method, the end of one direction is passed on while the other
// goes on; without it the end is passed on by Close when both have ended.
func ServePortForward(ctx context.Context, netnsPath string, dial func(ctx context.Context, port uint16) (net.Conn, error)) error {
	if err := servePortForward(ctx, netnsPath, dial); err != nil {
		return fmt.Errorf("serving port-forward in %s: %w", netnsPath, err)
	}
	return nil
}

func servePortForward(ctx context.Context, path string, dial func(context.Context, uint16) (net.Conn, error)) error {
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	listeners, err := listenLoopback(ns)
	if err != nil {
		_ = ns.Close()
		return err
	}
	err = redirectLoopback(ns, listeners)
	// The descriptor would keep the namespace of a deleted pod alive.
	_ = ns.Close()
	if err != nil {
		for _, l := range listeners {
			_ = l.Close()
		}
		return err
	}
	f := &forwarder{dial: dial, slots: make(chan struct{}, maxForwards)}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		for _, l := range listeners {
			_ = l.Close()
		}
	})
	defer stop()
	errs := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { errs <- f.accept(ctx, l) }()
	}
	for range listeners {
		if e := <-errs; e != nil && ctx.Err() == nil {
			err = errors.Join(err, e)
			cancel()
		}
	}
	f.wg.Wait()
	return err
}

// listenLoopback opens a listener for each address family the namespace has.
func listenLoopback(ns *netns.NS) ([]*net.TCPListener, error) {
	var out []*net.TCPListener
	err := ns.Do(func() error {
		// Multipath TCP sockets do not answer SO_ORIGINAL_DST.
		lc := net.ListenConfig{KeepAlive: -1}
		lc.SetMultipathTCP(false)
		l4, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
		if err != nil {
			return err
		}
		out = append(out, l4.(*net.TCPListener))
		// No IPv6 in the namespace is fine: nobody can connect to ::1 then.
		if l6, err := lc.Listen(context.Background(), "tcp6", "[::1]:0"); err == nil {
			out = append(out, l6.(*net.TCPListener))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	return out, nil
}

// redirectLoopback installs the table that leads loopback TCP to the
// listeners. A table left by an earlier run is replaced in the same step.
func redirectLoopback(ns *netns.NS, listeners []*net.TCPListener) error {
	conn, err := nftables.New(nftables.WithNetNSFd(ns.FD()))
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "atoll"}
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	chain := conn.AddChain(&nftables.Chain{
		Name:     "forward-ports",
		Table:    table,
		Type:     nftables.ChainTypeNAT,
		Hooknum:  nftables.ChainHookOutput,
		Priority: nftables.ChainPriorityNATDest,
	})
	for _, l := range listeners {
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: redirectExprs(l.Addr().(*net.TCPAddr))})
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("installing redirect: %w", err)
	}
	return nil
}

// redirectExprs is "ip daddr 127.0.0.0/8 tcp redirect to :port", or the same
// for ::1.
func redirectExprs(to *net.TCPAddr) []expr.Any {
	family, offset, mask, want := byte(unix.NFPROTO_IPV4), uint32(16), net.IP{255, 0, 0, 0}, net.IP{127, 0, 0, 0}
	if to.IP.To4() == nil {
		family, offset, mask, want = unix.NFPROTO_IPV6, 24, net.IP(make([]byte, 16)), net.IPv6loopback
		for i := range mask {
			mask[i] = 255
		}
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(want))},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(want)), Mask: mask, Xor: make([]byte, len(want))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: want},
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, uint16(to.Port))},
		&expr.Redir{RegisterProtoMin: 1, RegisterProtoMax: 1},
	}
}

// forwarder copies connections into a guest.
type forwarder struct {
	dial  func(context.Context, uint16) (net.Conn, error)
	slots chan struct{}
	wg    sync.WaitGroup
}

func (f *forwarder) accept(ctx context.Context, l *net.TCPListener) error {
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			if !errors.Is(err, unix.EMFILE) && !errors.Is(err, unix.ENFILE) && !errors.Is(err, unix.ECONNABORTED) {
				return fmt.Errorf("accepting: %w", err)
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(100 * time.Millisecond): // out of descriptors: back off
			}
			continue
		}
		select {
		case f.slots <- struct{}{}:
		default:
			reset(c)
			continue
		}
		f.wg.Go(func() {
			defer func() { <-f.slots }()
			if err := f.forward(ctx, c); err != nil && ctx.Err() == nil {
				slog.Warn("port-forward connection failed", "err", err)
			}
		})
	}
}

// forward serves one accepted connection and closes it.
func (f *forwarder) forward(ctx context.Context, c *net.TCPConn) error {
	port, err := originalPort(c)
	if err != nil {
		reset(c)
		return err
	}
	guest, err := f.dial(ctx, port)
	if err != nil {
		reset(c)
		return fmt.Errorf("dialing port %d of the guest: %w", port, err)
	}
	stop := context.AfterFunc(ctx, func() {
		_ = c.Close()
		_ = guest.Close()
	})
	defer stop()
	var up sync.WaitGroup
	up.Go(func() { pipe(guest, c) })
	pipe(c, guest)
	up.Wait()
	_ = guest.Close()
	_ = c.Close()
	return nil
}

// pipe copies until src ends and passes the end on. When either side breaks,
// both are closed: the other direction has nobody to talk to any more.
func pipe(dst, src net.Conn) {
	if _, err := io.Copy(dst, src); err != nil {
		_ = dst.Close()
		_ = src.Close()
		return
	}
	if cw, ok := dst.(interface{ CloseWrite() error }); ok {
		_ = cw.CloseWrite()
	}
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// originalPort is the port the client connected to before the redirect.
func originalPort(c *net.TCPConn) (uint16, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("reading original destination: %w", err)
	}
	level := unix.SOL_IP
	if c.LocalAddr().(*net.TCPAddr).IP.To4() == nil {
		level = unix.SOL_IPV6
	}
	// Both sockaddr_in and sockaddr_in6 start with the family and the port in
	// network order; the answer of IPv6 is 28 bytes long.
	var info *unix.IPv6MTUInfo
	var mreq *unix.IPv6Mreq
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		if level == unix.SOL_IPV6 {
			info, sockErr = unix.GetsockoptIPv6MTUInfo(int(fd), level, soOriginalDst)
		} else {
			mreq, sockErr = unix.GetsockoptIPv6Mreq(int(fd), level, soOriginalDst)
		}
	})
	if err = errors.Join(err, sockErr); err != nil {
		return 0, fmt.Errorf("reading original destination: %w", os.NewSyscallError("getsockopt", err))
	}
	if info != nil {
		p := info.Addr.Port
		return p<<8 | p>>8, nil
	}
	return binary.BigEndian.Uint16(mreq.Multiaddr[2:4]), nil
}
