package daemon

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
)

// peers lets only this user's processes connect and knows how many are connected.
//
// A ttrpc server that is shut down may close a connection before it has sent the answer of a call that
// has just begun: it takes the connection for idle. So the daemon waits until containerd, which has its
// answer, closes the connection.
type peers struct {
	check ttrpc.Handshaker

	mu   sync.Mutex // guards the fields below
	open int
	none chan struct{} // closed while open is 0
}

func newPeers() *peers {
	none := make(chan struct{})
	close(none)
	return &peers{check: ttrpc.UnixSocketRequireSameUser(), none: none}
}

// Handshake checks who has connected.
func (p *peers) Handshake(ctx context.Context, conn net.Conn) (net.Conn, any, error) {
	conn, credentials, err := p.check.Handshake(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	p.add(1)
	return &peer{Conn: conn, peers: p}, credentials, nil
}

func (p *peers) add(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.open
	p.open += n
	switch {
	case before == 0 && p.open > 0:
		p.none = make(chan struct{})
	case before > 0 && p.open == 0:
		close(p.none)
	}
}

// wait waits until nobody is connected, or for the given time.
func (p *peers) wait(limit time.Duration) {
	p.mu.Lock()
	none := p.none
	p.mu.Unlock()
	select {
	case <-none:
	case <-time.After(limit):
	}
}

// peer is one connection.
type peer struct {
	net.Conn
	peers *peers
	once  sync.Once
}

// Close closes the connection; the server may call it more than once.
func (p *peer) Close() error {
	p.once.Do(func() { p.peers.add(-1) })
	return p.Conn.Close()
}
