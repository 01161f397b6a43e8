package disks

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
)

// nothing is the answer of methods that answer nothing.
type nothing struct{}

// serve begins to answer the agent, once. Callers hold attaching.
func (s *Set) serve() error {
	if s.serving {
		return nil
	}
	l, err := attach.Listen(s.cfg.Socket)
	if err != nil {
		return err
	}
	s.serving = true
	methods := map[string]attach.Handler{
		attach.MethodStats:    attach.Handle(s.stats),
		attach.MethodStatus:   attach.Handle(s.status),
		attach.MethodSnapshot: attach.Handle(s.snapshot),
		attach.MethodResize:   attach.Handle(s.resize),
		attach.MethodGrow:     attach.Handle(s.grow),
		attach.MethodLimit:    attach.Handle(s.limit),
	}
	go func() { // ends with Release
		if err := attach.Serve(s.life, l, methods); err != nil && s.life.Err() == nil {
			slog.Error("serving volumes", "error", err)
		}
	}()
	return nil
}

// with calls f for a volume while nothing else changes it. A volume that is just being closed is not known.
func with[T any](s *Set, volume string, f func(*disk) (T, error)) (T, error) {
	var none T
	d := s.byVolume(volume)
	if d == nil {
		return none, fmt.Errorf("%s: %w", volume, attach.ErrNotFound)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.life.Err() != nil {
		return none, fmt.Errorf("%s is being closed: %w", volume, attach.ErrNotFound)
	}
	return f(d)
}

// byVolume finds an attached volume, or nil. One that could not be attached is not known, but its record stays:
// the agent learns that it is busy.
func (s *Set) byVolume(volume string) *disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Err() != nil {
		return nil
	}
	for _, d := range s.disks {
		if d.volume.ID == volume && !d.broken {
			return d
		}
	}
	return nil
}

func (s *Set) status(_ context.Context, r attach.VolumeRequest) (attach.Status, error) {
	return with(s, r.Volume, func(d *disk) (attach.Status, error) {
		st := attach.Status{Size: d.size}
		for _, l := range d.layers {
			st.Layers = append(st.Layers, l.ID)
		}
		return st, nil
	})
}

// stats asks the guest, whose numbers are only its own.
func (s *Set) stats(ctx context.Context, r attach.VolumeRequest) (attach.Stats, error) {
	st := attach.Stats{Stalled: s.machine.Stalled()}
	d, err := with(s, r.Volume, func(d *disk) (*disk, error) {
		st.Capacity = d.size
		return d, nil
	})
	if err != nil {
		return attach.Stats{}, err
	}
	if d.volume.Block != nil || st.Stalled { // the guest of a machine that stands still does not answer
		return st, nil
	}
	ctx, cancel := context.WithTimeout(ctx, statTimeout)
	defer cancel()
	u, err := s.guest.StatVolume(ctx, &guestv1.StatVolumeRequest{Id: d.id})
	if err != nil && s.machine.Stalled() { // by now
		st.Stalled = true
		return st, nil
	}
	if err != nil {
		return attach.Stats{}, fmt.Errorf("measuring volume in the guest: %w", err)
	}
	st.Bytes, st.Capacity = handover.Limit(u.GetUsedBytes()), handover.Limit(u.GetCapacityBytes())
	st.Available, st.Inodes = handover.Limit(u.GetAvailableBytes()), handover.Limit(u.GetInodes())
	st.InodesUsed, st.InodesAvailable = handover.Limit(u.GetUsedInodes()), handover.Limit(u.GetAvailableInodes())
	return st, nil
}

// snapshot puts a layer on top, unless it is there already.
func (s *Set) snapshot(ctx context.Context, r attach.SnapshotRequest) (nothing, error) {
	return with(s, r.Volume, func(d *disk) (nothing, error) {
		top := d.layers[len(d.layers)-1]
		if top.ID == r.Overlay.ID {
			return nothing{}, nil
		}
		frozen, overlay, err := Overlay(top, r)
		if err != nil {
			return nothing{}, err
		}
		defer CloseLayer(frozen)
		defer CloseLayer(overlay)
		if err := s.machine.SnapshotVolume(ctx, d.serial, frozen, overlay); err != nil {
			return nothing{}, err
		}
		d.layers = append(slices.Clip(d.layers), r.Overlay)
		return nothing{}, nil
	})
}

// resize makes the disk larger; what it has on it stays as it is until grow.
func (s *Set) resize(ctx context.Context, r attach.ResizeRequest) (nothing, error) {
	return with(s, r.Volume, func(d *disk) (nothing, error) {
		switch {
		case r.Bytes == d.size:
			return nothing{}, nil
		case r.Bytes < d.size:
			return nothing{}, fmt.Errorf("the volume has %d bytes and cannot shrink to %d", d.size, r.Bytes)
		}
		if err := s.machine.ResizeVolume(ctx, d.serial, r.Bytes); err != nil {
			return nothing{}, err
		}
		d.size = r.Bytes
		return nothing{}, nil
	})
}

// grow makes the file system as large as the disk.
func (s *Set) grow(ctx context.Context, r attach.ResizeRequest) (nothing, error) {
	var bytes int64
	d, err := with(s, r.Volume, func(d *disk) (*disk, error) {
		if bytes = d.size; r.Bytes > bytes {
			return nil, fmt.Errorf("the disk has only %d bytes", bytes)
		}
		return d, nil
	})
	if err != nil {
		return nothing{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	if _, err := s.guest.GrowVolume(ctx, &guestv1.GrowVolumeRequest{Id: d.id, Bytes: uint64(bytes)}); err != nil {
		return nothing{}, fmt.Errorf("growing the file system in the guest: %w", err)
	}
	return nothing{}, nil
}

func (s *Set) limit(ctx context.Context, r attach.LimitRequest) (nothing, error) {
	return with(s, r.Volume, func(d *disk) (nothing, error) {
		return nothing{}, s.machine.LimitVolume(ctx, d.serial, Limits(r.Limits))
	})
}
