package pool

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"atoll.dev/atoll/internal/pool/wire"
)

// TestStandAside: members that are being prepared stand aside while a pod starts, and only then.
func TestStandAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeMaker{delay: 2 * time.Second}
		p := runLoop(t, 2, f)
		time.Sleep(3 * time.Second)
		ask(p, "first")
		time.Sleep(refillPause + 10*time.Millisecond)
		refill := f.member(t, 2)
		expect := func(m *fakeMember, aside bool, when string) {
			t.Helper()
			synctest.Wait()
			if m.aside.Load() != aside {
				t.Errorf("%s a member that is being prepared stands aside: %v", when, !aside)
			}
		}
		expect(refill, false, "while no pod starts")

		got := ask(p, "second")
		expect(refill, true, "while a pod with a ready micro-VM starts")
		if taken := <-got; !taken.Warm {
			t.Errorf("got %+v", taken)
		}
		time.Sleep(refillPause + 10*time.Millisecond)
		expect(refill, false, "when it has started")

		next := f.member(t, 3)
		ask(p, "third") // is given the refill
		time.Sleep(2 * refillPause)
		status(p) // the loop looks again
		expect(refill, false, "when a pod waits for it")
		expect(next, true, "while a pod waits for another one")
	})
}

// TestPodsFirst: while a pod waits for a micro-VM no other one is begun.
func TestPodsFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeMaker{delay: 2 * time.Second}
		p := runLoop(t, 2, f)
		time.Sleep(3 * time.Second)
		for i := range 3 {
			if got := <-ask(p, fmt.Sprint(i)); got.Warm != (i < 2) {
				t.Errorf("pod %d got %+v", i, got)
			}
		}
		time.Sleep(f.delay - 10*time.Millisecond) // the last pod still waits, long after refillPause
		if n := f.count(); n != 3 {
			t.Errorf("%d members were begun for 3 pods", n)
		}
		time.Sleep(2 * f.delay)
		if s := status(p); s.Ready != 2 {
			t.Errorf("the pool is not refilled: %+v", s)
		}
	})
}

// TestStuckMember: a pod whose member does not come up holds up the others for a while only.
func TestStuckMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeMaker{delay: time.Second}
		p := runLoop(t, 2, f)
		time.Sleep(2 * time.Second)
		f.delay = time.Hour
		for i := range 3 {
			<-ask(p, fmt.Sprint(i))
		}
		synctest.Wait()
		f.delay = time.Second
		time.Sleep(patience - 10*time.Millisecond)
		if n := f.count(); n != 3 {
			t.Errorf("%d members were begun while a pod waits", n)
		}
		time.Sleep(20 * time.Millisecond)
		if refill := f.member(t, 3); refill.aside.Load() {
			t.Error("the next member stands aside for a pod that waits in vain")
		}
		time.Sleep(3 * time.Second)
		if s := status(p); s.Ready != 2 {
			t.Errorf("the pool is not refilled: %+v", s)
		}
	})
}

// ask asks for a member like a client does.
func ask(p *Pool, id string) <-chan wire.Taken {
	r := &request{assignment: wire.Assignment{Sandbox: id}, answer: make(chan wire.Taken, 1)}
	p.events <- func() { p.queue = append(p.queue, r) }
	return r.answer
}

// member is the one that was spawned after n others.
func (f *fakeMaker) member(t *testing.T, n int) *fakeMember {
	t.Helper()
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.members) != n+1 {
		t.Fatalf("%d members were begun, not %d", len(f.members), n+1)
	}
	return f.members[n]
}

// count is how many members were spawned.
func (f *fakeMaker) count() int {
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.spawned
}
