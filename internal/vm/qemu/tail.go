package qemu

import (
	"io"
	"strings"
	"sync"
)

// Tail keeps the last bytes of a stream. Its buffer grows with use up to its limit.
type Tail struct {
	limit int

	mu   sync.Mutex // guards the fields below
	buf  []byte
	next int // where the next byte goes once buf has limit bytes
}

// NewTail keeps limit bytes.
func NewTail(limit int) *Tail { return &Tail{limit: limit} }

// Drain reads r to its end.
func (g *Tail) Drain(r io.Reader) {
	chunk := make([]byte, 1024)
	for {
		n, err := r.Read(chunk)
		g.Add(chunk[:n])
		if err != nil {
			return
		}
	}
}

// Add adds bytes to the end.
func (g *Tail) Add(p []byte) {
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

// Bytes returns what is kept, oldest first.
func (g *Tail) Bytes() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]byte, 0, len(g.buf))
	out = append(out, g.buf[g.next:]...)
	return append(out, g.buf[:g.next]...)
}

// LastLines returns the last n non-empty lines joined by " | ", with control characters removed:
// the guest wrote them.
func LastLines(s string, n int) string {
	var lines []string
	for line := range strings.Lines(s) {
		line = strings.TrimSpace(strings.Map(printable, line))
		if line != "" {
			lines = append(lines, line)
		}
	}
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, " | ")
}

func printable(r rune) rune {
	if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
		return ' '
	}
	return r
}
