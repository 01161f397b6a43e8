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
	size     unix.Winsize     // to apply at start
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

// stdio is the child's and the parent's end of everything a start needs.
type stdio struct {
	child  []*os.File // descriptors 0, 1, 2
	input  *os.File   // parent's end of stdin
	output [2]*os.File
	socket *os.File // parent's end of the console socket
}

func (s *stdio) closeChild() {
	for _, f := range s.child {
		_ = f.Close()
	}
	s.child = nil
}

func (s *stdio) closeAll() {
	s.closeChild()
	for _, f := range []*os.File{s.input, s.output[0], s.output[1], s.socket} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// pipe makes a pipe of which init's end is non-blocking.
func pipe(initReads bool) (childEnd, initEnd *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("making pipe: %w", err)
	}
	mine, theirs := fds[1], fds[0]
	if initReads {
		mine, theirs = theirs, mine
	}
	if err := unix.SetNonblock(mine, true); err != nil {
		return nil, nil, fmt.Errorf("making pipe: %w", err)
	}
	return os.NewFile(uintptr(theirs), "pipe"), os.NewFile(uintptr(mine), "pipe"), nil
}

// open makes the pipes, or the console socket.
func (p *process) open() (s *stdio, err error) {
	s = &stdio{}
	defer func() {
		if err != nil {
			s.closeAll()
		}
	}()
	var null *os.File
	if p.terminal || !p.stdin {
		if null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
			return s, err
		}
	}
	if p.terminal {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return s, fmt.Errorf("making console socket: %w", err)
		}
		s.socket = os.NewFile(uintptr(fds[0]), "console")
		s.child = []*os.File{os.NewFile(uintptr(fds[1]), "console"), null}
		return s, nil
	}
	s.child = []*os.File{null}
	if p.stdin {
		if s.child[0], s.input, err = pipe(false); err != nil {
			return s, err
		}
	}
	for i := range s.output {
		child, mine, err := pipe(true)
		if err != nil {
			return s, err
		}
		s.child, s.output[i] = append(s.child, child), mine
	}
	return s, nil
}

// launch says into what a process is started.
type launch struct {
	helper string
	flags  uintptr
	pidNS  *os.File
	cgroup *os.File
	target *os.File // pidfd that the program joins, nil for a container's first process
}

// start runs the helper with the process's program and returns when it has executed the command.
// spawn starts goroutines on behalf of the runtime.
func (p *process) start(r *Reaper, l launch, spawn func(func())) (err error) {
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
	io, err := p.open()
	if err != nil {
		return err
	}
	child, err := fork(r, l, prog, io)
	if err != nil {
		io.closeAll()
		return err
	}
	if p.terminal {
		if err := p.console(io); err != nil {
			_ = r.kill(child.pid, unix.SIGKILL)
			io.closeAll()
			return err
		}
	} else {
		p.outputs[0].file, p.outputs[1].file = io.output[0], io.output[1]
	}
	p.child, p.running = child, true
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
		spawn(func() { p.copyInput(io.input, true) })
	}
	return nil
}

// fork writes the program down, forks the helper and reads its report.
func fork(r *Reaper, l launch, prog *program.Program, s *stdio) (started, error) {
	mem, err := unix.MemfdCreate("program", unix.MFD_CLOEXEC)
	if err != nil {
		return started{}, fmt.Errorf("writing exec program: %w", err)
	}
	memfd := os.NewFile(uintptr(mem), "program")
	defer memfd.Close()
	if _, err := memfd.Write(prog.Code); err != nil {
		return started{}, fmt.Errorf("writing exec program: %w", err)
	}
	errWrite, errRead, err := pipe(true)
	if err != nil {
		return started{}, err
	}
	defer errRead.Close()
	c := child{path: l.helper, flags: l.flags, pidNS: l.pidNS, cgroup: l.cgroup}
	for i := range 3 {
		c.files = append(c.files, s.child[min(i, len(s.child)-1)].Fd())
	}
	c.files = append(c.files, memfd.Fd(), errWrite.Fd()) // program.FD, program.ErrorFD
	if l.target != nil {
		c.files = append(c.files, l.target.Fd()) // program.TargetFD
	}
	ch, err := r.fork(c)
	_ = errWrite.Close()
	if err != nil {
		return started{}, err
	}
	s.closeChild()
	report := make([]byte, program.ReportSize)
	n, err := io.ReadFull(errRead, report)
	if errors.Is(err, io.EOF) {
		// Executed, and the pipe closed with it; or killed before: then the exit status says so.
		return ch, nil
	}
	<-ch.exit
	_ = ch.pidFD.Close()
	return started{}, fmt.Errorf("unable to start container process: error during container init: %w",
		prog.Error(report[:n]))
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
