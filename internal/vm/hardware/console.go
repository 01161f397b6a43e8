package hardware

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"

	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// Bounds of the first serial port, in bytes: what is kept of its output, and what may wait for one reader.
const (
	consoleBytes = 64 << 10
	followBytes  = 256 << 10
)

// console is the first serial port.
type console struct {
	conn net.Conn

	mu        sync.Mutex // guards the fields below
	tail      *qemu.Tail
	followers []*follower
	ended     bool
}

func newConsole(conn net.Conn) *console {
	c := &console{conn: conn, tail: qemu.NewTail(consoleBytes)}
	go c.pump()
	return c
}

// pump reads what the guest prints until QEMU has ended.
func (c *console) pump() {
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

// follow is one who reads and writes.
func (c *console) follow() *follower {
	f := &follower{console: c}
	f.more.L = &f.mu
	c.mu.Lock()
	defer c.mu.Unlock()
	f.waiting, f.ended = c.tail.Bytes(), c.ended
	if !c.ended {
		c.followers = append(c.followers, f)
	}
	return f
}

// follower is one connection to the console.
type follower struct {
	console *console

	mu      sync.Mutex // guards the fields below
	more    sync.Cond
	waiting []byte
	lost    int
	ended   bool
}

// add is called by the console, which must not wait.
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

func (f *follower) Write(p []byte) (int, error) { return f.console.conn.Write(p) }

func (f *follower) Close() error {
	c := f.console
	c.mu.Lock()
	c.followers = slices.DeleteFunc(c.followers, func(o *follower) bool { return o == f })
	c.mu.Unlock()
	f.add(nil, true)
	return nil
}

// Serial opens the first serial port. What the guest printed last comes first. A reader that is too slow
// loses output, the guest never waits. It ends with the machine.
func (m *Machine) Serial() io.ReadWriteCloser { return m.console.follow() }

// Console returns the last output of the first serial port, at most 64 KiB. The guest wrote it.
func (m *Machine) Console() []byte {
	m.console.mu.Lock()
	defer m.console.mu.Unlock()
	return m.console.tail.Bytes()
}

// Agent is the guest agent's client. It is one for the whole life of the machine.
func (m *Machine) Agent() *guestagent.Client { return m.agent }

// VNC opens the display: a connection that speaks RFB, without authentication. There may be several.
func (m *Machine) VNC(ctx context.Context) (net.Conn, error) {
	const doing = "opening the display"
	ours, theirs, err := qemu.SocketPair()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer theirs.Close()
	m.display.Lock()
	defer m.display.Unlock()
	err = m.do(
		ctx, doing,
		qmp.Command{Name: "getfd", Args: map[string]any{"fdname": "vnc"}, File: theirs},
		qmp.Command{Name: "add_client", Args: map[string]any{"protocol": "vnc", "fdname": "vnc", "skipauth": true}},
	)
	if err != nil {
		_ = ours.Close()
		return nil, err
	}
	return ours, nil
}
