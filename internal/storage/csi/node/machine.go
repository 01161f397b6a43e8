package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/csi"
	"atoll.dev/atoll/internal/storage/datastore"
)

const (
	// sweepEvery is how often volumes that machines have closed are looked for: whoever closed them may not have
	// been able to say so.
	sweepEvery = 30 * time.Second
	// busyRetry is the pause before a snapshot is tried again of a volume that is just being opened or closed.
	busyRetry = 50 * time.Millisecond
	busyTries = 40
	// awayRetry is the pause before one is tried again whose datastore does not answer. The guest stands still meanwhile,
	// so that is not done often.
	awayRetry = time.Second
	awayTries = 10
	// snapshotsTimeout is how long snapshots of a machine may take. The shim, whose guest stands still, waits for longer.
	snapshotsTimeout = 50 * time.Second
)

// machinePath is the path under which a volume is on record that a virtual machine has without its being published.
// There is nothing at it.
func (s *Service) machinePath(pod, volume string) string {
	return filepath.Join(s.cfg.Kubelet, "plugins", handover.Driver, "machines", pod, exportName(volume))
}

// adopt attaches a volume in the engine that is not published for a pod, but that its virtual machine may have, and
// records that. Callers hold the volume's lock.
func (s *Service) adopt(ctx context.Context, r attach.OpenRequest) (target, error) {
	if s.cfg.MayUse == nil {
		return target{}, errors.New("this host gives no volumes to virtual machines")
	}
	if err := s.cfg.MayUse(ctx, r); err != nil {
		return target{}, err
	}
	use, mode := "pod/"+r.Pod, datastore.ReadWrite
	switch {
	case r.Machine.Memory:
		use = "memory/" + r.Pod
	case r.Machine.ReadOnly:
		mode = datastore.ReadOnly
	case r.Machine.Shared:
		mode = datastore.ReadWriteMany
	}
	t := target{
		Path: s.machinePath(r.Pod, r.Volume), Volume: r.Volume, Pod: r.Pod, Name: exportName(r.Volume), Mode: mode, Machine: true,
		MicroVM: !r.Machine.Memory, Holder: csi.Holder(s.cfg.Node, use),
	}
	t.Request = digest(fmt.Sprint(t.Volume, t.Mode, t.MicroVM, t.Pod))
	if err := s.alone(t); err != nil {
		return target{}, err
	}
	if old, again, err := s.targets.get(t.Path); err != nil || again && old.Request == t.Request {
		return t, err
	} else if again {
		if err := s.release(ctx, old); err != nil {
			return target{}, err
		}
	}
	store, id, err := s.cfg.Stores.Resolve(r.Volume)
	if err != nil {
		return target{}, err
	}
	// Before the record: what does not exist, or is in use, leaves nothing behind.
	if _, err := store.Attach(ctx, id, t.Holder, t.Mode); err != nil {
		return target{}, err
	}
	return t, s.targets.put(t)
}

// InMachine implements csi.Open.
func (s *Service) InMachine(handle string) bool {
	all, err := s.targets.of(handle)
	return err == nil && slices.ContainsFunc(all, func(t target) bool { return t.Machine })
}

// openMemory makes the volume for a machine's memory a file.
func (s *Service) openMemory(ctx context.Context, t target) (attach.Opened, error) {
	if s.cfg.Export == nil {
		return attach.Opened{}, errors.New("this host cannot save the memory of virtual machines: it has no storage daemon")
	}
	store, v, err := s.cfg.Stores.Volume(ctx, t.Volume)
	if err != nil {
		return attach.Opened{}, err
	}
	disk, err := store.Attach(ctx, v.ID, t.Holder, t.Mode)
	if err != nil {
		return attach.Opened{}, err
	}
	opened, err := s.opened(ctx, store, v, disk)
	if err != nil {
		return attach.Opened{}, err
	}
	if !s.cfg.Export.Exported(exportName(t.Volume)) {
		if opened.Ceph, err = store.Admit(ctx, disk); err != nil {
			return attach.Opened{}, err
		}
	}
	file, err := s.cfg.Export.Export(ctx, exportName(t.Volume), opened)
	return attach.Opened{File: file}, err
}

// close hears from a machine that it has closed a volume. Of one that is published the kubelet says when it is over.
func (s *Service) close(ctx context.Context, r attach.OpenRequest) (struct{}, error) {
	defer s.lock(r.Volume)()
	t, ok, err := s.targets.get(s.machinePath(r.Pod, r.Volume))
	if err != nil || !ok {
		return struct{}{}, err
	}
	return struct{}{}, s.release(ctx, t)
}

// release undoes adopt, if the shim has closed the volume. Callers hold the volume's lock.
func (s *Service) release(ctx context.Context, t target) error {
	open, err := s.records.Find(t.Volume)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(open, func(r attach.Record) bool { return r.Pod == t.Pod }) {
		return fmt.Errorf("the virtual machine of pod %s has the volume open still", t.Pod)
	}
	if !t.MicroVM && s.cfg.Export != nil {
		if err := s.cfg.Export.Remove(ctx, exportName(t.Volume)); err != nil {
			return err
		}
	}
	store, id, err := s.cfg.Stores.Resolve(t.Volume)
	if err != nil {
		return err
	}
	if err := store.Detach(ctx, id, t.Holder); err != nil {
		return err
	}
	return s.targets.remove(t.Path)
}

// snapshots takes snapshots of volumes that one machine has open, all or none. The machine stands still meanwhile.
func (s *Service) snapshots(ctx context.Context, r attach.SnapshotsRequest) (struct{}, error) {
	for volume := range r.Snapshots {
		all, err := s.targets.of(volume)
		if err != nil {
			return struct{}{}, err
		}
		if !slices.ContainsFunc(all, func(t target) bool { return t.MicroVM && t.Pod == r.Pod }) {
			return struct{}{}, fmt.Errorf("%s is not published for pod %s: %w", volume, r.Pod, attach.ErrNotFound)
		}
	}
	taking, cancel := context.WithTimeout(ctx, snapshotsTimeout)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for volume, id := range r.Snapshots {
		wg.Go(func() {
			if err := s.snapshotOpen(taking, volume, id); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("snapshot of %s: %w", volume, err))
			}
		})
	}
	wg.Wait()
	if len(errs) == 0 {
		return struct{}{}, nil
	}
	for volume, id := range r.Snapshots {
		if store, _, err := s.cfg.Stores.Resolve(volume); err == nil {
			errs = append(errs, store.DeleteSnapshot(context.WithoutCancel(ctx), id))
		}
	}
	return struct{}{}, errors.Join(errs...)
}

// snapshotOpen takes a snapshot of one volume.
func (s *Service) snapshotOpen(ctx context.Context, volume, id string) error {
	store, name, err := s.cfg.Stores.Resolve(volume)
	if err != nil {
		return err
	}
	busy, away := 0, 0
	for {
		_, err = store.Snapshot(ctx, id, name, s.Live(volume))
		var pause time.Duration
		switch {
		case errors.Is(err, datastore.ErrBusy) && busy < busyTries:
			busy, pause = busy+1, busyRetry
		case errors.Is(err, datastore.ErrUnavailable) && away < awayTries:
			away, pause = away+1, awayRetry
		default:
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

// sweepMachines releases volumes that machines have closed.
func (s *Service) sweepMachines(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		all, err := s.targets.of("")
		if err != nil {
			s.cfg.Logger.Warn("looking for volumes that virtual machines have closed", "error", err)
		}
		for _, t := range all {
			if t.Machine {
				s.sweepMachine(ctx, t)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// sweepMachine releases one that has no shim: a shim records a volume before it asks how to open it, and removes the
// record when it has closed it.
func (s *Service) sweepMachine(ctx context.Context, t target) {
	unlock, ok := s.tryLock(t.Volume)
	if !ok {
		return
	}
	defer unlock()
	open, err := s.records.Find(t.Volume)
	if err != nil || slices.ContainsFunc(open, func(r attach.Record) bool { return r.Pod == t.Pod }) {
		return
	}
	if _, still, err := s.targets.get(t.Path); err != nil || !still {
		return
	}
	if err := s.release(ctx, t); err != nil && ctx.Err() == nil {
		s.cfg.Logger.Warn("releasing a volume that a virtual machine has closed", "volume", t.Volume, "error", err)
	}
}
