package guestagent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// Errors to tell apart with errors.Is.
var (
	// ErrNoAgent: nothing answers in the guest.
	ErrNoAgent = errors.New("no guest agent answers")
	// ErrAnswer: the agent's answer makes no sense, or is too long.
	ErrAnswer = errors.New("the guest agent's answer makes no sense")

	errBufferFull = bufio.ErrBufferFull
)

// Client talks to one agent, one command at a time. Its methods may be called from several goroutines. All
// return when ctx ends at the latest, with an error that wraps ErrNoAgent if nothing has answered.
type Client struct {
	conn net.Conn
	turn chan struct{} // held by whom the rest belongs to
	ever atomic.Bool   // somebody has answered

	in     *bufio.Reader
	id     int64         // of the last synchronisation
	synced time.Time     // when it was sent; zero when it was answered
	resync time.Duration // how long its answer may take
}

// New is a client on a connection to the port of the guest agent, which it takes over. Its end is made known to the
// guest only when there is something to ask.
func New(conn net.Conn) *Client {
	return &Client{conn: conn, turn: make(chan struct{}, 1), in: bufio.NewReader(conn), id: time.Now().UnixNano() >> 20}
}

// Close ends the connection.
func (c *Client) Close() error {
	if err := c.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("closing the guest agent's port: %w", err)
	}
	return nil
}

// Answered tells whether an agent has ever answered.
func (c *Client) Answered() bool { return c.ever.Load() }

// Ping returns nil when the agent answers.
func (c *Client) Ping(ctx context.Context) error { return c.call(ctx, "guest-ping", nil, nil) }

// Interface is a network interface of the guest.
type Interface struct {
	Name      string
	MAC       string
	Addresses []string // with prefix length
}

// interfaceAnswer is an Interface as the agent says it.
type interfaceAnswer struct {
	Name      string `json:"name"`
	MAC       string `json:"hardware-address"`
	Addresses []struct {
		IP     string `json:"ip-address"`
		Prefix int    `json:"prefix"`
	} `json:"ip-addresses"`
}

// Interfaces lists the guest's network interfaces.
func (c *Client) Interfaces(ctx context.Context) ([]Interface, error) {
	var answer []interfaceAnswer
	if err := c.call(ctx, "guest-network-get-interfaces", nil, &answer); err != nil {
		return nil, err
	}
	var out []Interface
	for _, a := range answer[:min(len(answer), maxItems)] {
		i := Interface{Name: text(a.Name)}
		if mac, err := net.ParseMAC(a.MAC); err == nil && len(mac) == 6 {
			i.MAC = mac.String()
		}
		for _, ip := range a.Addresses[:min(len(a.Addresses), maxItems)] {
			addr, err := netip.ParseAddr(ip.IP)
			if err != nil {
				continue
			}
			if p := netip.PrefixFrom(addr.WithZone(""), ip.Prefix); p.IsValid() {
				i.Addresses = append(i.Addresses, p.String())
			}
		}
		out = append(out, i)
	}
	return out, nil
}

// OS is what the guest runs.
type OS struct {
	ID, Name, PrettyName, Version, Kernel, Machine string
}

// OS says what the guest runs.
func (c *Client) OS(ctx context.Context) (OS, error) {
	var a struct {
		ID         string `json:"id"`
		Name       string `json:"name"`
		PrettyName string `json:"pretty-name"`
		Version    string `json:"version-id"`
		Kernel     string `json:"kernel-release"`
		Machine    string `json:"machine"`
	}
	err := c.call(ctx, "guest-get-osinfo", nil, &a)
	return OS{
		ID: text(a.ID), Name: text(a.Name), PrettyName: text(a.PrettyName), Version: text(a.Version),
		Kernel: text(a.Kernel), Machine: text(a.Machine),
	}, err
}

// Hostname is the guest's name.
func (c *Client) Hostname(ctx context.Context) (string, error) {
	var a struct {
		Name string `json:"host-name"`
	}
	err := c.call(ctx, "guest-get-host-name", nil, &a)
	return text(a.Name), err
}

// Freeze flushes and freezes the guest's file systems and returns how many. They stay so until Thaw, so the
// caller must call it however it goes on; also after an error, which may have come when some were frozen.
func (c *Client) Freeze(ctx context.Context) (int, error) {
	return c.count(ctx, "guest-fsfreeze-freeze")
}

// Thaw lets the guest write again and returns how many file systems were thawed.
func (c *Client) Thaw(ctx context.Context) (int, error) { return c.count(ctx, "guest-fsfreeze-thaw") }

func (c *Client) count(ctx context.Context, name string) (n int, err error) {
	err = c.call(ctx, name, nil, &n)
	return max(n, 0), err
}

// Frozen tells whether file systems are frozen.
func (c *Client) Frozen(ctx context.Context) (bool, error) {
	var status string
	if err := c.call(ctx, "guest-fsfreeze-status", nil, &status); err != nil {
		return false, err
	}
	return status == "frozen", nil
}

// ShutdownMode is how a guest ends.
type ShutdownMode string

// The modes.
const (
	PowerDown ShutdownMode = "powerdown"
	Halt      ShutdownMode = "halt"
	Reboot    ShutdownMode = "reboot"
)

// refuseTimeout is how long an agent has to refuse a command to which it does not answer otherwise.
const refuseTimeout = 2 * time.Second

// Shutdown asks the guest to end. The agent does not answer when that goes well: nil means that it was asked.
func (c *Client) Shutdown(ctx context.Context, mode ShutdownMode) error {
	return c.tell(ctx, "guest-shutdown", map[string]any{"mode": mode})
}

// SuspendRAM asks the guest to sleep (ACPI S3), as Shutdown.
func (c *Client) SuspendRAM(ctx context.Context) error { return c.tell(ctx, "guest-suspend-ram", nil) }

// tell sends a command that is answered only when it is refused.
func (c *Client) tell(ctx context.Context, name string, args any) error {
	if err := c.lock(ctx); err != nil {
		return fmt.Errorf("guest agent: %s: %w", name, err)
	}
	defer c.unlock()
	stop := c.bind(ctx)
	defer stop()
	if err := c.ask(ctx, name, args); err != nil {
		return c.failure(ctx, name, err)
	}
	stop()
	_ = c.conn.SetDeadline(time.Now().Add(refuseTimeout))
	line, err := c.line(maxAnswer)
	if err != nil {
		return nil //nolint:nilerr // no answer is the good one
	}
	var refused *Error
	if err := decode(name, line, nil); errors.As(err, &refused) {
		return refused
	}
	return nil
}

// SetTime sets the guest's clock.
func (c *Client) SetTime(ctx context.Context, t time.Time) error {
	return c.call(ctx, "guest-set-time", map[string]any{"time": t.UnixNano()}, nil)
}
