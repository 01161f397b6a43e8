package vm

import (
	"io"
	"sync"
)

// consoleBytes is how much of the serial console is kept.
const consoleBytes = 16 << 10

// ring keeps the last bytes of a stream. Its buffer grows with use up to its limit.
type ring struct {
	limit int

	mu   sync.Mutex // guards the fields below
	buf  []byte
	next int // where the next byte goes once buf has limit bytes
}

func newRing(limit int) *ring { return &ring{limit: limit} }

// drain reads r to its end.
func (g *ring) drain(r io.Reader) {
	chunk := make([]byte, 1024)
	for {
		n, err := r.Read(chunk)
		g.write(chunk[:n])
		if err != nil {
			return
		}
	}
}

func (g *ring) write(p []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if room := g.limit - len(g.buf); room > 0 {
		n := min(room, len(p))
		g.buf = append(g.buf, p[:n]...)
		p = p[n:]
	}
	for len(p) > 0 {
		n := copy(g.buf[g.next:], p)
		p = p[n:]
		g.next = (g.next + n) % g.limit
	}
}

// bytes returns what is kept, oldest first.
func (g *ring) bytes() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]byte, 0, len(g.buf))
	out = append(out, g.buf[g.next:]...)
	return append(out, g.buf[:g.next]...)
}
