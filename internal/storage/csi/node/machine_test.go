package node

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

// away is a datastore that is not available for a while.
type away struct {
	stores.Backend
	until time.Time
	why   error
	tries int
}

func (a *away) Snapshot(context.Context, string, string, datastore.Live) (datastore.Snapshot, error) {
	a.tries++
	if time.Now().Before(a.until) {
		return datastore.Snapshot{}, fmt.Errorf("%w: by and by", a.why)
	}
	return datastore.Snapshot{}, nil
}

// TestSnapshotPatience: a snapshot is tried again as long as the datastore may come back while its machine waits.
func TestSnapshotPatience(t *testing.T) {
	for name, c := range map[string]struct {
		away time.Duration
		why  error
		fail bool
		once bool
	}{
		"a moment":         {away: 5 * time.Second, why: datastore.ErrUnavailable},
		"for long":         {away: time.Hour, why: datastore.ErrUnavailable, fail: true},
		"busy for a while": {away: time.Second, why: datastore.ErrBusy},
		"busy for longer":  {away: 20 * time.Second, why: datastore.ErrBusy, fail: true},
		"full":             {away: time.Second, why: datastore.ErrFull, fail: true, once: true},
	} {
		dir := t.TempDir()
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				set := &stores.Set{}
				a := &away{until: time.Now().Add(c.away), why: c.why}
				set.Put(stores.Store{Name: "s", Backend: a})
				s, err := New(Config{Node: "n", Stores: set, Kubelet: dir, RunDir: dir})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), snapshotsTimeout)
				defer cancel()
				err = s.snapshotOpen(ctx, "s/v", "snap")
				if c.fail != (err != nil) || c.fail && !errors.Is(err, c.why) || c.once != (a.tries == 1) {
					t.Errorf("%v after %d tries", err, a.tries)
				}
				if errors.Is(c.why, datastore.ErrUnavailable) && a.tries > awayTries+1 {
					t.Errorf("%d tries while the guest stands still", a.tries)
				}
			})
		})
	}
}
