package container

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/program"
)

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

// close closes both ends of everything.
func (s *stdio) close() {
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

// openStdio makes the pipes, or the console socket.
func openStdio(terminal, stdin bool) (s *stdio, err error) {
	s = &stdio{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	var null *os.File
	if terminal || !stdin {
		if null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
			return s, err
		}
	}
	if terminal {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return s, fmt.Errorf("making console socket: %w", err)
		}
		s.socket = os.NewFile(uintptr(fds[0]), "console")
		s.child = []*os.File{os.NewFile(uintptr(fds[1]), "console"), null}
		return s, nil
	}
	s.child = []*os.File{null}
	if stdin {
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

// helper is an exec helper that waits for its program.
type helper struct {
	child   started
	stdio   *stdio
	program *os.File // write end
	report  *os.File // read end
}

// newHelper forks a helper. It takes over s, also when it fails.
func newHelper(r *Reaper, l launch, s *stdio) (_ *helper, err error) {
	h := &helper{stdio: s}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	progRead, progWrite, err := pipe(false)
	if err != nil {
		return nil, err
	}
	h.program = progWrite
	defer progRead.Close()
	errWrite, errRead, err := pipe(true)
	if err != nil {
		return nil, err
	}
	h.report = errRead
	defer errWrite.Close()
	c := child{path: l.helper, flags: l.flags, pidNS: l.pidNS, cgroup: l.cgroup}
	for i := range 3 {
		c.files = append(c.files, s.child[min(i, len(s.child)-1)].Fd())
	}
	c.files = append(c.files, progRead.Fd(), errWrite.Fd()) // program.FD, program.ErrorFD
	if l.target != nil {
		c.files = append(c.files, l.target.Fd()) // program.TargetFD
	}
	if h.child, err = r.fork(c); err != nil {
		return nil, err
	}
	s.closeChild()
	return h, nil
}

// execute sends the program and waits until the command is executed. After an error the helper and
// all of its files are gone.
func (h *helper) execute(prog *program.Program) error {
	_, werr := h.program.Write(prog.Code) // a helper that died meanwhile says why in its status
	_ = h.program.Close()
	report := make([]byte, program.ReportSize)
	n, err := io.ReadFull(h.report, report)
	_ = h.report.Close()
	if errors.Is(err, io.EOF) && werr == nil {
		// Executed, and the pipe closed with it; or killed before: then the exit status says so.
		return nil
	}
	<-h.child.exit
	h.stdio.close()
	_ = h.child.pidFD.Close()
	return fmt.Errorf("unable to start container process: error during container init: %w", prog.Error(report[:n]))
}

// close ends a helper that is not needed: without a program it exits.
func (h *helper) close() {
	for _, f := range []*os.File{h.program, h.report, h.child.pidFD} {
		if f != nil {
			_ = f.Close()
		}
	}
	h.stdio.close()
}
