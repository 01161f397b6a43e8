package chain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Defaults of a configuration.
const (
	defaultWarnAt   = 0.8
	defaultRefuseAt = 0.95
	// defaultTimeout is more than what a busy disk takes to sync, and less than callers wait.
	defaultTimeout = 25 * time.Second
)

// Options is what a store needs besides its place.
type Options struct {
	// Keys wraps keys of encrypted volumes; nil refuses them with ErrKey.
	Keys datastore.Keys
	// Limits says how full the place may get.
	Limits datastore.Limits
	// Timeout is how long a single step in the place may take before a call gives up with ErrUnavailable;
	// 0 is 25 s.
	Timeout time.Duration
	// Tool is qemu-img.
	Tool *qemuimg.Tool
}

// New returns a store in a place. It does not look at it.
func New(p Place, c Options) (*Store, error) {
	s := &Store{place: p, keys: c.Keys, limits: c.Limits, timeout: c.Timeout, qemu: c.Tool, merging: map[string]context.CancelFunc{}}
	if s.limits.WarnAt == 0 {
		s.limits.WarnAt = defaultWarnAt
	}
	if s.limits.RefuseAt == 0 {
		s.limits.RefuseAt = defaultRefuseAt
	}
	if s.timeout == 0 {
		s.timeout = defaultTimeout
	}
	if l := s.limits; l.WarnAt < 0 || l.WarnAt > 1 || l.RefuseAt <= 0 || l.RefuseAt > 1 || l.Overcommit < 0 || s.timeout < 0 {
		return nil, fmt.Errorf("%w: limits %+v", datastore.ErrInvalid, l)
	}
	return s, nil
}

// Init makes an empty or missing directory a datastore, unless it is one already, and returns its id. A
// directory that holds something else is refused.
func (s *Store) Init(ctx context.Context) (string, error) {
	var id string
	err := s.watch(ctx, func(*op) error {
		var err error
		id, err = s.place.Init()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("preparing the datastore: %w", err)
	}
	return id, nil
}

// room refuses what would fill the datastore: bytes more are taken at once if thick is set, and provision more
// are promised.
func (o *op) room(provision, bytes int64, thick bool) error {
	if err := o.step(); err != nil {
		return err
	}
	capacity, free, err := o.place.Space()
	if err != nil {
		return err
	}
	used := float64(capacity - free)
	if thick {
		used += float64(bytes)
	}
	if used >= o.limits.RefuseAt*float64(capacity) {
		return fmt.Errorf("%w: %d of %d bytes are free, and the last %.0f %% are not given away", datastore.ErrFull, free, capacity, 100*(1-o.limits.RefuseAt))
	}
	if o.limits.Overcommit == 0 || provision == 0 {
		return nil
	}
	records, _, err := o.readAll()
	if err != nil {
		return err
	}
	if promised := provisioned(records); float64(promised)+float64(provision) > o.limits.Overcommit*float64(capacity) {
		return fmt.Errorf("%w: %d bytes are promised, the limit is %g times %d", datastore.ErrFull, promised, o.limits.Overcommit, capacity)
	}
	return nil
}

// provisioned is the sum of the sizes of volumes.
func provisioned(records []*record) int64 {
	var sum int64
	for _, r := range records {
		if r.Kind == Volumes && r.State != datastore.StateDeleting {
			sum += r.Size
		}
	}
	return sum
}

// Status tells room and health.
func (s *Store) Status(ctx context.Context) datastore.Status {
	var out datastore.Status
	err := s.run(ctx, func(o *op) error {
		var st datastore.Status
		var err error
		if st.Capacity, st.Free, err = o.place.Space(); err != nil {
			return err
		}
		records, damaged, err := o.readAll()
		if err != nil {
			return err
		}
		seen := map[string]bool{}
		for _, r := range records {
			switch {
			case r.State != datastore.StateReady:
			case r.Kind == Volumes:
				st.Volumes++
			default:
				st.Snapshots++
			}
			for _, l := range r.images() {
				if seen[l.ID] {
					continue
				}
				seen[l.ID] = true
				used, err := o.place.Images().Used(l)
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				st.Used += used
			}
		}
		st.Provisioned = provisioned(records)
		apply(s.limits, &st)
		for _, err := range damaged {
			st.Err = err
		}
		out = st
		return nil
	})
	if err != nil {
		return datastore.Status{Err: err}
	}
	return out
}

// apply compares with the limits.
func apply(l datastore.Limits, st *datastore.Status) {
	used, capacity := float64(st.Capacity-st.Free), float64(st.Capacity)
	st.Warning = used >= l.WarnAt*capacity
	st.Full = used >= l.RefuseAt*capacity
	st.Creatable = datastore.MaxSize
	if l.Overcommit > 0 {
		st.Creatable = min(st.Creatable, int64(l.Overcommit*capacity)-st.Provisioned)
	}
	st.Creatable = max(0, st.Creatable/datastore.SizeUnit*datastore.SizeUnit)
	if st.Full || st.Creatable == 0 {
		st.Full, st.Creatable = true, 0
	}
}
