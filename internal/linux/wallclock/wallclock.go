// Package wallclock waits for a time to pass or for somebody to set this machine's wall clock,
// whichever comes first.
//
// It never sets a clock and says nothing about clocks that run too fast or too slow: only steps
// are noticed, among them the one after a suspend. internal/shim/clock calls it. It is one timer of
// the kernel (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET) that Go's poller watches: waiting takes
// no thread and no processor time.
//
// What can go wrong: the process has no file descriptor left. Of several steps that come before
// Wait is called, one is reported.
package wallclock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Timer is a timer that also goes off when the wall clock is set. One goroutine uses it; Arm and Close
// may come from another, and hold for a Wait that is under way.
type Timer struct {
	file *os.File
}

// New makes a timer that does not run yet.
func New() (*Timer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making wall clock timer: %w", err)
	}
	return &Timer{file: os.NewFile(uintptr(fd), "wallclock")}, nil
}

// Arm sets the timer to go off after d. From the moment Arm is called until Wait returns, no step of
// the clock is missed; one before that moment is forgotten.
func (t *Timer) Arm(d time.Duration) error {
	raw, err := t.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("arming wall clock timer: %w", err)
	}
	var errno error
	err = raw.Control(func(fd uintptr) { errno = arm(int(fd), d) })
	if err = errors.Join(err, errno); err != nil {
		return fmt.Errorf("arming wall clock timer: %w", err)
	}
	return nil
}

// arm sets the timer by a clock that may be set meanwhile: the kernel then says ECANCELED, the timer
// runs, but until a time of the old clock.
func arm(fd int, d time.Duration) error {
	for {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
			return err
		}
		at := &unix.ItimerSpec{Value: unix.NsecToTimespec(now.Nano() + int64(d))}
		err := unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, at, nil)
		if !errors.Is(err, unix.ECANCELED) {
			return err
		}
	}
}

// Wait waits until the timer goes off and reports whether the clock was set. It must be armed again
// then. After Close the error is os.ErrClosed.
func (t *Timer) Wait() (stepped bool, err error) {
	var expirations [8]byte
	n, err := t.file.Read(expirations[:])
	switch {
	case errors.Is(err, unix.ECANCELED):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("waiting for wall clock timer: %w", err)
	case n != len(expirations) || binary.NativeEndian.Uint64(expirations[:]) == 0:
		return false, fmt.Errorf("waiting for wall clock timer: odd answer of %d bytes", n)
	}
	return false, nil
}

// Close ends the timer and a Wait that is under way.
func (t *Timer) Close() error { return t.file.Close() }
