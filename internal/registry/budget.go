package registry

import (
	"context"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

const (
	// maxReviews are questions to the API server whose a token is at the same time, of all and of one source.
	maxReviews, maxReviewsPerSource = 64, 8
	// maxBodies are bytes of manifests in memory, of all, and of one project or user.
	maxBodies, maxBodiesPerProject = 64 << 20, 16 << 20
	// takeWithin is how long somebody waits for what others have.
	takeWithin = 10 * time.Second
)

// budget bounds how much of something is in use at the same time, by all and by each of many keys.
type budget struct {
	total, each int64
	within      time.Duration

	mu    sync.Mutex // guards what follows
	used  int64
	by    map[string]int64
	given chan struct{} // closed when something was given back
}

func newBudget(total, each int64) *budget {
	return &budget{total: total, each: each, within: takeWithin, by: make(map[string]int64), given: make(chan struct{})}
}

// take gets n, or is not ok when others have it for too long. give gives it back.
func (b *budget) take(ctx context.Context, key string, n int64) (give func(), ok bool) {
	timer := time.NewTimer(b.within)
	defer timer.Stop()
	for {
		changed, ok := b.try(key, n)
		if ok {
			return sync.OnceFunc(func() { b.give(key, n) }), true
		}
		select {
		case <-changed:
		case <-timer.C:
			return nil, false
		case <-ctx.Done():
			return nil, false
		}
	}
}

func (b *budget) try(key string, n int64) (changed <-chan struct{}, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used+n > b.total || b.by[key]+n > b.each {
		return b.given, false
	}
	b.used += n
	b.by[key] += n
	return nil, true
}

func (b *budget) give(key string, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	if b.by[key] -= n; b.by[key] <= 0 {
		delete(b.by, key)
	}
	close(b.given)
	b.given = make(chan struct{})
}

// sourceOf is the address that a request comes from, or for IPv6 the network, where one host has many.
func sourceOf(req *http.Request) string {
	at, err := netip.ParseAddrPort(req.RemoteAddr)
	if err != nil {
		return req.RemoteAddr
	}
	addr := at.Addr().Unmap().WithZone("")
	if prefix, err := addr.Prefix(64); addr.Is6() && err == nil {
		return prefix.String()
	}
	return addr.String()
}
