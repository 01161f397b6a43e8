package container

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/program"
)

// State is what the host learns about a process that has ended.
type State struct {
	Status    int // exit code, or 128 + signal
	ExitedAt  time.Time
	OOMKilled bool
}

// stream is a yamux stream as far as stdio is concerned.
type stream interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
}

// process is a container's first process or an exec.
//
//	created --start--> running --exit, output drained--> stopped
type process struct {
	terminal bool
	stdin    bool
	prog     *program.Program // until started
	size     unix.Winsize     // that was asked for since it was made
	input    chan stream      // gets one
	outputs  [2]*output       // stdout, stderr; a terminal has only the first
	taken    [3]bool          // streams that have come

	mu      sync.Mutex
	child   started
	running bool
	failed  bool     // could not be started
	master  *os.File // of the terminal
	source  stream   // what copyInput reads from
	state   State
	done    chan struct{} // closed when stopped
	ended   chan struct{} // closed when the process is gone, before its output is drained
}

func newProcess(prog *program.Program, terminal, stdin bool) *process {
	p := &process{
		prog: prog, terminal: terminal, stdin: stdin, input: make(chan stream, 1),
		done: make(chan struct{}), ended: make(chan struct{}),
	}
	for i := range p.outputs {
		if !terminal || i == 0 {
			p.outputs[i] = newOutput()
		}
	}
	return p
}

// attach gives the process the stream of one of its descriptors.
func (p *process) attach(fd int, s stream) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken[fd] || p.terminal && fd != 0 || !p.terminal && fd == 0 && !p.stdin {
		return fmt.Errorf("descriptor %d: %w", fd, ErrInvalid)
	}
	if p.failed || p.isStopped() || fd == 0 && !p.terminal && isClosed(p.ended) {
		return fmt.Errorf("process has ended: %w", ErrNotFound)
	}
	p.taken[fd] = true
	switch {
	case p.terminal:
		p.outputs[0].stream <- s
		p.input <- s
	case fd == 0:
		p.input <- s
	default:
		p.outputs[fd-1].stream <- s
	}
	return nil
}

// start runs the helper with the process's program and returns when it has executed the command.
// ready is a helper that waits for it already, or nil. spawn starts goroutines on behalf of the
// runtime.
func (p *process) start(r *Reaper, l launch, ready *helper, spawn func(func())) (err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.prog == nil {
		return fmt.Errorf("process was started before: %w", ErrState)
	}
	prog := p.prog
	p.prog = nil
	defer func() {
		if err != nil {
			p.abort()
		}
	}()
	h := ready
	if h == nil {
		io, err := openStdio(p.terminal, p.stdin)
		if err != nil {
			return err
		}
		if h, err = newHelper(r, l, io); err != nil {
			return err
		}
	}
	if err := h.execute(prog); err != nil {
		return err
	}
	if p.terminal {
		if err := p.console(h.stdio); err != nil {
			_ = r.kill(h.child.pid, unix.SIGKILL)
			h.stdio.close()
			return err
		}
	} else {
		p.outputs[0].file, p.outputs[1].file = h.stdio.output[0], h.stdio.output[1]
	}
	p.child, p.running = h.child, true
	for _, o := range p.outputs {
		if o != nil {
			spawn(o.run)
		}
	}
	switch {
	case p.terminal:
		master := p.master
		spawn(func() { p.copyInput(master, false) })
	case p.stdin:
		spawn(func() { p.copyInput(h.stdio.input, true) })
	}
	return nil
}

// console receives the master of the terminal, which the helper has sent before it executed.
func (p *process) console(s *stdio) error {
	defer s.socket.Close()
	oob, data := make([]byte, unix.CmsgSpace(4)), make([]byte, 1)
	_, n, _, _, err := unix.Recvmsg(int(s.socket.Fd()), data, oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return fmt.Errorf("receiving console: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return fmt.Errorf("receiving console: %d messages: %w", len(msgs), errors.Join(err, unix.EPROTO))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("receiving console: %w", errors.Join(err, unix.EPROTO))
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return fmt.Errorf("receiving console: %w", err)
	}
	if p.size != (unix.Winsize{}) {
		_ = unix.IoctlSetWinsize(fds[0], unix.TIOCSWINSZ, &p.size)
	}
	p.master = os.NewFile(uintptr(fds[0]), "console")
	p.outputs[0].file = p.master
	return nil
}

// copyInput copies the host's stream into the process's stdin until the stream ends or the process.
func (p *process) copyInput(dst *os.File, closeAtEOF bool) {
	if closeAtEOF {
		defer dst.Close()
	}
	var src stream
	select {
	case src = <-p.input:
	case <-p.ended:
		return
	}
	if p.setSource(src) {
		_ = src.SetReadDeadline(time.Unix(1, 0))
	}
	buf := make([]byte, copyBuffer)
	for {
		n, rerr := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				break
			}
		}
		if rerr != nil {
			break
		}
	}
	if closeAtEOF {
		_ = src.Close()
	}
}

// wait waits for the process to end and its output to be passed on, then marks it stopped. oom is
// asked once the process is gone.
func (p *process) wait(oom func() bool) {
	e := <-p.child.exit
	close(p.ended)
	oomKilled := oom()
	p.endInput()
	for _, o := range p.outputs {
		if o != nil {
			o.drain()
		}
	}
	_ = p.child.pidFD.Close()
	p.mu.Lock()
	p.state = State{Status: e.status, ExitedAt: e.at, OOMKilled: oomKilled}
	p.mu.Unlock()
	close(p.done)
}

// abort ends the streams of a process that could not be started; later ones are refused. The lock
// is held.
func (p *process) abort() {
	p.failed = true
	for _, o := range p.outputs {
		if o == nil {
			continue
		}
		select {
		case dst := <-o.stream:
			_ = dst.Close()
		default:
		}
	}
	select {
	case src := <-p.input:
		_ = src.Close()
	default:
	}
}

// setSource notes the stream that copyInput reads from; it reports whether the process has ended.
func (p *process) setSource(s stream) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.source = s
	return !p.running
}

// endInput wakes copyInput, or drops the stream that came too late for it.
func (p *process) endInput() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = false
	if p.source != nil {
		_ = p.source.SetReadDeadline(time.Unix(1, 0))
		return
	}
	select {
	case s := <-p.input:
		if !p.terminal {
			_ = s.Close()
		}
	default:
	}
}

// resize sets the size of the terminal, now or at start.
func (p *process) resize(width, height uint16) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.terminal {
		return fmt.Errorf("process has no terminal: %w", ErrState)
	}
	p.size = unix.Winsize{Col: width, Row: height}
	if p.master == nil {
		return nil
	}
	raw, err := p.master.SyscallConn()
	if err != nil {
		return fmt.Errorf("resizing terminal: %w", err)
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &p.size) })
	if err := errors.Join(cerr, err); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("resizing terminal: %w", err)
	}
	return nil
}

// isStopped reports whether the process has ended and its state is final.
func (p *process) isStopped() bool { return isClosed(p.done) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
