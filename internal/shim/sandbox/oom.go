package sandbox

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
)

// By these scores (oom_score_adj) the kernel chooses what to kill when the host's memory runs out. QEMU
// has what the kubelet gives to the pod's containers, its shim what containerd gives to a pause container:
// of the two, QEMU is killed, and the shim tells what happened.
const (
	scoreShim       = -998
	scoreGuaranteed = -997
	scoreBurstable  = 999 // at most; the kubelet says more with each container
	scoreBestEffort = 1000
)

// score is QEMU's oom_score_adj.
type score struct {
	sync.Mutex // held over a change; guards the fields below
	set        bool
	value      int
}

// classScore is the score of a pod's quality of service class, which the name of the cgroup tells:
//
//	/kubepods/burstable/pod<uid>, kubepods-besteffort-pod<uid>.slice, /<root>/kubepods/pod<uid>
func classScore(parent string) (int, bool) {
	words := strings.FieldsFunc(parent, func(r rune) bool { return r == '/' || r == '-' || r == '.' })
	known := false
	for _, w := range words {
		switch w {
		case "besteffort":
			return scoreBestEffort, true
		case "burstable":
			return scoreBurstable, true
		case "kubepods":
			known = true
		}
	}
	return scoreGuaranteed, known
}

// protect sets the scores of a pod's processes. While they waited in the pool both had the pool's: what no
// pod uses may be killed.
func (s *Service) protect(m *VM) {
	s.setScore(os.Getpid(), scoreShim)
	if value, ok := classScore(s.config.GetLinux().GetCgroupParent()); ok {
		s.lowerScore(m, value)
	}
}

// lowerScore gives QEMU the score of one of its containers, if that is better protected than the others:
// they all live in it.
func (s *Service) lowerScore(m *VM, value int) {
	s.score.Lock()
	defer s.score.Unlock()
	if s.score.set && value >= s.score.value {
		return
	}
	s.score.set, s.score.value = true, value
	s.setScore(m.Machine.PID(), value)
}

// setScore sets a score where the host allows it; a pod runs without it.
func (s *Service) setScore(pid, value int) {
	err := s.cfg.Cgroups.SetOOMScore(pid, value)
	switch {
	case errors.Is(err, fs.ErrPermission):
		slog.Debug("no right to protect the pod from the kernel's choice when memory runs out", "score", value)
	case err != nil:
		slog.Warn("protecting the pod from the kernel's choice when memory runs out", "error", err)
	}
}
