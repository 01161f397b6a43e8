// Package timing records where the time goes while a pod starts.
//
// A Recorder holds named durations, each noted once: the first container of a pod is the one that
// counts. The shim shows them in the sandbox status and in its log. It measures, it does not judge.
package timing

import (
	"log/slog"
	"sync"
	"time"
)

// maxSteps bounds what is kept.
const maxSteps = 64

// Step is something that took time.
type Step struct {
	Name string
	// At is when it was done, after the recorder's beginning.
	At time.Duration
	// Took is how long.
	Took time.Duration
}

// Recorder collects steps. Make one with New.
type Recorder struct {
	mu    sync.Mutex // guards the fields below
	begin time.Time
	steps []Step
	seen  map[string]bool
}

// New makes an empty recorder that begins now.
func New() *Recorder { return &Recorder{begin: time.Now(), seen: map[string]bool{}} }

// Reset drops everything and begins at the given time.
func (r *Recorder) Reset(at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begin, r.steps, r.seen = at, nil, map[string]bool{}
}

// Phase is a sequence of steps, each of which begins when the one before is done.
type Phase struct {
	r    *Recorder
	name string
	last time.Time
}

// Begin starts a phase.
func (r *Recorder) Begin(name string) *Phase { return &Phase{r: r, name: name, last: time.Now()} }

// Done notes that a step of the phase is done.
func (p *Phase) Done(step string) {
	now := time.Now()
	p.r.add(p.name+" "+step, now, now.Sub(p.last))
	p.last = now
}

func (r *Recorder) add(name string, now time.Time, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen[name] || len(r.steps) >= maxSteps {
		return
	}
	r.seen[name] = true
	r.steps = append(r.steps, Step{Name: name, At: now.Sub(r.begin), Took: took})
}

// Steps returns all steps in the order in which they were done.
func (r *Recorder) Steps() []Step {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Step(nil), r.steps...)
}

// Log writes one line with all steps, in milliseconds, once per message.
func (r *Recorder) Log(msg string, args ...any) {
	r.mu.Lock()
	if r.seen[msg] {
		r.mu.Unlock()
		return
	}
	r.seen[msg] = true
	total := time.Since(r.begin)
	r.mu.Unlock()
	for _, s := range r.Steps() {
		args = append(args, slog.Group(s.Name, "at", millis(s.At), "took", millis(s.Took)))
	}
	slog.Info(msg, append(args, "total", millis(total))...)
}

func millis(d time.Duration) float64 {
	return float64(d.Round(10*time.Microsecond)) / float64(time.Millisecond)
}
