package node

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/csi"
	"atoll.dev/atoll/internal/storage/csi/export"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

// open tells a shim how to open a volume that was published for its pod, or that its virtual machine may have.
func (s *Service) open(ctx context.Context, r attach.OpenRequest) (attach.Opened, error) {
	defer s.lock(r.Volume)()
	all, err := s.targets.of(r.Volume)
	if err != nil {
		return attach.Opened{}, err
	}
	var t target
	switch i := slices.IndexFunc(all, func(t target) bool { return t.MicroVM && t.Pod == r.Pod && !t.Machine }); {
	case i >= 0:
		t = all[i]
	case r.Machine == nil:
		return attach.Opened{}, fmt.Errorf("%s is not published for pod %s: %w", r.Volume, r.Pod, attach.ErrNotFound)
	default:
		if t, err = s.adopt(ctx, r); err != nil {
			return attach.Opened{}, err
		}
		if r.Machine.Memory {
			return s.openMemory(ctx, t)
		}
	}
	store, v, err := s.cfg.Stores.Volume(ctx, r.Volume)
	if err != nil {
		return attach.Opened{}, err
	}
	disk, err := store.Attach(ctx, v.ID, t.Holder, t.Mode)
	if err != nil {
		return attach.Opened{}, err
	}
	opened, err := s.opened(ctx, store, v, disk)
	if err == nil {
		opened.Ceph, err = store.Admit(ctx, disk)
	}
	return opened, err
}

// opened adds what the engine's description of a disk leaves out.
func (s *Service) opened(ctx context.Context, store stores.Store, v datastore.Volume, disk handover.Disk) (attach.Opened, error) {
	o := attach.Opened{Disk: disk}
	var err error
	if len(disk.Keys) > 0 {
		if o.Keys, err = store.Unlock(ctx, disk); err != nil {
			return attach.Opened{}, err
		}
	}
	l, err := csi.LimitsOf(v)
	if err != nil {
		return attach.Opened{}, fmt.Errorf("limits of %s: %w", v.ID, err)
	}
	o.Limits = limits(l)
	return o, nil
}

func limits(l csi.Limits) attach.Limits {
	return attach.Limits{
		IOPS: l.IOPS, ReadIOPS: l.ReadIOPS, WriteIOPS: l.WriteIOPS,
		Bytes: l.Bandwidth, ReadBytes: l.ReadBandwidth, WriteBytes: l.WriteBandwidth,
	}
}

// Users implements csi.Open.
func (s *Service) Users(handle string) []string {
	var out []string
	open, err := s.records.Find(handle)
	if err != nil {
		return []string{err.Error()} // whoever asks must not take it for closed
	}
	for _, r := range open {
		out = append(out, "pod "+r.Pod)
	}
	all, err := s.targets.of(handle)
	if err != nil {
		return append(out, err.Error())
	}
	for _, t := range all {
		if !t.MicroVM {
			out = append(out, t.Path)
		}
	}
	return out
}

// Live implements csi.Open. It is nil for a volume that is not published for writing.
func (s *Service) Live(handle string) datastore.Live {
	all, err := s.targets.of(handle)
	if err == nil && !slices.ContainsFunc(all, func(t target) bool { return t.Mode != datastore.ReadOnly }) {
		return nil
	}
	return &live{service: s, handle: handle}
}

// Limit implements csi.Open.
func (s *Service) Limit(ctx context.Context, handle string, l csi.Limits) error {
	open, err := s.records.Find(handle)
	if err != nil {
		return err
	}
	host, err := (&live{service: s, handle: handle}).here()
	if err != nil {
		return err
	}
	var errs []error
	if host {
		if err := s.cfg.Export.Limit(ctx, exportName(handle), limits(l)); !errors.Is(err, export.ErrNotExported) {
			errs = append(errs, err)
		}
	}
	for _, r := range open {
		err := attach.Call(ctx, r.Socket, attach.MethodLimit, attach.LimitRequest{Volume: handle, Limits: limits(l)}, nil)
		if err != nil && !errors.Is(err, attach.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// live changes a volume through whoever has it open. It finds out at the time of each call, which the engine
// makes while nobody else can open the volume: a shim that asks how to open it (open) waits in the engine and is
// then told of the change.
type live struct {
	service *Service
	handle  string
}

// Snapshot implements datastore.Live. A shim that opens the volume again asks how (open), so that there is
// nothing else to change.
func (l *live) Snapshot(ctx context.Context, overlay handover.Layer, key *handover.WrappedKey) error {
	host, unlock, err := l.begin()
	if err != nil {
		return err
	}
	defer unlock()
	r := attach.SnapshotRequest{Volume: l.handle, Overlay: overlay}
	store, id, err := l.service.cfg.Stores.Resolve(l.handle)
	if err != nil {
		return err
	}
	// For reading only: whoever has the volume open may have the overlay open too.
	r.Ceph, err = store.Admit(ctx, handover.Disk{Volume: id, Layers: []handover.Layer{overlay}, ReadOnly: true})
	if err != nil {
		return err
	}
	if key != nil {
		keys, err := store.Unlock(ctx, handover.Disk{
			Volume: id, Layers: []handover.Layer{overlay}, Keys: map[string]handover.WrappedKey{overlay.Key: *key},
		})
		if err != nil {
			return err
		}
		r.Key = keys[overlay.Key]
	}
	if host {
		return notOpen(l.service.cfg.Export.Snapshot(ctx, exportName(l.handle), overlay, r.Key))
	}
	return l.call(ctx, attach.MethodSnapshot, r)
}

// Resize implements datastore.Live.
func (l *live) Resize(ctx context.Context, bytes int64) error {
	host, unlock, err := l.begin()
	if err != nil {
		return err
	}
	defer unlock()
	if host {
		return notOpen(l.service.cfg.Export.Resize(ctx, exportName(l.handle), bytes))
	}
	return l.call(ctx, attach.MethodResize, attach.ResizeRequest{Volume: l.handle, Bytes: bytes})
}

// notOpen translates.
func notOpen(err error) error {
	if errors.Is(err, export.ErrNotExported) {
		return datastore.ErrNotOpen
	}
	return err
}

// begin keeps the volume from being opened, and tells whether it is open on this host, outside of micro-VMs. The
// engine holds its own lock, which whoever opens the volume may be waiting for: so this does not wait.
func (l *live) begin() (host bool, unlock func(), err error) {
	unlock, ok := l.service.tryLock(l.handle)
	if !ok {
		return false, nil, fmt.Errorf("%w: the volume is just being opened or closed", datastore.ErrBusy)
	}
	if host, err = l.here(); err != nil {
		unlock()
		return false, nil, err
	}
	return host, unlock, nil
}

// here tells whether the volume is open on this host, outside of micro-VMs.
func (l *live) here() (bool, error) {
	all, err := l.service.here(l.handle)
	if err != nil {
		return false, fmt.Errorf("%w: %w", datastore.ErrUnavailable, err)
	}
	return len(all) > 0 && l.service.cfg.Export != nil, nil
}

// call asks who has the volume open.
func (l *live) call(ctx context.Context, method string, params any) error {
	socket, err := l.socket()
	if err != nil {
		return err
	}
	if socket == "" {
		return datastore.ErrNotOpen
	}
	err = attach.Call(ctx, socket, method, params, nil)
	if err == nil {
		return nil
	}
	if again, findErr := l.socket(); findErr == nil && again == "" {
		return datastore.ErrNotOpen // it was closed meanwhile
	}
	if errors.Is(err, attach.ErrNotFound) {
		return fmt.Errorf("%w: the volume is just being opened or closed", datastore.ErrBusy)
	}
	if _, refused := errors.AsType[*attach.Error](err); refused {
		return err
	}
	return fmt.Errorf("%w: %w", datastore.ErrUnavailable, err)
}

// socket is that of the process that has the volume open for writing, "" for nobody.
func (l *live) socket() (string, error) {
	open, err := l.service.records.Find(l.handle)
	if err != nil {
		return "", fmt.Errorf("%w: %w", datastore.ErrUnavailable, err)
	}
	if len(open) == 0 {
		return "", nil
	}
	return open[0].Socket, nil
}
