package machine

import (
	"fmt"
	"io"
	"sync"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"

	"atoll.dev/atoll/internal/shim/stdio"
)

// pidBase is above every pid that a Linux host can have: what containerd takes for a pid names no process.
const pidBase = 1 << 22

// Exit statuses.
const (
	statusFailed = 128 // it could not be started
	statusKilled = 137
)

// process is the container's only one, or an exec.
type process struct {
	id     string // of the container
	exec   string // "" for the container's own
	pid    uint32
	config stdio.Config
	io     *stdio.IO
	run    func(ends) uint32 // of an exec: does what it is for and returns the exit status
	cancel func()            // of an exec: ends that
	ended  chan struct{}     // closed when it has exited

	mu     sync.Mutex // guards the fields below
	begun  bool
	status uint32
	at     time.Time
}

// begin reserves the start, which happens once.
func (p *process) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.begun || p.hasEnded() {
		return fmt.Errorf("process was started before: %w", errdefs.ErrFailedPrecondition)
	}
	p.begun = true
	return nil
}

// end notes the exit; only the first one counts.
func (p *process) end(status uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hasEnded() {
		return false
	}
	p.status, p.at = status, time.Now()
	close(p.ended)
	if p.cancel != nil {
		p.cancel()
	}
	return true
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// state is the state in containerd's terms, and the exit when there is one.
func (p *process) state() (tasktypes.Status, uint32, time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.hasEnded():
		return tasktypes.Status_STOPPED, p.status, p.at
	case p.begun:
		return tasktypes.Status_RUNNING, 0, time.Time{}
	}
	return tasktypes.Status_CREATED, 0, time.Time{}
}

// ends are a process's own ends of its standard streams. With a terminal err is where out is.
type ends struct {
	in       *io.PipeReader // nil without a standard input
	out, err *io.PipeWriter
}

// close ends all of them: what was written is still read, what comes in is not wanted any more.
func (e ends) close() {
	if e.in != nil {
		_ = e.in.CloseWithError(io.ErrClosedPipe)
	}
	_ = e.out.Close()
	_ = e.err.Close()
}

// stream is one stream as package stdio has it. Close ends the direction towards the process.
type stream struct {
	io.Reader
	in *io.PipeWriter // nil: what is written is dropped
}

func (s stream) Write(p []byte) (int, error) {
	if s.in == nil {
		return len(p), nil
	}
	return s.in.Write(p)
}

func (s stream) Close() error {
	if s.in == nil {
		return nil
	}
	return s.in.Close()
}

// connect joins the process's ends to those of containerd.
func (p *process) connect() (ends, error) {
	var e ends
	var toProcess *io.PipeWriter
	fromOut, out := io.Pipe()
	e.out, e.err = out, out
	if p.io.HasStdin() {
		e.in, toProcess = io.Pipe()
	}
	fromErr := fromOut
	if !p.config.Terminal {
		fromErr, e.err = io.Pipe()
	}
	err := p.io.Start(p.config.Terminal, func(fd int) (stdio.Stream, error) {
		switch {
		case fd == 0 && p.config.Terminal:
			return stream{Reader: fromOut, in: toProcess}, nil
		case fd == 0:
			return stream{Reader: eof{}, in: toProcess}, nil
		case fd == 1:
			return stream{Reader: fromOut}, nil
		}
		return stream{Reader: fromErr}, nil
	})
	return e, err
}

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }
