// Package chain is the storage engine: volumes as chains of images, whatever place these are in.
//
// It holds the order of steps of every operation, the records and who shares what. A Place keeps records and
// images and is all that differs between a directory (package directory) and Ceph (package rbd). Callers know
// it as datastore.Engine and datastore.Upkeep, whose documentation says what operations promise; each method
// here lists its steps. docs/decisions/0010-volume-layers.md says why it is done this way.
//
// What can go wrong is told by the sentinels of package datastore.
package chain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Store is an Engine and its Upkeep on one place. Make one with New.
type Store struct {
	place   Place
	keys    datastore.Keys
	limits  datastore.Limits
	timeout time.Duration
	qemu    *qemuimg.Tool

	// stuck is the number of operations of which a step takes too long.
	stuck atomic.Int32

	// mergingMu guards merging: how to end merges, by the locks they hold.
	mergingMu sync.Mutex
	merging   map[string]context.CancelFunc
}

// Store has to be all of it.
var (
	_ datastore.Engine = (*Store)(nil)
	_ datastore.Upkeep = (*Store)(nil)
)

const (
	// maxWait bounds how long an operation waits for another one.
	maxWait = time.Minute
	// grace is how long a step may go on after its caller has given up.
	grace = time.Second
	// look is how often operations are looked at, at least.
	look = 100 * time.Millisecond
)

// op is one operation under way.
type op struct {
	*Store
	ctx   context.Context
	locks Locker
	// beat is when the last step on the place began, in nanoseconds; 0 while the operation is elsewhere.
	beat atomic.Int64

	// The rest belongs to who watches the operation: the beat at the last look, how often it was seen since it came,
	// and how often looks are.
	seen  int64
	looks int
	every time.Duration
}

// run runs an operation. If the place hangs, or the context ends while it does, run returns and the operation
// goes on by itself until the place lets it, keeping its locks: it must not be overtaken.
func (s *Store) run(ctx context.Context, fn func(o *op) error) error {
	return s.watch(ctx, func(o *op) error { return o.enter(fn) })
}

// watch is run before the place is known to be there.
func (s *Store) watch(ctx context.Context, fn func(o *op) error) error {
	if n := s.stuck.Load(); n > 0 {
		return fmt.Errorf("%w: %d earlier operations still hang", datastore.ErrUnavailable, n)
	}
	o := &op{Store: s, ctx: ctx, every: min(s.timeout/20, look)}
	o.tick()
	o.seen = o.beat.Load()
	over := make(chan struct{})
	var err error
	go func() { // ends with the operation; not tied to a Run, since it must survive its caller
		defer close(over)
		err = fn(o)
	}()
	watch := time.NewTicker(o.every)
	for {
		select {
		case <-over:
			watch.Stop()
			return err
		case <-watch.C:
		}
		select {
		case <-over: // both, if the host stood still
			continue
		default:
		}
		lag := o.lag()
		stuck := lag >= s.timeout
		if !stuck && (ctx.Err() == nil || lag < grace) {
			continue
		}
		if stuck {
			s.stuck.Add(1)
		}
		go o.outlive(over, watch, stuck)
		return fmt.Errorf("%w: no answer for %s", datastore.ErrUnavailable, lag.Round(look))
	}
}

// outlive watches an operation that nobody waits for any more. A place that is only slow is there for others: it counts
// as stuck only while a step takes too long.
func (o *op) outlive(over <-chan struct{}, watch *time.Ticker, stuck bool) {
	defer watch.Stop()
	for ended := false; !ended; {
		select {
		case <-over:
			ended = true
		case <-watch.C:
		}
		now := !ended && o.lag() >= o.timeout
		switch {
		case now && !stuck:
			o.stuck.Add(1)
		case stuck && !now:
			o.stuck.Add(-1)
		}
		stuck = now
	}
}

// enter looks at the place and runs the operation.
func (o *op) enter(fn func(o *op) error) error {
	if err := o.place.Ready(); err != nil {
		return err
	}
	o.locks = o.place.Locker()
	defer o.locks.Release()
	return fn(o)
}

// tick marks the start of a step that must not take long, away that of something that may.
func (o *op) tick() { o.beat.Store(time.Now().UnixNano()) }
func (o *op) away() { o.beat.Store(0) }

// lag is called for each look, and returns for how long the last step has taken. It counts looks: while the host stands
// still there are none, and the place could not answer either.
func (o *op) lag() time.Duration {
	beat := o.beat.Load()
	if beat == 0 || beat != o.seen {
		o.seen, o.looks = beat, 0
		return 0
	}
	o.looks++
	return time.Duration(o.looks) * o.every
}

// step is called before every step: it ends an operation that nobody wants any more.
func (o *op) step() error {
	o.tick()
	if err := o.ctx.Err(); err != nil {
		return fmt.Errorf("operation on the datastore: %w", err)
	}
	return nil
}

// lock takes locks. ErrBusy if others have them for too long.
func (o *op) lock(names ...string) error {
	o.away()
	defer o.tick()
	o.interrupt(names)
	ctx, cancel := context.WithTimeout(o.ctx, maxWait)
	defer cancel()
	if err := o.locks.Lock(ctx, names...); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%w: waiting for %v: %w", datastore.ErrBusy, names, err)
		}
		return err
	}
	return nil
}

// locked runs fn with the lock of the store.
func (o *op) locked(fn func() error) error {
	if err := o.lock(StoreLock); err != nil {
		return err
	}
	defer o.locks.Unlock(StoreLock)
	return fn()
}

// lockName is the name of the lock of a volume or snapshot.
func lockName(k Kind, id string) string { return string(k) + "/" + id }

// get reads a record. ErrNotFound.
func (o *op) get(k Kind, id string) (*record, error) {
	if err := o.step(); err != nil {
		return nil, err
	}
	b, err := o.place.Read(k, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s %s", datastore.ErrNotFound, k[:len(k)-1], id)
	}
	if err != nil {
		return nil, err
	}
	return decode(k, id, b)
}

// find is get, but returns nil for what does not exist.
func (o *op) find(k Kind, id string) (*record, error) {
	r, err := o.get(k, id)
	if errors.Is(err, datastore.ErrNotFound) {
		return nil, nil
	}
	return r, err
}

// put writes a record.
func (o *op) put(r *record) error {
	if err := o.step(); err != nil {
		return err
	}
	b, err := r.encode()
	if err != nil {
		return err
	}
	return o.place.Write(r.Kind, r.ID, b)
}

// drop removes a record.
func (o *op) drop(r *record) error {
	if err := o.step(); err != nil {
		return err
	}
	if err := o.place.Remove(r.Kind, r.ID); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// all reads all records. One that cannot be read is an error: layers it names would seem to be nobody's.
func (o *op) all() ([]*record, error) {
	records, damaged, err := o.readAll()
	if err != nil {
		return nil, err
	}
	for _, err := range damaged {
		return nil, err
	}
	return records, nil
}

// readAll reads all records, and returns the errors of those that cannot be read by name.
func (o *op) readAll() ([]*record, map[string]error, error) {
	var records []*record
	damaged := map[string]error{}
	for _, k := range Kinds() {
		if err := o.step(); err != nil {
			return nil, nil, err
		}
		found, err := o.readKind(k)
		if err != nil {
			return nil, nil, err
		}
		for _, id := range slices.Sorted(maps.Keys(found)) {
			r, err := found[id]()
			switch {
			case errors.Is(err, datastore.ErrCorrupt):
				damaged[lockName(k, id)] = err
			case err != nil:
				return nil, nil, err
			case r != nil: // nil: gone since
				records = append(records, r)
			}
		}
	}
	return records, damaged, nil
}

// readKind returns how to read each record of a kind.
func (o *op) readKind(k Kind) (map[string]func() (*record, error), error) {
	out := map[string]func() (*record, error){}
	if bulk, ok := o.place.(Bulk); ok {
		all, _, err := bulk.ReadAll(k)
		for id, b := range all {
			out[id] = func() (*record, error) { return decode(k, id, b) }
		}
		return out, err
	}
	ids, _, err := o.place.List(k)
	for _, id := range ids {
		out[id] = func() (*record, error) { return o.find(k, id) }
	}
	return out, err
}

// checkID refuses ids that are no good as file names.
func checkID(ids ...string) error {
	for _, id := range ids {
		if !validID.MatchString(id) {
			return fmt.Errorf("%w: id %.80q", datastore.ErrInvalid, id)
		}
	}
	return nil
}
