package datastore

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// tidying tidies datastores now and then, beside the worker and each other.
type tidying struct {
	host Host
	log  *slog.Logger
	wg   sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	last    map[string]time.Time
	running map[string]context.CancelFunc
}

// begin starts to tidy a datastore, unless that is under way or was done not long ago.
func (t *tidying) begin(ctx context.Context, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running[name] != nil || time.Since(t.last[name]) <= tidyEvery || ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	t.running[name] = cancel
	t.wg.Go(func() {
		defer cancel()
		err := t.host.Tidy(ctx, name)
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.running, name)
		if ctx.Err() != nil { // it is gone, or this process ends
			return
		}
		t.last[name] = time.Now()
		if err != nil {
			t.log.Warn("tidying a datastore", "datastore", name, "error", err)
		}
	})
}

// forget ends what is under way for a datastore that is gone.
func (t *tidying) forget(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if cancel := t.running[name]; cancel != nil {
		cancel()
	}
	delete(t.last, name)
}

// wait waits for all that was begun, whose contexts must have ended.
func (t *tidying) wait() { t.wg.Wait() }
