// Package pool keeps micro-VMs ready for pods: it builds the template, spawns shim daemons that each
// clone one and wait, and hands them to shim starts.
//
// It does not serve pods: a daemon that was handed out belongs to its pod, outlives the pool, and is
// only remembered so that its user id is not given to another. "atoll-pod pool" runs one Pool per host.
//
// A member:
//
//	preparing --report ready--> ready --take--> taken
//	    |  +-------------------take-----------------^     (no ready one: cold)
//	    +--error, exit--> gone <--error, exit-- ready
//
// A pod that finds no ready member gets one that is being prepared, or a new one; it stops warming up then.
// As long as pods wait no other members are begun, and those that are being prepared have the lowest
// priority, so a burst of pods is served by clones that cost least and the pool is refilled after it. A
// pod whose member is not ready after a while is likely to wait in vain and holds up nobody any more.
//
// All state belongs to one goroutine, Run's loop; everything else sends it events. Requests without a
// member wait in order. In a burst the number of members that are being prepared at a time is bounded by
// the number of processors, since more would only make each slower.
//
// What can go wrong: the template cannot be built, members fail while they are prepared or while they
// wait, the host has no memory or disk left. Each failure doubles the pause before the next attempt, up
// to minutes, so that a kernel that does not work leaves the processors to others; requests wait. After
// some failures in a row the template is built anew and one member is prepared at a time. A member that
// has stayed up for a while ends this. The last failure is in the status.
package pool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/pool/config"
	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/pool/wire"
)

const (
	// refillPause is how long to leave the processors to a pod that has just taken a member, coldPause to one
	// whose micro-VM was not warmed up.
	refillPause = 150 * time.Millisecond
	coldPause   = 400 * time.Millisecond
	// patience is how long a pod that waits for its member has the processors to itself. It is many times
	// what that takes, and less than a member that is stuck lasts.
	patience = 15 * time.Second
	// rebuildAfter is how many members may fail in a row before the template is built anew.
	rebuildAfter = 3
	// firstBackoff is the pause after a failure; each further one doubles it, up to lastBackoff, which is
	// longer than an attempt may take.
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 5 * time.Minute
	// settleTime is how long a member must have been ready to count as a success.
	settleTime = 10 * time.Second
	// endTimeout bounds the wait for members that are not taken when the pool ends.
	endTimeout = 3 * time.Second
)

// ErrRunning is returned when another pool runs on the same run directory.
var ErrRunning = errors.New("another pool is running")

// Maker makes what members need. The real one is a Builder.
type Maker interface {
	// Build makes the template and whatever else members inherit.
	Build(context.Context) (*Template, error)
	// Spawn starts a member.
	Spawn(t *Template, init wire.Init) (Member, error)
}

// Member is a spawned shim daemon.
type Member interface {
	Assign(wire.Assignment) error
	// Aside tells a member that is being prepared to leave the processors to pods, or not to any more.
	Aside(yes bool) error
	// Reports are what the member says; closed when its process has ended.
	Reports() <-chan wire.Report
	PID() int
	// Release lets a member that is not taken end.
	Release()
}

// Pool is the warm pool of a host. Make one with New, run it once.
type Pool struct {
	cfg   config.Config
	maker Maker
	reg   registry.Registry
	log   *slog.Logger

	events chan event
	wg     sync.WaitGroup

	// The loop's own; nothing else touches them.
	template  *Template
	building  bool
	members   map[string]*member
	queue     []*request
	uids      *users
	status    wire.Status
	failures  int       // since a success
	holdUntil time.Time // no members before
}

// event is something that happened, to be handled by the loop.
type event func()

// request is a shim start that waits for a member.
type request struct {
	assignment wire.Assignment
	answer     chan wire.Taken // buffered
	gone       <-chan struct{} // closed when the client has gone
}

// member is what the loop knows of a member.
type member struct {
	Member
	id      string
	uid     uint32
	born    time.Time
	ready   bool
	request *request  // that it was assigned to
	since   time.Time // when
	warm    bool      // it was ready when it was taken
	known   bool      // it has confirmed the assignment
	aside   bool      // it was told to stand aside
}

// New makes a pool. maker may be nil for the real one.
func New(cfg config.Config, maker Maker) (*Pool, error) {
	log := slog.Default()
	if maker == nil {
		maker = &Builder{cfg: cfg, log: log}
	}
	return &Pool{
		cfg: cfg, maker: maker, reg: registry.New(cfg.RunDir), log: log,
		events: make(chan event, 256), members: map[string]*member{},
		status: wire.Status{Wanted: *cfg.Warm, MemoryMiB: cfg.MemoryMiB, QEMU: cfg.QEMU},
	}, nil
}

// Run serves until ctx ends. Members that were not taken end with it.
func (p *Pool) Run(ctx context.Context) error {
	unlock, err := lock(filepath.Join(p.cfg.RunDir, "pool.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if err := p.reg.Create(); err != nil {
		return err
	}
	if err := network.CreatePoolNetns(p.netns()); err != nil {
		return fmt.Errorf("making the network namespace of the pool: %w", err)
	}
	if err := p.adopt(ctx); err != nil {
		return err
	}
	l, err := listen(p.cfg.Socket())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p.wg.Go(func() { p.accept(ctx, l) })
	p.loop(ctx)
	cancel()
	_ = l.Close()
	p.releaseAll()
	p.wg.Wait()
	if p.template != nil {
		p.template.Close()
	}
	return ctx.Err()
}

func (p *Pool) netns() string { return filepath.Join(p.cfg.RunDir, "netns", "pool") }

// lock makes sure that there is one pool.
func lock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the pool: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrRunning
		}
		return nil, fmt.Errorf("locking the pool: %w", err)
	}
	return func() { _ = f.Close() }, nil
}

// listen opens the socket for clients.
func listen(name string) (net.Listener, error) {
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listening for shims: %w", err)
	}
	l, err := net.Listen("unix", name)
	if err != nil {
		return nil, fmt.Errorf("listening for shims: %w", err)
	}
	if err := os.Chmod(name, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listening for shims: %w", err), l.Close())
	}
	return l, nil
}

// adopt looks at what an earlier pool left: daemons that serve pods go on, the rest is ended.
func (p *Pool) adopt(ctx context.Context) error {
	entries, err := p.reg.List()
	if err != nil {
		return err
	}
	p.uids = newUsers(p.cfg.UIDBase, p.cfg.UIDCount)
	for _, e := range entries {
		if _, alive := e.Process(); alive && e.Sandbox != "" {
			p.uids.keep(e)
			continue
		}
		p.log.Info("cleaning up after a shim daemon", "member", e.Member, "sandbox", e.Sandbox)
		if err := p.reg.End(ctx, e); err != nil {
			p.log.Warn("cleaning up after a shim daemon", "member", e.Member, "error", err)
		}
	}
	return p.uids.scan()
}

// loop handles events until ctx ends.
func (p *Pool) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case handle := <-p.events:
			handle()
		case <-timer.C:
		}
		wait := p.balance(ctx)
		p.standAside()
		if wait > 0 {
			timer.Reset(wait)
		}
	}
}

// send gives the loop an event.
func (p *Pool) send(ctx context.Context, e event) {
	select {
	case p.events <- e:
	case <-ctx.Done():
	}
}

// balance brings members and requests together and spawns what is missing. It returns when to do so
// again, 0 for not before something happens.
func (p *Pool) balance(ctx context.Context) time.Duration {
	p.dropGone()
	if p.template == nil {
		if wait := time.Until(p.holdUntil); wait > 0 {
			return wait
		}
		p.build(ctx)
		return 0
	}
	p.assignAll()
	if wait := time.Until(p.holdUntil); wait > 0 && p.failures > 0 {
		return wait
	}
	if !p.spawnWhile(ctx, func() bool { return len(p.queue) > 0 }) {
		return time.Until(p.holdUntil)
	}
	// The processors belong to pods that wait, and for a moment to those that have just got a micro-VM.
	if n, wait := p.pending(); n > 0 {
		return wait // unless their reports come first
	}
	if wait := time.Until(p.holdUntil); wait > 0 {
		return wait
	}
	if !p.spawnWhile(ctx, func() bool { return p.missing() > 0 }) {
		return time.Until(p.holdUntil)
	}
	return 0
}

// spawnWhile spawns members while they are needed and not too many are being prepared. It returns false if
// that failed.
func (p *Pool) spawnWhile(ctx context.Context, needed func() bool) bool {
	for needed() && p.preparing() < p.parallel() {
		if !p.spawn(ctx) {
			return false
		}
		p.assignAll()
	}
	return true
}

// pending is how many pods wait for a micro-VM, and when patience with the first of them ends, 0 for never.
func (p *Pool) pending() (n int, ends time.Duration) {
	n = len(p.queue)
	for _, m := range p.members {
		if m.request == nil || m.ready {
			continue
		}
		if left := time.Until(m.since.Add(patience)); left > 0 {
			n++
			if ends == 0 || left < ends {
				ends = left
			}
		}
	}
	return n, ends
}

// standAside has the members that are being prepared for later leave the processors to pods that wait or
// have just got a micro-VM.
func (p *Pool) standAside() {
	pods, _ := p.pending()
	aside := pods > 0 || p.failures == 0 && time.Until(p.holdUntil) > 0
	for _, m := range p.members {
		if m.ready || m.request != nil || m.aside == aside {
			continue
		}
		m.aside = aside
		if err := m.Aside(aside); err != nil {
			p.log.Warn("telling a shim daemon to stand aside", "member", m.id, "error", err) // its end is noticed
		}
	}
}

// parallel is how many members are prepared at a time.
func (p *Pool) parallel() int {
	if p.failures >= rebuildAfter {
		return 1
	}
	return max(2, runtime.NumCPU())
}

// dropGone forgets requests whose client has gone.
func (p *Pool) dropGone() {
	kept := p.queue[:0]
	for _, r := range p.queue {
		select {
		case <-r.gone:
		default:
			kept = append(kept, r)
		}
	}
	clear(p.queue[len(kept):])
	p.queue = kept
}

// missing is how many members are to be spawned in the end.
func (p *Pool) missing() int {
	free := 0
	for _, m := range p.members {
		if m.request == nil {
			free++
		}
	}
	return *p.cfg.Warm + len(p.queue) - free
}

// preparing is how many members are not ready yet, taken or not.
func (p *Pool) preparing() int {
	n := 0
	for _, m := range p.members {
		if !m.ready {
			n++
		}
	}
	return n
}

// assignAll gives members to requests: ready ones first, else the one that was spawned first.
func (p *Pool) assignAll() {
	for len(p.queue) > 0 {
		m := p.best()
		if m == nil {
			return
		}
		r := p.queue[0]
		p.queue[0] = nil
		p.queue = p.queue[1:]
		m.request, m.since, m.warm = r, time.Now(), m.ready
		p.holdUntil = later(p.holdUntil, time.Now().Add(refillPause))
		if err := m.Assign(r.assignment); err != nil {
			p.log.Warn("assigning a micro-VM", "member", m.id, "error", err)
			m.request = nil
			p.lose(m)
			p.queue = append([]*request{r}, p.queue...)
		}
	}
}

func (p *Pool) best() *member {
	var best *member
	for _, m := range p.members {
		if m.request != nil {
			continue
		}
		if best == nil || m.ready && !best.ready || m.ready == best.ready && m.born.Before(best.born) {
			best = m
		}
	}
	return best
}

// snapshot is the status as of now.
func (p *Pool) snapshot() wire.Status {
	s := p.status
	s.Waiting = len(p.queue)
	s.FailuresInARow = p.failures
	if p.failures > 0 && time.Until(p.holdUntil) > 0 {
		s.RetryAt = p.holdUntil
	}
	for _, m := range p.members {
		switch {
		case m.request != nil:
		case m.ready:
			s.Ready++
		default:
			s.Preparing++
		}
	}
	return s
}
