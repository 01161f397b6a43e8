package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"google.golang.org/protobuf/types/known/anypb"

	"atoll.dev/atoll/internal/shim/task"
)

// scoreShim is the shim's oom_score_adj: of the two, QEMU is killed, and the shim tells what happened.
const scoreShim = -998

// clockTick is what the kernel counts processor time in, for programs; it is 100 on all of Linux's architectures that
// QEMU's system emulation runs on.
const clockTick = 100

// usage is what the machine takes on the host: QEMU and this shim.
func (s *Service) usage() (*anypb.Any, error) {
	m := &stats.Metrics{CPU: &stats.CPUStat{}, Memory: &stats.MemoryStat{}, Pids: &stats.PidsStat{}}
	s.mu.Lock()
	l := s.life
	s.mu.Unlock()
	pids := []int{os.Getpid()}
	if l != nil && l.hardware() != nil {
		pids = append(pids, l.hardware().PID())
	}
	for _, pid := range pids {
		u, err := readUsage(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just ended
		}
		if err != nil {
			return nil, err
		}
		m.CPU.UserUsec += u.user
		m.CPU.SystemUsec += u.system
		m.CPU.UsageUsec += u.user + u.system
		m.Memory.Usage += u.memory
		m.Memory.Anon += u.memory
		m.Pids.Current += u.threads
	}
	if l != nil && s.cfg.Cgroups.OOMKilled() {
		m.MemoryEvents = &stats.MemoryEvents{OomKill: 1}
	}
	return task.Any(m)
}

// processUsage is what a process has taken: times in microseconds, bytes.
type processUsage struct{ user, system, memory, threads uint64 }

// readUsage reads proc(5).
func readUsage(pid int) (processUsage, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return processUsage{}, fmt.Errorf("reading usage: %w", err)
	}
	u, err := parseUsage(data, uint64(os.Getpagesize()))
	if err != nil {
		return processUsage{}, fmt.Errorf("reading usage of process %d: %w", pid, err)
	}
	return u, nil
}

// parseUsage takes what is wanted from a stat file. What is before the last parenthesis is the process's to choose.
func parseUsage(data []byte, page uint64) (processUsage, error) {
	const user, system, threads, resident = 11, 12, 17, 21 // after the name
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) <= resident {
		return processUsage{}, errors.New("it has too few fields")
	}
	var n [4]uint64
	for i, field := range []int{user, system, threads, resident} {
		var err error
		if n[i], err = strconv.ParseUint(fields[field], 10, 64); err != nil {
			return processUsage{}, err
		}
	}
	const tick = 1e6 / clockTick
	return processUsage{user: n[0] * tick, system: n[1] * tick, threads: n[2], memory: n[3] * page}, nil
}

// setScore sets a score where the host allows it; a machine runs without it.
func (s *Service) setScore(pid, value int) {
	err := s.cfg.Cgroups.SetOOMScore(pid, value)
	switch {
	case errors.Is(err, fs.ErrPermission):
		slog.Debug("no right to protect the machine from the kernel's choice when memory runs out", "score", value)
	case err != nil:
		slog.Warn("protecting the machine from the kernel's choice when memory runs out", "error", err)
	}
}

// enoughMemory refuses a machine on a host that is nearly out of memory: the kernel would kill it, or a neighbour.
// Machines without a reservation may be given more together than there is, so not all of it must be free.
func enoughMemory(meminfo []byte, want int64) error {
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
			return fmt.Errorf("%w: %d MiB are free for a machine of %d MiB; stop something, or use a smaller class", errMemory, free>>20, want>>20)
		}
	}
	return nil
}

// errMemory is when the host has too little memory.
var errMemory = errors.New("the host is out of memory")
