package supervise

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// DefaultStopTimeout is how long a child process may take to end after SIGTERM
// before it is killed.
const DefaultStopTimeout = 30 * time.Second

// maxLastError bounds how much of a log is searched for a process's last words.
const maxLastError = 4 << 10

// Process is a child process. It gets SIGTERM to end, and also when the
// supervising process dies, however that happens.
type Process struct {
	// Path is the executable; Args is its argv, with argv[0].
	Path string
	Args []string
	// Env is the whole environment; nil means that of the supervisor.
	Env []string
	// Log is the file that gets standard output and error. The process holds
	// it open itself, so that it can go on logging when the supervisor dies.
	Log string
	// StopTimeout is the time between SIGTERM and SIGKILL. Zero means
	// DefaultStopTimeout.
	StopTimeout time.Duration
	// Prepare, when not nil, runs before every start.
	Prepare func() error
}

// child is a running Process.
type child struct {
	cmd         *exec.Cmd
	stopTimeout time.Duration
	log         string
	logStart    int64 // where its own output begins
}

// start starts the process on the spawner's thread.
func (p *Process) start(on *spawner) (*child, error) {
	if p.Prepare != nil {
		if err := p.Prepare(); err != nil {
			return nil, err
		}
	}
	log, err := OpenLog(p.Log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	logStart, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("opening the log file: %w", err)
	}
	cmd := &exec.Cmd{
		Path:   p.Path,
		Args:   p.Args,
		Env:    p.Env,
		Stdout: log,
		Stderr: log,
		SysProcAttr: &syscall.SysProcAttr{
			Pdeathsig: syscall.SIGTERM,
			// Ctrl-C in a terminal must reach the supervisor only, which stops
			// its children in order.
			Setpgid: true,
		},
	}
	on.do(func() { err = cmd.Start() })
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", p.Path, err)
	}
	c := &child{cmd: cmd, stopTimeout: p.StopTimeout, log: p.Log, logStart: logStart}
	if c.stopTimeout == 0 {
		c.stopTimeout = DefaultStopTimeout
	}
	return c, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// wait returns how the process ended. When ctx ends, it makes it end.
func (c *child) wait(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- c.cmd.Wait() }()
	select {
	case err := <-done:
		return c.describe(err)
	case <-ctx.Done():
	}
	// Signal fails only when the process has ended, which the channel tells.
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-done:
		return c.describe(err)
	case <-time.After(c.stopTimeout):
	}
	_ = c.cmd.Process.Kill()
	return fmt.Errorf("killed, it did not end within %s of SIGTERM: %w", c.stopTimeout, <-done)
}

// describe says in words how a process ended, with its own words where it wrote any.
func (c *child) describe(err error) error {
	if err == nil {
		return fmt.Errorf("%w with exit code 0", errEnded)
	}
	if text := c.lastError(); text != "" {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// lastError is what the process wrote after "Error: " in the last line of its log that starts so.
func (c *child) lastError() string {
	f, err := os.Open(c.log)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	from := c.logStart
	if info.Size() < from {
		from = 0 // it was rotated
	}
	from = max(from, info.Size()-maxLastError)
	tail := make([]byte, info.Size()-from)
	if _, err := f.ReadAt(tail, from); err != nil {
		return ""
	}
	var last string
	for line := range strings.Lines(string(tail)) {
		if text, ok := strings.CutPrefix(line, "Error: "); ok {
			last = strings.TrimSpace(text)
		}
	}
	return last
}

// OpenLog opens a log file for appending and makes its directory. Every writer
// appends, so that the file can be truncated under them by a Rotator.
func OpenLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the log directory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return nil, fmt.Errorf("opening the log file: %w", err)
	}
	return f, nil
}

// spawner runs functions on one operating system thread. The kernel sends the
// parent-death signal when the *thread* that forked ends, and the Go runtime
// is free to end threads, so all children are forked on one that stays.
type spawner struct {
	requests chan func()
}

func newSpawner() *spawner { return &spawner{requests: make(chan func())} }

// start begins to serve do and returns the function that ends it.
func (s *spawner) start() (stop func()) {
	go func() {
		// Not unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		for f := range s.requests {
			f()
		}
	}()
	return func() { close(s.requests) }
}

// do runs f on the thread and returns when it has returned.
func (s *spawner) do(f func()) {
	done := make(chan struct{})
	s.requests <- func() {
		defer close(done)
		f()
	}
	<-done
}
