package chain

import (
	"context"
	"fmt"
	"maps"

	"atoll.dev/atoll/internal/storage/datastore"
)

// SetLabels replaces the labels of a volume, attached or not.
func (s *Store) SetLabels(ctx context.Context, id string, labels map[string]string) error {
	if err := checkID(id); err != nil {
		return err
	}
	return s.run(ctx, func(o *op) error {
		if err := o.lock(lockName(Volumes, id)); err != nil {
			return err
		}
		v, err := o.get(Volumes, id)
		switch {
		case err != nil:
			return fmt.Errorf("labelling volume %s: %w", id, err)
		case v.State != datastore.StateReady:
			return fmt.Errorf("%w: volume %s is %s", datastore.ErrNotFound, id, v.State)
		case maps.Equal(v.Labels, labels):
			return nil
		}
		v.Labels = maps.Clone(labels)
		return o.put(v)
	})
}
