package container

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	copyBuffer = 16 << 10
	// graceEOF is for how many looks, pollDrain apart, output of processes that outlive the one that was
	// started is still passed on after it has ended. Looks and not time: a guest whose processors stood
	// still has not had the time that its clock says.
	graceEOF = 30
	// graceAttach is for how many looks the output of an ended process is kept for a stream that was
	// announced and has not come.
	graceAttach = 500
	pollDrain   = 10 * time.Millisecond
)

// output copies one pipe (or pseudo-terminal) of a process into the stream the host opened for it.
// It reads nothing before there is a stream, and no more than one buffer ahead of it, so a slow
// host blocks the process and costs no memory.
type output struct {
	file   *os.File            // set before run
	stream chan io.WriteCloser // gets one
	giveUp chan struct{}       // closed: there will be no stream
	sent   chan struct{}       // closed when nothing more will be passed on

	mu       sync.Mutex
	dst      io.WriteCloser
	busy     bool // a buffer was read and is not yet in the stream
	detached bool // what comes now is dropped
	attached bool // dst is there, or will never be
}

func newOutput() *output {
	return &output{
		stream: make(chan io.WriteCloser, 1),
		giveUp: make(chan struct{}), sent: make(chan struct{}),
	}
}

// run copies until the last writer has closed its end, then closes the file.
func (o *output) run() {
	defer o.file.Close()
	defer o.finish()
	select {
	case dst := <-o.stream:
		o.attach(dst)
	case <-o.giveUp:
		o.finish()
	}
	raw, err := o.file.SyscallConn()
	if err != nil {
		return
	}
	buf, closed := make([]byte, copyBuffer), false
	for {
		n, err := 0, error(nil)
		rerr := raw.Read(func(fd uintptr) bool {
			// busy changes together with the emptiness of the pipe, for state.
			o.mu.Lock()
			defer o.mu.Unlock()
			for {
				n, err = unix.Read(int(fd), buf)
				if !errors.Is(err, unix.EINTR) {
					break
				}
			}
			o.busy = n > 0
			return !errors.Is(err, unix.EAGAIN)
		})
		switch {
		case rerr == nil && n > 0:
			o.pass(buf[:n])
			closed = false
		case rerr == nil && errors.Is(err, unix.EIO) && !closed:
			// A terminal without slaves. What was written between the kernel's look for input and its
			// look for slaves is found by the next read.
			closed = true
		default:
			return // end of file
		}
	}
}

func (o *output) attach(dst io.WriteCloser) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dst, o.attached = dst, true
}

// pass writes to the stream; a host that closed it wants no more.
func (o *output) pass(p []byte) {
	o.mu.Lock()
	dst := o.dst
	if o.detached {
		dst = nil
	}
	o.mu.Unlock()
	if dst != nil {
		if _, err := dst.Write(p); err != nil {
			o.finish()
		}
	}
	o.mu.Lock()
	o.busy = false
	o.mu.Unlock()
}

// finish ends the stream: what comes after is dropped.
func (o *output) finish() {
	o.mu.Lock()
	dst, first := o.dst, !o.detached
	o.detached, o.attached, o.dst = true, true, nil
	o.mu.Unlock()
	if !first {
		return
	}
	if dst != nil {
		_ = dst.Close()
	}
	close(o.sent)
}

// drain returns when everything the ended process has written is in the stream. Others that still
// hold the pipe have graceEOF after their last output; then the stream ends, and their output is
// read and dropped so that they do not die of it.
func (o *output) drain() {
	waited, idle := 0, 0 // looks
	tick := time.NewTicker(pollDrain)
	defer tick.Stop()
	for {
		select {
		case <-o.sent:
			return
		case <-tick.C:
			attached, passed := o.state()
			switch {
			case !attached:
				if waited++; waited == graceAttach {
					close(o.giveUp)
				}
			case !passed:
				idle = 0
			default:
				if idle++; idle > graceEOF {
					o.finish()
					return
				}
			}
		}
	}
}

// state reports whether the copier runs and whether all that was written so far is passed on.
func (o *output) state() (attached, passed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.attached || o.busy {
		return o.attached, false
	}
	raw, err := o.file.SyscallConn()
	if err != nil {
		return true, false
	}
	n := 0
	if cerr := raw.Control(func(fd uintptr) {
		// Unlike a count of what can be read, this has a terminal take in what its slave has written.
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	}); cerr != nil {
		return true, false
	}
	return true, err == nil && n == 0
}
