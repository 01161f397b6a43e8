// Package usage measures what a process takes on the host, and whether the host has room for another machine.
//
// It reads proc(5) and keeps nothing. internal/shim/machine is its caller. What can go wrong: the process has ended
// (fs.ErrNotExist), or the file is not what it should be.
package usage

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// clockTick is what the kernel counts processor time in, for programs; it is 100 on all of Linux's architectures that
// QEMU's system emulation runs on.
const clockTick = 100

// Usage is what a process has taken: times in microseconds, bytes.
type Usage struct{ User, System, Memory, Threads uint64 }

// Read reads proc(5).
func Read(pid int) (Usage, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Usage{}, fmt.Errorf("reading usage: %w", err)
	}
	u, err := parse(data, uint64(os.Getpagesize()))
	if err != nil {
		return Usage{}, fmt.Errorf("reading usage of process %d: %w", pid, err)
	}
	return u, nil
}

// parse takes what is wanted from a stat file. What is before the last parenthesis is the process's to choose.
func parse(data []byte, page uint64) (Usage, error) {
	const user, system, threads, resident = 11, 12, 17, 21 // after the name
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) <= resident {
		return Usage{}, errors.New("it has too few fields")
	}
	var n [4]uint64
	for i, field := range []int{user, system, threads, resident} {
		var err error
		if n[i], err = strconv.ParseUint(fields[field], 10, 64); err != nil {
			return Usage{}, err
		}
	}
	const tick = 1e6 / clockTick
	return Usage{User: n[0] * tick, System: n[1] * tick, Threads: n[2], Memory: n[3] * page}, nil
}

// EnoughMemory refuses a machine on a host that is nearly out of memory: the kernel would kill it, or a neighbour.
// Machines without a reservation may be given more together than there is, so not all of it must be free.
func EnoughMemory(meminfo []byte, want int64) error {
	const share, reserve = 4, 256 << 20
	for line := range strings.Lines(string(meminfo)) {
		text, ok := strings.CutPrefix(line, "MemAvailable:")
		if !ok {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(text), "kB")), 10, 64)
		if err != nil {
			return nil //nolint:nilerr // what cannot be known is no reason to refuse
		}
		if free := kib << 10; free < want/share+reserve {
			return fmt.Errorf("%w: %d MiB are free for a machine of %d MiB; stop something, or use a smaller class", ErrMemory, free>>20, want>>20)
		}
	}
	return nil
}

// ErrMemory is when the host has too little memory.
var ErrMemory = errors.New("the host is out of memory")
