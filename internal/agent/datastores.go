package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	controller "atoll.dev/atoll/internal/controllers/datastore"
	"atoll.dev/atoll/internal/storage/backends"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/images"
	"atoll.dev/atoll/internal/storage/stores"
)

// openWithin bounds an attempt to open a datastore, whose file system may not answer.
const openWithin = 15 * time.Second

// datastores opens what Datastore objects describe. It is the Host of the Datastore controller.
type datastores struct {
	set  *stores.Set
	keys datastore.Keys

	mu   sync.Mutex // guards the field below
	open map[string]opened
}

// opened is a datastore and what it was opened with.
type opened struct {
	id     string
	spec   string
	labels map[string]string
}

// Open implements controller.Host.
func (d *datastores) Open(ctx context.Context, ds *api.Datastore) error {
	if _, err := d.set.Get(ds.Name); errors.Is(err, stores.ErrNone) || errors.Is(err, stores.ErrUnknown) {
		// Opening may take seconds, in which nobody must take it for one that there is not.
		d.set.Close(ds.Name, fmt.Errorf("%w: it is just being opened", datastore.ErrUnavailable))
	}
	err := d.tryOpen(ctx, ds)
	if err != nil {
		d.forget(ds.Name)
		d.set.Close(ds.Name, errors.Join(datastore.ErrUnavailable, err))
		return err
	}
	if ds.DeletionTimestamp != nil { // images in it are copies of what the library has
		if s, err := d.set.Get(ds.Name); err == nil {
			return images.Forget(ctx, s, func(string) bool { return true })
		}
	}
	return nil
}

// Elsewhere implements controller.Host.
func (d *datastores) Elsewhere(name string) {
	d.forget(name)
	d.set.Close(name, stores.ErrElsewhere)
}

// Listed implements controller.Host.
func (d *datastores) Listed() { d.set.Listed() }

func (d *datastores) forget(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.open, name)
}

func (d *datastores) tryOpen(ctx context.Context, ds *api.Datastore) error {
	config := backends.Config{
		ID: ds.Status.ID, Keys: d.keys,
		Limits: datastore.Limits{
			WarnAt: float64(ds.Spec.WarnPercent) / 100, RefuseAt: float64(ds.Spec.RefusePercent) / 100,
			Overcommit: float64(ds.Spec.OvercommitPercent) / 100,
		},
	}
	shared, place := true, ""
	switch dir, rbd := ds.Spec.Directory, ds.Spec.RBD; {
	case dir != nil:
		config.Path, shared, place = dir.Path, dir.Shared, dir.Path
	case rbd != nil:
		config.Pool, config.Namespace, config.Conf, config.User = rbd.Pool, rbd.Namespace, rbd.ConfigFile, rbd.User
		place = "pool " + rbd.Pool
	default:
		return errors.New("it says neither directory nor rbd")
	}
	spec := fmt.Sprint(config.Path, config.Pool, config.Namespace, config.Conf, config.User, shared, config.Limits)
	d.mu.Lock()
	was, ok := d.open[ds.Name]
	d.mu.Unlock()
	if ok && was.spec == spec && maps.Equal(was.labels, ds.Labels) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, openWithin)
	defer cancel()
	engine, err := backends.New(config)
	if err != nil {
		return err
	}
	id := config.ID
	if id == "" {
		if id, err = engine.Init(ctx); err != nil {
			return fmt.Errorf("preparing %s: %w", place, err)
		}
		config.ID = id
		if engine, err = backends.New(config); err != nil {
			return err
		}
	}
	d.set.Put(stores.Store{Name: ds.Name, Labels: ds.Labels, Shared: shared, Backend: engine})
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open == nil {
		d.open = map[string]opened{}
	}
	d.open[ds.Name] = opened{id: id, spec: spec, labels: maps.Clone(ds.Labels)}
	return nil
}

// Close implements controller.Host.
func (d *datastores) Close(name string) {
	d.forget(name)
	d.set.Remove(name)
}

// Tidy implements controller.Host.
func (d *datastores) Tidy(ctx context.Context, name string) error {
	s, err := d.set.Get(name)
	if err != nil {
		return err
	}
	return s.Tidy(ctx)
}

// Look implements controller.Host.
func (d *datastores) Look(ctx context.Context, name string) controller.State {
	s, err := d.set.Get(name)
	if err != nil {
		return controller.State{Err: err}
	}
	status := s.Status(ctx)
	if status.Err != nil {
		return controller.State{Err: status.Err}
	}
	contents, err := s.List(ctx)
	if err != nil {
		return controller.State{Err: err}
	}
	d.mu.Lock()
	id := d.open[name].id
	d.mu.Unlock()
	state := controller.State{
		ID: id, Capacity: status.Capacity, Free: status.Free, Used: status.Used, Provisioned: status.Provisioned,
		NearlyFull: status.Warning, Full: status.Full, Snapshots: len(contents.Snapshots),
	}
	for _, v := range contents.Volumes {
		entry := api.DatastoreVolume{ID: v.ID, Claim: stores.Claim(v), Size: quantity(v.Size)}
		for _, a := range v.Attachments {
			entry.HeldBy = append(entry.HeldBy, a.Holder)
		}
		state.Volumes = append(state.Volumes, entry)
	}
	return state
}
