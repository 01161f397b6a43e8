package guestagent

import (
	"context"
	"fmt"
	"time"
)

// Command is run in the guest.
type Command struct {
	Path  string // of the program, or a name in the guest's PATH
	Args  []string
	Env   []string // added to the agent's
	Stdin []byte   // at most MaxStdin
}

// MaxStdin bounds Command.Stdin: the agent takes it in one message.
const MaxStdin = 1 << 20

// MaxOutput bounds each output that Exec returns, in bytes. A command with much more fails, since the agent says all of
// it at once.
const MaxOutput = 4 << 20

// Result is how a command ended.
type Result struct {
	ExitCode       int
	Signal         int // that ended it, on Unix
	Stdout, Stderr []byte
	Truncated      bool // there was more output
}

// Bounds of how often the agent is asked whether a command has ended.
const (
	firstPoll = 10 * time.Millisecond
	lastPoll  = 500 * time.Millisecond
)

// silence is how long an agent may take to say whether a command has ended. An emulated guest may starve for a while.
const silence = 2 * time.Minute

// Exec runs a command in the guest and waits for its end. It goes on in the guest when ctx ends, or when the agent
// has fallen silent, which is ErrNoAgent. The output is the guest's word, not cleaned. Other commands may be given
// meanwhile.
func (c *Client) Exec(ctx context.Context, cmd Command) (Result, error) {
	if len(cmd.Stdin) > MaxStdin {
		return Result{}, fmt.Errorf("guest agent: running %s: %d bytes of input; at most %d are possible", cmd.Path, len(cmd.Stdin), MaxStdin)
	}
	args := map[string]any{"path": cmd.Path, "capture-output": true}
	if len(cmd.Args) > 0 {
		args["arg"] = cmd.Args
	}
	if len(cmd.Env) > 0 {
		args["env"] = cmd.Env
	}
	if len(cmd.Stdin) > 0 {
		args["input-data"] = cmd.Stdin // in base64
	}
	var started struct {
		PID int64 `json:"pid"`
	}
	if err := answered(ctx, func(ctx context.Context) error { return c.call(ctx, "guest-exec", args, &started) }); err != nil {
		return Result{}, err
	}
	for wait := firstPoll; ; wait = min(wait*3/2, lastPoll) {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return Result{}, fmt.Errorf("guest agent: waiting for %s: %w", cmd.Path, ctx.Err())
		}
		var s execStatus
		err := answered(ctx, func(ctx context.Context) error {
			return c.exchange(ctx, "guest-exec-status", map[string]any{"pid": started.PID}, &s, maxStatus)
		})
		if err != nil || s.Exited {
			return s.result(), err
		}
	}
}

// answered bounds how long one answer may take.
func answered(ctx context.Context, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, silence)
	defer cancel()
	return ask(ctx)
}

// execStatus is the answer to guest-exec-status.
type execStatus struct {
	Exited    bool   `json:"exited"`
	ExitCode  int    `json:"exitcode"`
	Signal    int    `json:"signal"`
	Stdout    []byte `json:"out-data"` // in base64
	Stderr    []byte `json:"err-data"`
	OutputCut bool   `json:"out-truncated"`
	ErrorCut  bool   `json:"err-truncated"`
}

func (s *execStatus) result() Result {
	return Result{
		ExitCode: s.ExitCode, Signal: s.Signal,
		Stdout: s.Stdout[:min(len(s.Stdout), MaxOutput)], Stderr: s.Stderr[:min(len(s.Stderr), MaxOutput)],
		Truncated: s.OutputCut || s.ErrorCut || len(s.Stdout) > MaxOutput || len(s.Stderr) > MaxOutput,
	}
}
