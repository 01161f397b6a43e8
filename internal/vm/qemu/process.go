package qemu

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxStderr bounds what is kept of QEMU's error output, in bytes.
const maxStderr = 16 << 10

// Credential is who QEMU runs as.
type Credential struct {
	UID, GID uint32
	Groups   []uint32 // supplementary groups, for example the one that may open /dev/kvm
}

// Process is a running QEMU.
type Process struct {
	proc   *os.Process
	stderr *os.File      // read end; QEMU's end never blocks and loses what does not fit
	done   chan struct{} // closed when the fields below are set
	state  *os.ProcessState
	err    error
}

// Spec is a process to start: QEMU, or a program that serves one.
type Spec struct {
	Args       []string   // the first is the path of the program
	Files      []*os.File // by descriptor, from 3 on; nil leaves a gap
	Credential Credential
	SmallPages bool // no huge pages, see run
}

// Start runs QEMU. The process is killed when this process dies. Files of the config may be closed once Start has returned.
func Start(cfg Config, cred Credential) (*Process, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("starting qemu: %w", err)
	}
	p, err := Spawn(Spec{Args: cfg.args(), Files: cfg.files()[3:], Credential: cred, SmallPages: cfg.Accel == "tcg"})
	if err != nil {
		return nil, fmt.Errorf("starting qemu: %w", err)
	}
	return p, nil
}

// Spawn starts a process that is killed when this process dies. Files may be closed once Spawn has returned.
func Spawn(spec Spec) (*Process, error) {
	if len(spec.Args) == 0 {
		return nil, errors.New("no program")
	}
	errR, errW, err := stderrPipe()
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		_ = errR.Close()
		_ = errW.Close()
		return nil, err
	}
	cred := spec.Credential
	attr := &os.ProcAttr{
		Dir: "/",
		// One malloc arena: I/O threads would otherwise each keep one of their own.
		Env:   []string{"PATH=/usr/bin:/bin", "MALLOC_ARENA_MAX=1"},
		Files: append([]*os.File{null, errW, errW}, spec.Files...),
		Sys: &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: cred.UID, Gid: cred.GID, Groups: cred.Groups},
			Pdeathsig:  syscall.SIGKILL,
			Setsid:     true,
		},
	}
	p := &Process{stderr: errR, done: make(chan struct{})}
	started := make(chan error, 1)
	go p.run(spec.Args, attr, spec.SmallPages, started)
	err = <-started
	_ = errW.Close()
	_ = null.Close()
	if err != nil {
		_ = errR.Close()
		return nil, err
	}
	return p, nil
}

// run starts the process and waits for its end, all on one OS thread that does nothing else.
//
// The kernel sends the parent-death signal when the *thread* that forked ends, not the process.
// Go threads end with a goroutine that was locked to them, so forking from just any thread could
// kill QEMU at some later time. This thread lives exactly as long as QEMU does: it is locked, waits
// for the process, and is never unlocked, so that it also takes its no_new_privs flag to the grave.
//
// An emulating QEMU has smallPages: it asks for huge ones for the code it translates, which leaves two
// megabytes of an idle machine unused. The setting is this process's, too, and its child inherits it.
func (p *Process) run(args []string, attr *os.ProcAttr, smallPages bool, started chan<- error) {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		started <- fmt.Errorf("setting no_new_privs: %w", err)
		return
	}
	if smallPages {
		if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
			started <- fmt.Errorf("turning huge pages off: %w", err)
			return
		}
	}
	proc, err := os.StartProcess(args[0], args, attr)
	if err != nil {
		started <- err
		return
	}
	p.proc = proc
	started <- nil
	p.state, p.err = proc.Wait()
	close(p.done)
}

// stderrPipe makes a pipe whose write end drops what does not fit: a guest that makes QEMU complain
// without end must not stop it, nor fill anything here.
func stderrPipe() (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("making a pipe: %w", err)
	}
	// Made non-blocking only after os.NewFile, which would otherwise hand them to the poller and
	// make them blocking again when the child inherits them.
	r = os.NewFile(uintptr(fds[0]), "qemu-stderr")
	w = os.NewFile(uintptr(fds[1]), "qemu-stderr")
	for _, fd := range fds {
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("making a pipe: %w", err), r.Close(), w.Close())
		}
	}
	return r, w, nil
}

// PID is the process id, also after the end.
func (p *Process) PID() int { return p.proc.Pid }

// Done is closed when the process has ended and is reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Kill ends the process at once. It is no error if it has ended already.
func (p *Process) Kill() error {
	if err := p.proc.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("killing qemu: %w", err)
	}
	return nil
}

// Exit is how the process ended. Only valid after Done.
func (p *Process) Exit() (status syscall.WaitStatus, err error) {
	if p.err != nil {
		return 0, fmt.Errorf("waiting for qemu: %w", p.err)
	}
	return p.state.Sys().(syscall.WaitStatus), nil
}

// Stderr returns what QEMU has written to its error output since the last call, bounded. Close
// releases the pipe.
func (p *Process) Stderr() string {
	buf := make([]byte, maxStderr)
	n := 0
	raw, err := p.stderr.SyscallConn()
	if err != nil {
		return ""
	}
	_ = raw.Control(func(fd uintptr) {
		for n < len(buf) {
			m, err := unix.Read(int(fd), buf[n:])
			if m <= 0 || err != nil {
				return
			}
			n += m
		}
	})
	return string(buf[:n])
}

// Close releases what is kept for Stderr.
func (p *Process) Close() error { return p.stderr.Close() }
