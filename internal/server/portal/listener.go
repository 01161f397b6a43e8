package portal

import (
	"net"
	"net/netip"
	"sync"
)

// bounded is a listener that closes connections beyond its bounds at once.
type bounded struct {
	net.Listener
	max, perSource int

	mu    sync.Mutex
	total int
	open  map[netip.Addr]int // by source
}

func bound(l net.Listener, maxOpen, perSource int) *bounded {
	return &bounded{Listener: l, max: maxOpen, perSource: perSource, open: map[netip.Addr]int{}}
}

// Accept implements net.Listener.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		conn, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		var source netip.Addr
		if addr, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
			source = addr.AddrPort().Addr().Unmap().WithZone("")
		}
		if !b.take(source) {
			_ = conn.Close()
			continue
		}
		return &counted{Conn: conn, release: sync.OnceFunc(func() { b.release(source) })}, nil
	}
}

func (b *bounded) take(source netip.Addr) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.total >= b.max || b.open[source] >= b.perSource {
		return false
	}
	b.total++
	b.open[source]++
	return true
}

func (b *bounded) release(source netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total--
	if b.open[source]--; b.open[source] <= 0 {
		delete(b.open, source)
	}
}

// counted is a connection that gives its place back.
type counted struct {
	net.Conn
	release func()
}

// Close implements net.Conn.
func (c *counted) Close() error {
	defer c.release()
	return c.Conn.Close()
}
