package machine

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"google.golang.org/protobuf/types/known/anypb"

	"atoll.dev/atoll/internal/shim/machine/usage"
	"atoll.dev/atoll/internal/shim/task"
)

// scoreShim is the shim's oom_score_adj: of the two, QEMU is killed, and the shim tells what happened.
const scoreShim = -998

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
		u, err := usage.Read(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just ended
		}
		if err != nil {
			return nil, err
		}
		m.CPU.UserUsec += u.User
		m.CPU.SystemUsec += u.System
		m.CPU.UsageUsec += u.User + u.System
		m.Memory.Usage += u.Memory
		m.Memory.Anon += u.Memory
		m.Pids.Current += u.Threads
	}
	if l != nil && s.cfg.Cgroups.OOMKilled() {
		m.MemoryEvents = &stats.MemoryEvents{OomKill: 1}
	}
	return task.Any(m)
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
