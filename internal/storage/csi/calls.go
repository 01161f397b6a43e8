package csi

import (
	"context"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// calls runs one operation per key at a time. An operation does not end with the call that began it, so
// that a long copy is not begun anew by each caller that loses patience; callers of the same key wait. The
// zero value is ready.
type calls struct {
	mu      sync.Mutex
	running map[string]chan struct{} // closed when the operation of this key has ended
	stops   []context.CancelFunc
	wg      sync.WaitGroup
	stopped bool
}

// begin waits until no operation of this key runs, and then counts as one until end is called.
func (c *calls) begin(ctx context.Context, key string) (background context.Context, end func(), err error) {
	for {
		c.mu.Lock()
		if c.stopped {
			c.mu.Unlock()
			return nil, nil, status.Error(codes.Unavailable, "the driver is stopping")
		}
		busy, ok := c.running[key]
		if !ok {
			break
		}
		c.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, nil, status.Errorf(codes.Aborted, "an operation on %s is still under way", key)
		}
	}
	defer c.mu.Unlock()
	if c.running == nil {
		c.running = map[string]chan struct{}{}
	}
	done := make(chan struct{})
	c.running[key] = done
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c.stops = append(c.stops, cancel)
	c.wg.Add(1)
	return background, func() {
		cancel()
		c.mu.Lock()
		delete(c.running, key)
		if len(c.running) == 0 {
			c.stops = nil
		}
		c.mu.Unlock()
		close(done)
		c.wg.Done()
	}, nil
}

// stop cancels what runs and waits for it.
func (c *calls) stop() {
	c.mu.Lock()
	c.stopped = true
	for _, cancel := range c.stops {
		cancel()
	}
	c.mu.Unlock()
	c.wg.Wait()
}

// do runs f for key and returns its result, or Aborted when ctx ends before. In that case f goes on.
func do[T any](ctx context.Context, c *calls, key string, f func(context.Context) (T, error)) (T, error) {
	var none T
	background, end, err := c.begin(ctx, key)
	if err != nil {
		return none, err
	}
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		defer end()
		value, err := f(background)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, status.Errorf(codes.Aborted, "the operation on %s takes long and goes on", key)
	}
}
