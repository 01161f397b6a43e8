package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/shim/disks"
	"atoll.dev/atoll/internal/vm"
)

// disk is a disk or CD-ROM drive that the machine has.
type disk struct {
	spec   machinev1.Disk // as it was added; without a volume it is an empty drive
	failed string         // what went wrong with it last
	size   atomic.Int64   // in bytes

	mu     sync.Mutex       // held over each change of the volume; guards the field below
	layers []handover.Layer // lowest first
}

// open opens the volume of a disk. It is on record before. CloseVolume must follow without an error.
func (l *life) open(ctx context.Context, spec machinev1.Disk) (*disk, vm.Volume, error) {
	record := attach.Record{Volume: spec.Volume, Pod: l.s.uid(), Socket: l.s.cfg.Socket}
	if err := l.s.records.Put(record); err != nil {
		return nil, vm.Volume{}, err
	}
	d := &disk{spec: spec}
	opened, err := l.s.cfg.Agent.Open(ctx, l.request(spec, false))
	var v vm.Volume
	if err == nil {
		v, err = disks.Volume(opened, spec.ReadOnly || spec.CDROM || spec.NonPersistent || opened.Disk.ReadOnly)
		d.layers = opened.Disk.Layers
		d.size.Store(opened.Disk.Size)
	}
	if err != nil {
		disks.CloseVolume(v)
		l.forget(ctx, d)
		return nil, vm.Volume{}, err
	}
	return d, v, nil
}

// forget forgets a volume that QEMU has closed, and tells the agent.
func (l *life) forget(ctx context.Context, d *disk) {
	if d.spec.Volume == "" || l.hasVolume(d.spec.Volume) {
		return
	}
	if err := l.s.records.Remove(d.spec.Volume, l.s.uid()); err != nil {
		slog.Warn("forgetting open volume", "volume", d.spec.Volume, "error", err)
	}
	l.mu.Lock()
	l.dropped = append(l.dropped, d.spec.Volume)
	l.mu.Unlock()
	l.tellClosed(ctx)
}

// hasVolume tells whether a disk of the machine is on the volume; two CD-ROM drives may have the same.
func (l *life) hasVolume(volume string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range l.disks {
		if d.spec.Volume == volume {
			return true
		}
	}
	return false
}

// tellClosed tells the agent what was closed. An agent that is away finds out by itself when the pod is gone.
func (l *life) tellClosed(ctx context.Context) {
	l.mu.Lock()
	all := l.dropped
	l.dropped = nil
	l.mu.Unlock()
	for _, volume := range all {
		err := l.s.cfg.Agent.Close(ctx, l.request(machinev1.Disk{Volume: volume}, false))
		if err == nil || errors.Is(err, attach.ErrNotFound) {
			continue
		}
		slog.Warn("telling the agent that a volume is closed", "volume", volume, "error", err)
		l.mu.Lock()
		if !slices.Contains(l.dropped, volume) {
			l.dropped = append(l.dropped, volume)
		}
		l.mu.Unlock()
	}
}

// byVolume finds the disk that has a volume, which it may write to.
func (l *life) byVolume(volume string) *disk {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hw == nil {
		return nil
	}
	for _, d := range l.disks {
		if d.spec.Volume == volume {
			return d
		}
	}
	return nil
}

// nothing is the answer of methods that answer nothing.
type nothing struct{}

// with calls f for the disk of a volume while nothing else changes it.
func with[T any](s *Service, volume string, f func(*life, *disk) (T, error)) (T, error) {
	var none T
	s.mu.Lock()
	l := s.life
	s.mu.Unlock()
	var d *disk
	if l != nil {
		d = l.byVolume(volume)
	}
	if d == nil {
		return none, fmt.Errorf("%s: %w", volume, attach.ErrNotFound)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return f(l, d)
}

func (s *Service) volumeStatus(_ context.Context, r attach.VolumeRequest) (attach.Status, error) {
	return with(s, r.Volume, func(_ *life, d *disk) (attach.Status, error) {
		st := attach.Status{Size: d.size.Load()}
		for _, layer := range d.layers {
			st.Layers = append(st.Layers, layer.ID)
		}
		return st, nil
	})
}

// volumeStats knows the size only: what is on the disk is the guest's.
func (s *Service) volumeStats(_ context.Context, r attach.VolumeRequest) (attach.Stats, error) {
	return with(s, r.Volume, func(l *life, d *disk) (attach.Stats, error) {
		return attach.Stats{Capacity: d.size.Load(), Stalled: l.hardware().Stalled()}, nil
	})
}

// snapshotVolume puts a layer on top, unless it is there already. The guest's file systems are frozen meanwhile if
// its agent answers; in an operation on the whole machine that was done before.
func (s *Service) snapshotVolume(ctx context.Context, r attach.SnapshotRequest) (nothing, error) {
	return with(s, r.Volume, func(l *life, d *disk) (nothing, error) {
		top := d.layers[len(d.layers)-1]
		if top.ID == r.Overlay.ID {
			return nothing{}, nil
		}
		frozen, overlay, err := disks.Overlay(top, r)
		if err != nil {
			return nothing{}, err
		}
		defer disks.CloseLayer(frozen)
		defer disks.CloseLayer(overlay)
		defer l.freeze(ctx)()
		if err := l.hardware().SnapshotDisk(ctx, d.spec.Name, frozen, overlay); err != nil {
			return nothing{}, err
		}
		d.layers = append(slices.Clip(d.layers), r.Overlay)
		return nothing{}, nil
	})
}

// freeze has the guest write everything out and hold still, if its agent answers and nobody else has it do so, until the
// function it returns is called.
func (l *life) freeze(ctx context.Context) (thaw func()) {
	l.mu.Lock()
	busy, files := l.busy, l.files
	l.mu.Unlock()
	if st := l.s.board.Get(); busy || st.Guest == nil || !st.Guest.Agent || st.Phase != machinev1.Running {
		return func() {}
	}
	return files.TryFreeze(ctx)
}

// resizeVolume makes the disk larger.
func (s *Service) resizeVolume(ctx context.Context, r attach.ResizeRequest) (nothing, error) {
	return with(s, r.Volume, func(l *life, d *disk) (nothing, error) {
		switch size := d.size.Load(); {
		case r.Bytes == size:
			return nothing{}, nil
		case r.Bytes < size:
			return nothing{}, fmt.Errorf("the volume has %d bytes and cannot shrink to %d", size, r.Bytes)
		}
		if err := l.hardware().ResizeDisk(ctx, d.spec.Name, r.Bytes); err != nil {
			return nothing{}, err
		}
		d.size.Store(r.Bytes)
		s.running.Go(l.report)
		return nothing{}, nil
	})
}

// growVolume has nothing to do: the guest grows its file systems itself.
func (s *Service) growVolume(_ context.Context, r attach.ResizeRequest) (nothing, error) {
	return with(s, r.Volume, func(*life, *disk) (nothing, error) { return nothing{}, nil })
}

func (s *Service) limitVolume(ctx context.Context, r attach.LimitRequest) (nothing, error) {
	return with(s, r.Volume, func(l *life, d *disk) (nothing, error) {
		return nothing{}, l.hardware().LimitDisk(ctx, d.spec.Name, disks.Limits(r.Limits))
	})
}
