package pool

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"atoll.dev/atoll/internal/pool/config"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/vm"
)

// fakeMaker makes members that come up after a while, or fail.
type fakeMaker struct {
	delay time.Duration

	mu        sync.Mutex
	builds    int
	spawned   int
	preparing int
	most      int // preparing at a time
	uids      map[uint32]bool
	failNext  int // so many members fail
	failBuild int
	members   []*fakeMember
}

func (f *fakeMaker) Build(context.Context) (*Template, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.builds++
	if f.failBuild > 0 {
		f.failBuild--
		return nil, errors.New("no kernel")
	}
	return &Template{Meta: vm.Meta{Accel: vm.TCG}}, nil
}

func (f *fakeMaker) Spawn(_ *Template, init wire.Init) (Member, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.uids[init.UID] {
		return nil, fmt.Errorf("uid %d is used twice", init.UID)
	}
	f.uids[init.UID] = true
	f.spawned++
	f.preparing++
	f.most = max(f.most, f.preparing)
	fail := f.failNext > 0
	if fail {
		f.failNext--
	}
	m := &fakeMember{
		init: init, reports: make(chan wire.Report, 8), assigned: make(chan wire.Assignment, 1),
		released: make(chan struct{}), dead: make(chan struct{}), pid: 1<<22 + f.spawned,
	}
	f.members = append(f.members, m)
	go m.live(f, fail)
	return m, nil
}

func (f *fakeMaker) prepared() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.preparing--
}

type fakeMember struct {
	init     wire.Init
	reports  chan wire.Report
	assigned chan wire.Assignment
	released chan struct{}
	dead     chan struct{}
	once     sync.Once
	die      sync.Once
	aside    atomic.Bool
	pid      int
}

// live is the life of a member.
func (m *fakeMember) live(f *fakeMaker, fail bool) {
	defer close(m.reports)
	ready := time.After(f.delay)
	for {
		select {
		case <-ready:
			f.prepared()
			ready = nil
			if fail {
				m.reports <- wire.Report{Error: "no memory"}
				return
			}
			m.reports <- wire.Report{Ready: true}
		case a := <-m.assigned:
			m.reports <- wire.Report{Assigned: true, Address: "unix:///" + a.Sandbox}
		case <-m.released:
			if ready != nil {
				f.prepared()
			}
			return
		case <-m.dead:
			if ready != nil {
				f.prepared()
			}
			return
		}
	}
}

func (m *fakeMember) Assign(a wire.Assignment) error {
	m.assigned <- a
	return nil
}

func (m *fakeMember) Aside(yes bool) error {
	m.aside.Store(yes)
	return nil
}
func (m *fakeMember) Reports() <-chan wire.Report { return m.reports }
func (m *fakeMember) PID() int                    { return m.pid }
func (m *fakeMember) Release()                    { m.once.Do(func() { close(m.released) }) }
func (m *fakeMember) kill()                       { m.die.Do(func() { close(m.dead) }) }

// startPool runs a pool's loop and socket, without what needs root.
func startPool(t *testing.T, warm int, f *fakeMaker) string {
	t.Helper()
	dir := t.TempDir()
	f.uids = map[uint32]bool{}
	cfg := config.Config{RunDir: dir, Warm: &warm, UIDBase: 700000, UIDCount: 1000}
	p, err := New(cfg, f)
	if err != nil {
		t.Fatal(err)
	}
	p.uids = newUsers(cfg.UIDBase, cfg.UIDCount)
	l, err := listen(cfg.Socket())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	p.wg.Go(func() { p.accept(ctx, l) })
	go func() {
		defer close(done)
		p.loop(ctx)
		_ = l.Close()
		p.releaseAll()
		p.wg.Wait()
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return cfg.Socket()
}

func take(t *testing.T, socket, id string) wire.Taken {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	got, err := wire.Take(ctx, socket, wire.Assignment{Sandbox: id, Since: time.Now()})
	if err != nil {
		t.Error(err)
	}
	if got.Address != "unix:///"+id {
		t.Errorf("%s got address %q", id, got.Address)
	}
	return got
}

// until waits for a status.
func until(t *testing.T, socket string, ok func(wire.Status) bool) wire.Status {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		s, err := wire.GetStatus(t.Context(), socket)
		if err == nil && ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("status %+v, %v", s, err)
		}
	}
}

func TestWarm(t *testing.T) {
	f := &fakeMaker{delay: 5 * time.Millisecond}
	socket := startPool(t, 3, f)
	until(t, socket, func(s wire.Status) bool { return s.Ready == 3 })
	for i := range 3 {
		if got := take(t, socket, fmt.Sprint(i)); !got.Warm || got.PID == 0 {
			t.Errorf("got %+v", got)
		}
	}
	s := until(t, socket, func(s wire.Status) bool { return s.Ready == 3 && s.Taken == 3 })
	if s.TakenWarm != 3 || s.Preparing != 0 || s.Wanted != 3 || s.TemplateBuilds != 1 {
		t.Errorf("status %+v", s)
	}
}

func TestColdAndBurst(t *testing.T) {
	f := &fakeMaker{delay: 3 * time.Millisecond}
	socket := startPool(t, 0, f)
	if got := take(t, socket, "cold"); got.Warm {
		t.Errorf("got %+v", got)
	}
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() { take(t, socket, fmt.Sprint(i)) })
	}
	wg.Wait()
	s := until(t, socket, func(s wire.Status) bool { return s.Taken == 101 && s.Preparing == 0 })
	if s.Waiting != 0 || s.Ready != 0 {
		t.Errorf("status %+v", s)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.most > max(2, runtime.NumCPU()) || f.spawned != 101 {
		t.Errorf("%d at a time, %d in all", f.most, f.spawned)
	}
}

func TestFailingMembers(t *testing.T) {
	f := &fakeMaker{delay: time.Millisecond, failNext: rebuildAfter + 1, failBuild: 1}
	socket := startPool(t, 1, f)
	s := until(t, socket, func(s wire.Status) bool { return s.Ready == 1 })
	if s.TemplateBuilds != 2 || s.Failed < uint64(rebuildAfter) || s.Error != "" {
		t.Errorf("status %+v", s)
	}
	if s.LastFailure == "" || s.LastFailureAt.IsZero() || s.FailuresInARow == 0 {
		t.Errorf("the failure is forgotten before a member has settled: %+v", s)
	}
	take(t, socket, "after all")
}

func TestMemberEnds(t *testing.T) {
	f := &fakeMaker{delay: time.Millisecond}
	socket := startPool(t, 2, f)
	until(t, socket, func(s wire.Status) bool { return s.Ready == 2 })
	f.mu.Lock()
	for _, m := range f.members {
		m.kill()
	}
	f.mu.Unlock()
	until(t, socket, func(s wire.Status) bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return s.Ready == 2 && f.spawned == 4
	})
	take(t, socket, "x")
}

func TestClientGoes(t *testing.T) {
	f := &fakeMaker{delay: time.Hour}
	socket := startPool(t, 0, f)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		// The first is given the member that is being prepared at once.
		_, err := wire.Take(t.Context(), socket, wire.Assignment{Sandbox: "first"})
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	f.failNext = 1000
	f.mu.Unlock()
	for range max(2, runtime.NumCPU()) {
		_, _ = wire.Take(ctx, socket, wire.Assignment{Sandbox: "other"})
	}
	_, err := wire.Take(ctx, socket, wire.Assignment{Sandbox: "late"})
	if err == nil {
		t.Fatal("took a member that does not come up")
	}
	until(t, socket, func(s wire.Status) bool { return s.Waiting == 0 })
}

func TestBadRequests(t *testing.T) {
	f := &fakeMaker{delay: time.Millisecond}
	socket := startPool(t, 0, f)
	if _, err := wire.Take(t.Context(), socket, wire.Assignment{}); !errors.Is(err, wire.ErrPool) {
		t.Errorf("empty assignment: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := wire.Take(ctx, filepath.Join(t.TempDir(), "none"), wire.Assignment{Sandbox: "x"})
	if err == nil || !strings.Contains(err.Error(), "warm pool") {
		t.Errorf("no pool: %v", err)
	}
}

func TestUsers(t *testing.T) {
	u := newUsers(1000, 16)
	seen := map[uint32]bool{}
	for range 16 {
		uid, ok := u.take()
		if !ok || seen[uid] {
			t.Fatalf("uid %d, %v", uid, ok)
		}
		seen[uid] = true
	}
	if uid, ok := u.take(); ok {
		t.Errorf("uid %d is there twice", uid)
	}
	u.give(1003)
	if uid, ok := u.take(); !ok || uid != 1003 {
		t.Errorf("uid %d, %v", uid, ok)
	}
	u.keepPID(1005, 1<<22+1, "m") // a process that does not exist
	if uid, ok := u.take(); !ok || uid != 1005 {
		t.Errorf("uid %d, %v", uid, ok)
	}
}

func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(name); !errors.Is(err, ErrRunning) {
		t.Errorf("second pool: %v", err)
	}
	unlock()
	if unlock, err = lock(name); err != nil {
		t.Error(err)
	}
	unlock()
}
