package chain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
)

// tryWait is how long Tidy waits for a lock: what is in use can wait for the next time.
const tryWait = 20 * time.Millisecond

// Tidy finishes what was interrupted and merges layers. What cannot be done now is left for the next time;
// the errors of what should have worked are joined.
func (s *Store) Tidy(ctx context.Context) error {
	var todo []*record
	err := s.run(ctx, func(o *op) error {
		if err := o.locked(o.place.Sweep); err != nil {
			return err
		}
		var err error
		todo, err = o.all()
		return err
	})
	if err != nil {
		return fmt.Errorf("tidying: %w", err)
	}
	var failed []error
	for _, r := range todo {
		if r.State == datastore.StateReady && r.Pending == nil && len(r.Doomed) == 0 && r.Rekey == "" {
			continue
		}
		if err := s.run(ctx, func(o *op) error { return o.finish(r.Kind, r.ID) }); err != nil {
			failed = append(failed, fmt.Errorf("finishing %s %s: %w", r.Kind, r.ID, err))
		}
	}
	return errors.Join(append(failed, s.mergeAll(ctx))...)
}

// try takes locks if nobody has them.
func (o *op) try(names ...string) (bool, error) {
	ctx, cancel := context.WithTimeout(o.ctx, tryWait)
	defer cancel()
	err := o.locks.Lock(ctx, names...)
	if err == nil {
		return true, nil
	}
	o.locks.Release()
	if ctx.Err() != nil && o.ctx.Err() == nil {
		return false, nil
	}
	return false, err
}

// finish finishes what was begun with a record.
func (o *op) finish(k Kind, id string) error {
	if ok, err := o.try(lockName(k, id)); !ok {
		return err
	}
	r, err := o.find(k, id)
	if err != nil || r == nil {
		return err
	}
	if r.State != datastore.StateReady {
		return o.finishDelete(r)
	}
	if r.Pending != nil && len(r.Attachments) == 0 {
		if err := o.thaw(r, nil); err != nil {
			return err
		}
	}
	if r.Rekey != "" && len(r.Attachments) == 0 {
		if _, err := o.rekey(r); err != nil {
			return err
		}
	}
	return o.clean(r)
}

// pair is two layers, one right above the other, that nothing tells apart: whoever needs one needs both.
type pair struct{ lower, upper Layer }

// mergeAll merges pairs until there is none left that can be merged.
func (s *Store) mergeAll(ctx context.Context) error {
	var failed []error
	done := map[string]bool{} // by upper layer: not tried twice
	for {
		var found *pair
		var names []string
		err := s.run(ctx, func(o *op) error {
			records, err := o.all()
			if err != nil {
				return err
			}
			found, names = findPair(records, done)
			return nil
		})
		if err != nil {
			return errors.Join(append(failed, fmt.Errorf("merging layers: %w", err))...)
		}
		if found == nil {
			return errors.Join(failed...)
		}
		done[found.upper.ID] = true
		if err := s.run(ctx, func(o *op) error { return o.merge(*found, names) }); err != nil {
			failed = append(failed, fmt.Errorf("merging layer %s into %s: %w", found.upper.ID, found.lower.ID, err))
		}
	}
}

// findPair returns a pair to merge, and the locks of those who need it.
func findPair(records []*record, done map[string]bool) (*pair, []string) {
	refs := references(records)
	for _, r := range records {
		for i := 1; i < len(r.Layers); i++ {
			p := pair{r.Layers[i-1], r.Layers[i]}
			exposes := p.upper.Key != "" && p.lower.Key == "" // what is encrypted stays so
			if done[p.upper.ID] || exposes || refs[p.lower.ID] != refs[p.upper.ID] {
				continue
			}
			if users := p.users(records); users != nil {
				return &p, users
			}
		}
	}
	return nil, nil
}

// users returns the locks of the records that name the upper layer, or nil if one of them is in use.
func (p pair) users(records []*record) []string {
	var names []string
	for _, r := range records {
		if !slices.ContainsFunc(r.images(), func(l Layer) bool { return l.ID == p.upper.ID || l.ID == p.lower.ID }) {
			continue
		}
		i := p.index(r)
		if i < 1 || r.Layers[i-1].ID != p.lower.ID || r.State != datastore.StateReady || len(r.Attachments) > 0 || r.Pending != nil || r.Rekey != "" {
			return nil
		}
		names = append(names, lockName(r.Kind, r.ID))
	}
	return names
}

// index is where the upper layer is in a chain, or -1.
func (p pair) index(r *record) int {
	return slices.IndexFunc(r.Layers, func(l Layer) bool { return l.ID == p.upper.ID })
}

// merge copies the upper layer into the lower one and drops it.
//
// Steps: the data; the names in the headers of the layers above; the records, one by one, in each of which
// the upper layer is doomed from then on; the file. Until the last record is written the upper layer is still
// read by somebody, and hides what the lower one has got meanwhile, which is the same.
func (o *op) merge(p pair, names []string) error {
	ok, err := o.try(names...)
	if !ok {
		return err
	}
	records, err := o.all()
	if err != nil {
		return err
	}
	slices.Sort(names)
	again := p.users(records)
	slices.Sort(again)
	if !slices.Equal(names, again) { // changed meanwhile
		return nil
	}
	records = slices.DeleteFunc(records, func(r *record) bool { return p.index(r) < 1 })
	lower, err := o.commit(p, records[0], names)
	if err != nil || lower.ID == "" {
		return err
	}
	for _, r := range records {
		if i := p.index(r); i+1 < len(r.Layers) {
			if err := o.renameBelow(r.Layers[i+1], lower); err != nil {
				return err
			}
		}
	}
	for _, r := range records {
		i := p.index(r)
		r.Dirty = r.Dirty || i+1 == len(r.Layers) && r.Kind == Volumes
		r.Layers = slices.Delete(slices.Clone(r.Layers), i, i+1)
		r.Layers[i-1] = lower
		r.Doomed = append(r.Doomed, p.upper)
		r.Keys = r.usedKeys(r.Key, r.Layers)
		if err := o.put(r); err != nil {
			return err
		}
	}
	for _, r := range records {
		if err := o.clean(r); err != nil {
			return err
		}
	}
	return nil
}

// commit copies the data of the upper layer. Whoever wants one of the volumes meanwhile ends it: it can be
// begun again at any time. The layer it returns is the lower one as it is now, empty if it did not come to an
// end.
func (o *op) commit(p pair, r *record, names []string) (Layer, error) {
	secrets, err := o.secrets(r)()
	if err != nil {
		return Layer{}, err
	}
	end := p.index(r) + 1
	for i, l := range r.Layers[:end] {
		if err := o.look(l, r.Layers[:i]); err != nil {
			return Layer{}, err
		}
	}
	lower := p.lower
	lower.Thick = lower.Thick || p.upper.Thick // the next growth makes it so
	if p.upper.Size > lower.Size {
		lower.Size = p.upper.Size
		if err := o.place.Images().Grow(o.ctx, lower, lower.Size, false, o.secrets(r)); err != nil {
			return Layer{}, err
		}
	}
	ctx, cancel := context.WithCancel(o.ctx)
	defer cancel()
	o.announce(names, cancel)
	defer o.announce(names, nil)
	o.away()
	err = o.qemu.Commit(ctx, o.graph(r.Layers[:end]), secrets, nil)
	o.tick()
	if ctx.Err() != nil && o.ctx.Err() == nil {
		return Layer{}, nil
	}
	if err != nil {
		return Layer{}, FromTool(err)
	}
	f, err := o.place.Images().Open(p.lower, true)
	if err != nil {
		return Layer{}, err
	}
	defer f.Close()
	return lower, NoSpace(f.Sync())
}

// announce notes how to end a merge that holds these locks; nil takes the note back.
func (s *Store) announce(names []string, cancel context.CancelFunc) {
	s.mergingMu.Lock()
	defer s.mergingMu.Unlock()
	for _, name := range names {
		if cancel == nil {
			delete(s.merging, name)
		} else {
			s.merging[name] = cancel
		}
	}
}

// interrupt ends merges that hold one of these locks.
func (s *Store) interrupt(names []string) {
	s.mergingMu.Lock()
	defer s.mergingMu.Unlock()
	for _, name := range names {
		if cancel := s.merging[name]; cancel != nil {
			cancel()
		}
	}
}

// renameBelow makes the header of a layer name another one as the one below.
func (o *op) renameBelow(l, below Layer) error {
	if err := o.step(); err != nil {
		return err
	}
	f, err := o.place.Images().Open(l, true)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := setBacking(f, below); err != nil {
		return fmt.Errorf("image %s: %w", o.where(l), err)
	}
	return NoSpace(f.Sync())
}
