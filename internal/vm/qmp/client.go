package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Command is one QMP command.
type Command struct {
	Name   string
	Args   any      // marshalled to the "arguments" object; nil sends none
	File   *os.File // sent along for add-fd and getfd; stays open here
	Result any      // decoded from the reply when not nil
}

// Client is one QMP connection. All methods may be called from several goroutines.
type Client struct {
	conn    *net.UnixConn
	onEvent func(Event)
	ready   chan struct{} // closed when greeting is set
	done    chan struct{} // closed when err is set

	writeMu sync.Mutex // held over queueing and writing, so that both have the same order

	mu       sync.Mutex // guards the fields below
	pending  []*call
	greeting Greeting
	greeted  bool
	err      error
}

// call is one command on its way.
type call struct {
	name  string
	reply chan reply // buffered, so the reader never waits for a caller that gave up
}

type reply struct {
	data json.RawMessage
	err  error
}

// New takes over conn and starts reading it. onEvent, which may be nil, is called for every event
// in order, from the reading goroutine: it must not block and must not call the client.
//
// Commands may be queued at once, even before QEMU runs; the first must be qmp_capabilities.
func New(conn *net.UnixConn, onEvent func(Event)) *Client {
	c := &Client{
		conn:    conn,
		onEvent: onEvent,
		ready:   make(chan struct{}),
		done:    make(chan struct{}),
	}
	go c.read()
	return c
}

// Greeting waits for QEMU's greeting.
func (c *Client) Greeting(ctx context.Context) (Greeting, error) {
	select {
	case <-c.ready:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.greeting, nil
	case <-c.done:
		return Greeting{}, c.Err()
	case <-ctx.Done():
		return Greeting{}, fmt.Errorf("waiting for the qmp greeting: %w", ctx.Err())
	}
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended; nil while it is up.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection. Calls in flight fail with ErrClosed.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	return nil
}

// Execute runs one command and decodes its reply into result unless that is nil.
func (c *Client) Execute(ctx context.Context, name string, args, result any) error {
	return c.Run(ctx, Command{Name: name, Args: args, Result: result})
}

// Run sends all commands back to back and waits for all replies. QEMU runs every one of them, also
// after one has failed; Run returns the first failure.
//
// When ctx ends first, the commands may still take effect.
func (c *Client) Run(ctx context.Context, commands ...Command) error {
	calls, err := c.send(commands)
	if err != nil {
		return err
	}
	var first error
	for i, call := range calls {
		var r reply
		select {
		case r = <-call.reply:
		case <-ctx.Done():
			select {
			case r = <-call.reply: // both
			default:
				return fmt.Errorf("waiting for qmp %s: %w", call.name, ctx.Err())
			}
		}
		if r.err == nil && commands[i].Result != nil {
			if err := json.Unmarshal(r.data, commands[i].Result); err != nil {
				r.err = fmt.Errorf("parsing the reply to qmp %s: %w", call.name, err)
			}
		}
		if r.err != nil && first == nil {
			first = r.err
		}
	}
	return first
}

// send writes the commands. A file rides on the first byte of its command and starts a new packet:
// QEMU keeps the files of one packet only, and hands one out per command.
func (c *Client) send(commands []Command) ([]*call, error) {
	type packet struct {
		data []byte
		file *os.File
	}
	var packets []packet
	calls := make([]*call, len(commands))
	for i, cmd := range commands {
		data, err := encode(cmd)
		if err != nil {
			return nil, err
		}
		calls[i] = &call{name: cmd.Name, reply: make(chan reply, 1)}
		if cmd.File != nil || len(packets) == 0 {
			packets = append(packets, packet{file: cmd.File})
		}
		last := &packets[len(packets)-1]
		last.data = append(last.data, data...)
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return nil, c.err
	}
	c.pending = append(c.pending, calls...)
	c.mu.Unlock()
	for _, p := range packets {
		if err := c.write(p.data, p.file); err != nil {
			c.fail(fmt.Errorf("writing to qmp: %w", err))
			return nil, c.Err()
		}
	}
	return calls, nil
}

func (c *Client) write(data []byte, file *os.File) error {
	if file == nil {
		_, err := c.conn.Write(data)
		return err
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	var sendErr error
	err = raw.Control(func(fd uintptr) {
		n, _, sendErr = c.conn.WriteMsgUnix(data, unix.UnixRights(int(fd)), nil)
	})
	if err = errors.Join(err, sendErr); err != nil {
		return err
	}
	if n < len(data) {
		_, err = c.conn.Write(data[n:])
	}
	return err
}

func encode(cmd Command) ([]byte, error) {
	data, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{cmd.Name, cmd.Args})
	if err != nil {
		return nil, fmt.Errorf("encoding qmp %s: %w", cmd.Name, err)
	}
	return data, nil
}

// read runs until the connection ends.
func (c *Client) read() {
	scanner := bufio.NewScanner(c.conn)
	scanner.Buffer(make([]byte, 0, 2048), MaxMessage)
	for scanner.Scan() {
		line := bytes.TrimSpace(scanner.Bytes())
		if len(line) == 0 {
			continue
		}
		if err := c.handle(line); err != nil {
			c.fail(err)
			return
		}
	}
	if err := scanner.Err(); err != nil {
		c.fail(fmt.Errorf("%w: %w", ErrClosed, err))
		return
	}
	c.fail(ErrClosed)
}

// handle takes one message from QEMU.
func (c *Client) handle(line []byte) error {
	m, k, err := decode(line)
	if err != nil {
		return err
	}
	switch k {
	case kindEvent:
		if c.onEvent != nil {
			c.onEvent(Event{Name: m.Event, Data: m.Data})
		}
		return nil
	case kindGreeting:
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.greeted {
			return errors.New("reading qmp: second greeting")
		}
		v := m.QMP.Version
		c.greeted = true
		c.greeting = Greeting{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, v.Package}
		close(c.ready)
		return nil
	}
	c.mu.Lock()
	if len(c.pending) == 0 {
		c.mu.Unlock()
		return errors.New("reading qmp: reply without a command")
	}
	call := c.pending[0]
	c.pending = c.pending[1:]
	c.mu.Unlock()
	if k == kindError {
		call.reply <- reply{err: &Error{Command: call.name, Class: m.Error.Class, Desc: m.Error.Desc}}
		return nil
	}
	call.reply <- reply{data: m.Return}
	return nil
}

// fail ends the connection once, with the reason all waiting and later calls get.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	pending := c.pending
	c.pending = nil
	c.mu.Unlock()
	_ = c.conn.Close()
	for _, call := range pending {
		call.reply <- reply{err: fmt.Errorf("qmp %s: %w", call.name, err)}
	}
	close(c.done)
}
