// Package process reads /proc to find processes by what they are, and ends
// them.
//
// A process is named by its pid and its start time, so that a pid that was
// given to another process in the meantime is never signalled. It does not
// start processes; that is package supervise.
//
// It is called by `atoll up`, `down`, `status` and the preflight. What can go
// wrong: processes come and go while they are listed; those that vanish are
// left out.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Info is what /proc says about a process.
type Info struct {
	PID, PPID int
	// Exe is the path of the executable, "" for kernel threads and processes
	// that may not be looked at. Replaced is true when the file there is not
	// the one that runs any more.
	Exe      string
	Replaced bool
	// Args is the argv.
	Args []string
	// start is the time the process was started, in clock ticks after boot.
	start  uint64
	zombie bool
}

// List returns all processes but zombies.
func List() ([]Info, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var out []Info
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if info, err := Read(pid); err == nil && !info.zombie {
			out = append(out, info)
		}
	}
	return out, nil
}

// Read returns what is known about one process.
func Read(pid int) (Info, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return Info{}, fmt.Errorf("reading process %d: %w", pid, err)
	}
	info, err := parseStat(stat)
	if err != nil {
		return Info{}, fmt.Errorf("reading process %d: %w", pid, err)
	}
	info.PID = pid
	if exe, err := os.Readlink(filepath.Join(dir, "exe")); err == nil {
		info.Exe, info.Replaced = strings.CutSuffix(exe, " (deleted)")
	}
	if args, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil && len(args) > 0 {
		info.Args = strings.Split(strings.TrimSuffix(string(args), "\x00"), "\x00")
	}
	return info, nil
}

// parseStat reads state, parent and start time from the text of
// /proc/<pid>/stat. The command in it may contain spaces and parentheses.
func parseStat(stat []byte) (Info, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return Info{}, errors.New("stat has no command")
	}
	fields := strings.Fields(string(stat[end+1:]))
	if len(fields) < 20 {
		return Info{}, errors.New("stat is too short")
	}
	ppid, err := strconv.Atoi(fields[1])
	if err != nil {
		return Info{}, fmt.Errorf("parsing the parent: %w", err)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return Info{}, fmt.Errorf("parsing the start time: %w", err)
	}
	return Info{PPID: ppid, start: start, zombie: fields[0] == "Z" || fields[0] == "X"}, nil
}

// Alive says whether the very process still runs.
func (i Info) Alive() bool {
	now, err := Read(i.PID)
	return err == nil && !now.zombie && now.start == i.start
}

// Memory is what a process holds of the host's memory, in bytes.
type Memory struct {
	// RSS counts every resident page in full.
	RSS int64 `json:"rssBytes"`
	// PSS counts a page that n processes share as 1/n, so that sums are right.
	PSS int64 `json:"pssBytes"`
	// Anon is the part that is not file pages.
	Anon int64 `json:"anonBytes"`
}

// Memory reads the memory of the process. It needs root for processes of
// others.
func (i Info) Memory() (Memory, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(i.PID), "smaps_rollup"))
	if err != nil {
		return Memory{}, fmt.Errorf("reading the memory of process %d: %w", i.PID, err)
	}
	text := string(b)
	return Memory{RSS: kilobytes(text, "Rss:"), PSS: kilobytes(text, "Pss:"), Anon: kilobytes(text, "Pss_Anon:")}, nil
}

// kilobytes returns the value of a "Key:   123 kB" line in bytes, or 0.
func kilobytes(text, key string) int64 {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			if err == nil {
				return n << 10
			}
		}
	}
	return 0
}

// Signal sends a signal to the very process; one that has ended is not an
// error.
func (i Info) Signal(sig unix.Signal) error {
	fd, err := unix.PidfdOpen(i.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening process %d: %w", i.PID, err)
	}
	defer unix.Close(fd)
	if !i.Alive() { // the descriptor pins the pid, so this answer stays true
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signalling process %d: %w", i.PID, err)
	}
	return nil
}

// Wait returns when the process has ended, or with the context's error.
func (i Info) Wait(ctx context.Context) error {
	fd, err := unix.PidfdOpen(i.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening process %d: %w", i.PID, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	if !i.Alive() {
		return nil
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("waiting for process %d: %w", i.PID, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Now()) })
	defer stop()
	// A pidfd is readable when the process has ended; the Go poller waits.
	err = conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || (err != nil && !errors.Is(err, unix.EINTR))
	})
	if ctx.Err() != nil {
		if !i.Alive() { // it ended meanwhile
			return nil
		}
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("waiting for process %d: %w", i.PID, err)
	}
	return nil
}

// End makes processes end: SIGTERM, and after the grace time SIGKILL. It
// returns when all have ended or a minute after SIGKILL.
func End(ctx context.Context, grace time.Duration, infos ...Info) error {
	var errs []error
	for _, step := range []struct {
		signal unix.Signal
		wait   time.Duration
	}{{unix.SIGTERM, grace}, {unix.SIGKILL, time.Minute}} {
		errs = nil
		for _, i := range infos {
			errs = append(errs, i.Signal(step.signal))
		}
		waitCtx, cancel := context.WithTimeout(ctx, step.wait)
		for _, i := range infos {
			errs = append(errs, i.Wait(waitCtx))
		}
		cancel()
		if errors.Join(errs...) == nil {
			return nil
		}
	}
	return errors.Join(errs...)
}
