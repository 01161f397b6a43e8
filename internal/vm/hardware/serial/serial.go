// Package serial shares a serial port of a virtual machine: one reads what the guest prints and keeps the end of it,
// others come and go.
//
// It knows no machine and starts nothing. Package hardware uses it for the first serial port. The guest writes what
// it likes; what is kept of it is bounded, and nothing here waits for a reader.
package serial

import (
	"fmt"
	"io"
	"net"
	"slices"
	"sync"

	"atoll.dev/atoll/internal/vm/qemu"
)

// Bounds of a port, in bytes: what is kept of its output, and what may wait for one reader.
const (
	tailBytes   = 64 << 10
	followBytes = 256 << 10
)

// Port is a serial port of a machine.
type Port struct {
	conn net.Conn

	mu        sync.Mutex // guards the fields below
	tail      *qemu.Tail
	followers []*follower
	ended     bool
}

// New reads a serial port until it ends, and closes it then.
func New(conn net.Conn) *Port {
	c := &Port{conn: conn, tail: qemu.NewTail(tailBytes)}
	go c.pump()
	return c
}

// pump reads what the guest prints until QEMU has ended.
func (c *Port) pump() {
	chunk := make([]byte, 4096)
	for {
		n, err := c.conn.Read(chunk)
		c.mu.Lock()
		c.tail.Add(chunk[:n])
		for _, f := range c.followers {
			f.add(chunk[:n], err != nil)
		}
		if err != nil {
			c.ended, c.followers = true, nil
			c.mu.Unlock()
			_ = c.conn.Close()
			return
		}
		c.mu.Unlock()
	}
}

// Tail is the last output, at most 64 KiB.
func (c *Port) Tail() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tail.Bytes()
}

// Follow opens the port. What it printed last comes first. A reader that is too slow loses output, and is told so;
// the guest never waits. It ends with the machine.
func (c *Port) Follow() io.ReadWriteCloser {
	f := &follower{port: c}
	f.more.L = &f.mu
	c.mu.Lock()
	defer c.mu.Unlock()
	f.waiting, f.ended = c.tail.Bytes(), c.ended
	if !c.ended {
		c.followers = append(c.followers, f)
	}
	return f
}

// follower is one connection to the port.
type follower struct {
	port *Port

	mu      sync.Mutex // guards the fields below
	more    sync.Cond
	waiting []byte
	lost    int
	ended   bool
}

// add is called by the port, which must not wait.
func (f *follower) add(p []byte, ended bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.waiting)+len(p) > followBytes {
		f.lost += len(p)
	} else {
		if f.lost > 0 {
			f.waiting = fmt.Appendf(f.waiting, "\r\n[%d bytes of output are missing here]\r\n", f.lost)
			f.lost = 0
		}
		f.waiting = append(f.waiting, p...)
	}
	f.ended = f.ended || ended
	f.more.Broadcast()
}

func (f *follower) Read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.waiting) == 0 {
		if f.ended {
			return 0, io.EOF
		}
		f.more.Wait()
	}
	n := copy(p, f.waiting)
	f.waiting = f.waiting[n:]
	if len(f.waiting) == 0 {
		f.waiting = nil
	}
	return n, nil
}

func (f *follower) Write(p []byte) (int, error) { return f.port.conn.Write(p) }

func (f *follower) Close() error {
	c := f.port
	c.mu.Lock()
	c.followers = slices.DeleteFunc(c.followers, func(o *follower) bool { return o == f })
	c.mu.Unlock()
	f.add(nil, true)
	return nil
}
