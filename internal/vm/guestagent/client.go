package guestagent

import (
	"context"
	"errors"
	"net"
	"time"
)

// Errors to tell apart with errors.Is.
var (
	// ErrNoAgent: nothing answers in the guest.
	ErrNoAgent = errors.New("no guest agent answers")
	// ErrAnswer: the agent's answer makes no sense, or is too long.
	ErrAnswer  = errors.New("the guest agent's answer makes no sense")
	errUnbuilt = errors.New("the guest agent's client is not in this build")
)

// Client talks to one agent, one command at a time. Its methods may be called from several goroutines. All
// return when ctx ends at the latest, with an error that wraps ErrNoAgent if nothing has answered.
type Client struct{}

// New is a client on a connection to the port of the guest agent, which it takes over.
func New(conn net.Conn) *Client { return &Client{} }

// Close ends the connection.
func (c *Client) Close() error { return nil }

// Ping returns nil when the agent answers.
func (c *Client) Ping(ctx context.Context) error { return errUnbuilt }

// Interface is a network interface of the guest.
type Interface struct {
	Name      string
	MAC       string
	Addresses []string // with prefix length
}

// Interfaces lists the guest's network interfaces.
func (c *Client) Interfaces(ctx context.Context) ([]Interface, error) { return nil, errUnbuilt }

// OS is what the guest runs.
type OS struct {
	ID, Name, PrettyName, Version, Kernel, Machine string
}

// OS says what the guest runs.
func (c *Client) OS(ctx context.Context) (OS, error) { return OS{}, errUnbuilt }

// Hostname is the guest's name.
func (c *Client) Hostname(ctx context.Context) (string, error) { return "", errUnbuilt }

// Command is run in the guest.
type Command struct {
	Path  string // of the program, or a name in the guest's PATH
	Args  []string
	Env   []string // added to the agent's
	Stdin []byte   // at most MaxStdin
}

// MaxStdin bounds Command.Stdin: the agent takes it in one message.
const MaxStdin = 1 << 20

// MaxOutput bounds each output that Exec returns. The agent itself keeps 16 MiB.
const MaxOutput = 4 << 20

// Result is how a command ended.
type Result struct {
	ExitCode       int
	Signal         int // that ended it, on Unix
	Stdout, Stderr []byte
	Truncated      bool // there was more output
}

// Exec runs a command in the guest and waits for its end. It goes on in the guest when ctx ends. The output
// is the guest's word, not cleaned.
func (c *Client) Exec(ctx context.Context, cmd Command) (Result, error) { return Result{}, errUnbuilt }

// Freeze flushes and freezes the guest's file systems and returns how many. They stay so until Thaw, so the
// caller must call it however it goes on; also after an error, which may have come when some were frozen.
func (c *Client) Freeze(ctx context.Context) (int, error) { return 0, errUnbuilt }

// Thaw lets the guest write again and returns how many file systems were thawed.
func (c *Client) Thaw(ctx context.Context) (int, error) { return 0, errUnbuilt }

// Frozen tells whether file systems are frozen.
func (c *Client) Frozen(ctx context.Context) (bool, error) { return false, errUnbuilt }

// ShutdownMode is how a guest ends.
type ShutdownMode string

// The modes.
const (
	PowerDown ShutdownMode = "powerdown"
	Halt      ShutdownMode = "halt"
	Reboot    ShutdownMode = "reboot"
)

// Shutdown asks the guest to end. The agent does not answer when that goes well: nil means that it was asked.
func (c *Client) Shutdown(ctx context.Context, mode ShutdownMode) error { return errUnbuilt }

// SetTime sets the guest's clock.
func (c *Client) SetTime(ctx context.Context, t time.Time) error { return errUnbuilt }

// SuspendRAM asks the guest to sleep (ACPI S3), as Shutdown.
func (c *Client) SuspendRAM(ctx context.Context) error { return errUnbuilt }
