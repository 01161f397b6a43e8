// Package attempts counts failed logins by a key (a source address, a name that nobody has) and says until when a
// key is locked.
//
// It is memory only, bounded, and forgets: the counts of users that exist are in their status. internal/identity
// is the caller. Nothing can go wrong; when the table is full the entry that failed longest ago goes.
package attempts

import (
	"net/netip"
	"sync"
	"time"
)

// Rule says when a key is locked and for how long.
type Rule struct {
	// After is the number of failures from which on each one locks.
	After int
	// First is how long the first lock holds. Each further failure doubles it, up to Most.
	First, Most time.Duration
}

// Lock is how long a key is locked after so many failures, 0 for not at all.
func (r Rule) Lock(failures int) time.Duration {
	if r.After <= 0 || failures < r.After {
		return 0
	}
	lock := r.First
	for range failures - r.After {
		if lock *= 2; lock >= r.Most {
			return r.Most
		}
	}
	return min(lock, r.Most)
}

// forget is after how long without a failure the earlier ones do not count any more.
const forget = time.Hour

// Table counts. Make one with New.
type Table struct {
	rule Rule
	max  int
	now  func() time.Time

	mu      sync.Mutex
	entries map[string]entry
}

type entry struct {
	failures int
	last     time.Time
	until    time.Time
}

// New makes a table of at most size keys. now is the clock.
func New(rule Rule, size int, now func() time.Time) *Table {
	return &Table{rule: rule, max: size, now: now, entries: map[string]entry{}}
}

// LockedUntil is the time a key is locked until, the zero time if it is not.
func (t *Table) LockedUntil(key string) time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.entries[key]; t.now().Before(e.until) {
		return e.until
	}
	return time.Time{}
}

// Fail counts a failure.
func (t *Table) Fail(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	e, known := t.entries[key]
	if !known && len(t.entries) >= t.max {
		t.makeRoom(now)
	}
	if now.Sub(e.last) > forget {
		e.failures = 0
	}
	e.failures++
	e.last = now
	if lock := t.rule.Lock(e.failures); lock > 0 {
		e.until = now.Add(lock)
	}
	t.entries[key] = e
}

// makeRoom removes what is forgotten, or else what failed longest ago.
func (t *Table) makeRoom(now time.Time) {
	oldest, at := "", now
	for key, e := range t.entries {
		if now.Sub(e.last) > forget {
			delete(t.entries, key)
			continue
		}
		if !e.last.After(at) {
			oldest, at = key, e.last
		}
	}
	if len(t.entries) >= t.max {
		delete(t.entries, oldest)
	}
}

// Source is the key of an address: itself for IPv4, the network of 64 bits for IPv6, where one host has many.
func Source(addr netip.Addr) string {
	addr = addr.Unmap().WithZone("")
	if !addr.Is6() {
		return addr.String()
	}
	prefix, err := addr.Prefix(64)
	if err != nil {
		return addr.String()
	}
	return prefix.String()
}

// Gate bounds how many attempts of one key go on at the same time. The zero value is ready for use.
type Gate struct {
	mu   sync.Mutex
	open map[string]int
}

// Enter reports whether there is room for one more of at most limit; leave gives it back.
func (g *Gate) Enter(key string, limit int) (leave func(), ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open == nil {
		g.open = map[string]int{}
	}
	if g.open[key] >= limit {
		return nil, false
	}
	g.open[key]++
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.open[key]--; g.open[key] <= 0 {
			delete(g.open, key)
		}
	}), true
}
