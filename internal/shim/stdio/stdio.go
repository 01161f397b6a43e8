// Package stdio connects the FIFOs that containerd reads and writes with the streams that carry a
// process's standard streams in and out of the micro-VM.
//
// It copies bytes and nothing else: it neither starts processes nor knows what a stream's header
// looks like. internal/shim/task makes one IO per container process and exec.
//
// Rules it keeps:
//   - Nothing is lost: a FIFO keeps its content while containerd is away, and at the end it is closed
//     only when containerd has read everything.
//   - Nothing is buffered beyond a FIFO and a stream's window: a slow reader stops the process.
//   - Standard input ends only when containerd says so (CloseStdin), not when it goes away.
//
// What can go wrong: a FIFO that is missing or no FIFO, and a reader that never comes back, which
// blocks the process as it would without a micro-VM. The guest can send anything, at any speed; it is
// only ever copied.
package stdio

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrUnsupported is wrapped when containerd asks for a kind of standard stream that is neither a FIFO
// nor a file.
var ErrUnsupported = errors.New("unsupported standard stream")

// Config names the host's ends, as in a task request: a FIFO's path, "file://" and a path, or "" for
// none. With Terminal there is one stream for everything and Stderr is not used.
type Config struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// Stream is one stream of a process. Close ends only the direction towards the guest.
type Stream = io.ReadWriteCloser

// IO is the standard streams of one process.
type IO struct {
	stdin  *os.File // read end of the FIFO
	keeper *os.File // our own write end: without one, input would end when containerd restarts
	outs   []*os.File
	files  []*os.File // every distinct output file

	copies  sync.WaitGroup
	once    sync.Once     // closes drained
	drained chan struct{} // closed when all output has been handed over, or nobody wants it

	mu      sync.Mutex // guards the fields below
	streams []Stream
	closed  chan struct{}
}

// Open opens the host's ends. Start or Close must follow.
func Open(cfg Config) (_ *IO, err error) {
	s := &IO{drained: make(chan struct{}), closed: make(chan struct{})}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if cfg.Stdin != "" {
		if err := s.openInput(cfg.Stdin); err != nil {
			return nil, fmt.Errorf("opening standard input: %w", err)
		}
	}
	outputs := []string{cfg.Stdout, cfg.Stderr}
	if cfg.Terminal {
		outputs = outputs[:1]
	}
	for i, name := range outputs {
		f := (*os.File)(nil)
		switch {
		case name == "":
		case i == 1 && name == outputs[0]:
			f = s.outs[0]
		default:
			if f, err = openOutput(name); err != nil {
				return nil, fmt.Errorf("opening standard output: %w", err)
			}
			s.files = append(s.files, f)
		}
		s.outs = append(s.outs, f)
	}
	return s, nil
}

// openInput opens both ends of the FIFO, so that a reader never sees an end before CloseStdin.
func (s *IO) openInput(name string) (err error) {
	if s.stdin, err = openFIFO(name, os.O_RDONLY); err != nil {
		return err
	}
	s.keeper, err = openFIFO(name, os.O_WRONLY)
	return err
}

func openOutput(name string) (*os.File, error) {
	if path, ok := strings.CutPrefix(name, "file://"); ok {
		return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	}
	if strings.Contains(name, "://") {
		return nil, fmt.Errorf("%w: %q", ErrUnsupported, name)
	}
	// Both directions: opening needs no reader, and what is written stays while there is none.
	return openFIFO(name, os.O_RDWR)
}

// openFIFO opens without waiting for the other end.
func openFIFO(name string, flag int) (*os.File, error) {
	f, err := os.OpenFile(name, flag|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Mode()&os.ModeNamedPipe == 0 {
		err = fmt.Errorf("%w: %q is no FIFO", ErrUnsupported, name)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// HasStdin says whether there is an input to open a stream for.
func (s *IO) HasStdin() bool { return s.stdin != nil }

// Start opens the streams and begins to copy. open is called with the descriptor numbers that the
// guest has a stream for: 0 with an input or a terminal, 1 and 2 without a terminal. If it fails,
// Close must follow.
func (s *IO) Start(terminal bool, open func(fd int) (Stream, error)) error {
	fds := []int{1, 2}
	if s.HasStdin() {
		fds = []int{0, 1, 2}
	}
	if terminal {
		fds = []int{0}
	}
	for _, fd := range fds {
		st, err := open(fd)
		if err != nil {
			return fmt.Errorf("opening stream %d: %w", fd, err)
		}
		s.mu.Lock()
		s.streams = append(s.streams, st)
		s.mu.Unlock()
		if fd == 0 && s.stdin != nil {
			go s.copyIn(st, !terminal)
		}
		switch {
		case fd > 0:
			s.copyOut(s.outs[fd-1], st)
		case terminal:
			s.copyOut(s.outs[0], st)
		}
	}
	go func() {
		s.copies.Wait()
		for _, f := range s.files {
			s.drain(f)
			_ = f.Close()
		}
		s.once.Do(func() { close(s.drained) })
	}()
	return nil
}

// copyIn copies standard input until it ends or the process does.
func (s *IO) copyIn(st Stream, closeStream bool) {
	_ = pump(st, s.stdin)
	_ = s.stdin.Close()
	if closeStream {
		_ = st.Close()
	}
}

// copyOut copies one output until the guest closes it. Output without a place to go is dropped.
func (s *IO) copyOut(f *os.File, st Stream) {
	s.copies.Go(func() {
		w := io.Discard
		if f != nil {
			w = f
		}
		if pump(w, st) != nil {
			// The reader's side is gone for good; the process must not block on it.
			_ = pump(io.Discard, st)
		}
	})
}

// drain waits until containerd has read what is in the FIFO: closing it would throw that away if
// containerd is just restarting.
func (s *IO) drain(f *os.File) {
	for wait := time.Millisecond; pending(f) > 0; wait = min(2*wait, time.Second) {
		select {
		case <-s.closed:
			return
		case <-time.After(wait):
		}
	}
}

// pending is the number of unread bytes in a FIFO, 0 for other files.
func pending(f *os.File) int {
	st, err := f.Stat()
	if err != nil || st.Mode()&os.ModeNamedPipe == 0 {
		return 0
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	_ = conn.Control(func(fd uintptr) {
		if n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ); err != nil {
			n = 0
		}
	})
	return n
}

// CloseStdin ends standard input once everything that was written to it has been read. It may be
// called any number of times.
func (s *IO) CloseStdin() {
	if s.keeper != nil {
		_ = s.keeper.Close()
	}
}

// Done is closed when all output has reached containerd, or Close was called.
func (s *IO) Done() <-chan struct{} { return s.drained }

// Close closes the host's ends, whatever is still under way, and the streams towards the guest. What
// the guest still sends is dropped, so that no process blocks on it. It may be called any number of
// times.
func (s *IO) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.closed:
		return
	default:
		close(s.closed)
	}
	for _, st := range s.streams {
		_ = st.Close()
	}
	s.closeFiles()
	s.once.Do(func() { close(s.drained) })
}

func (s *IO) closeFiles() {
	for _, f := range append([]*os.File{s.stdin, s.keeper}, s.files...) {
		if f != nil {
			_ = f.Close()
		}
	}
}
