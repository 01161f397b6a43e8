// Package restarts decides how long a machine that has ended must wait before it is started again, and one whose memory
// could not be saved before that is tried again.
//
// The pause grows with each crash that comes soon after a start. It is kept in memory: after a restart of the server a
// machine is started again at once, once. Called by the controller of VirtualMachines; it cannot fail.
package restarts

import (
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// Pauses between attempts.
const (
	PauseFirst = 5 * time.Second
	PauseMost  = 5 * time.Minute
	// stable is how long a machine must have run for its next crash to be the first.
	stable = 10 * time.Minute
)

// Restarts remembers machines that have crashed.
type Restarts struct {
	mu    sync.Mutex
	known map[types.UID]*crash
	asked map[types.UID]asked
}

// asked is since when a pod's host has been asked to take up a revision.
type asked struct {
	revision int64
	at       time.Time
}

// Waited is for how long a pod's host has been asked to take up a revision.
func (r *Restarts) Waited(pod types.UID, revision int64, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.asked == nil || len(r.asked) > 4096 {
		r.asked = map[types.UID]asked{}
	}
	a, ok := r.asked[pod]
	if !ok || a.revision != revision {
		a = asked{revision: revision, at: now}
		r.asked[pod] = a
	}
	return now.Sub(a.at)
}

// crash is the last of a machine.
type crash struct {
	pod   types.UID
	count int
	until time.Time
}

// Pause is how long a machine must wait whose pod ended at a time, having started at another.
func (r *Restarts) Pause(vm, pod types.UID, started, ended, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known == nil {
		r.known = map[types.UID]*crash{}
	}
	c := r.known[vm]
	if c == nil {
		c = &crash{}
		r.known[vm] = c
	}
	if c.pod != pod {
		if !started.IsZero() && ended.Sub(started) > stable {
			c.count = 0
		}
		c.pod = pod
		pause := min(PauseFirst<<min(c.count, 10), PauseMost)
		c.count++
		c.until = ended.Add(pause)
		if limit := now.Add(pause); c.until.After(limit) {
			c.until = limit
		}
	}
	return max(0, c.until.Sub(now))
}

// Forget is for machines that are gone, or were powered off.
func (r *Restarts) Forget(vm types.UID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.known, vm)
}
