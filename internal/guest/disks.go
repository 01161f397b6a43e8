package guest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/volume"
	"atoll.dev/atoll/internal/linux/filesystem"
)

// Bounds of what is done with the disks of persistent volumes.
const (
	growTimeout  = time.Minute // for a disk to show that it has grown
	maxFormatMiB = 256         // of a new file system's first content
)

// formats are the disks that a file system is being written on, by serial.
type formats struct {
	mu   sync.Mutex // held over a write; guards the field below
	open map[string]*formatting
}

type formatting struct {
	*filesystem.Formatter

	written int
}

// ProbeDisk implements the protocol.
func (s *server) ProbeDisk(ctx context.Context, req *guestv1.ProbeDiskRequest) (*guestv1.ProbeDiskResponse, error) {
	device, err := s.m.disks.Find(ctx, req.GetSerial())
	if err != nil {
		return nil, status(err)
	}
	c, err := filesystem.Probe(device)
	if err != nil {
		return nil, status(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return nil, status(fmt.Errorf("reading numbers of %s: %w", device, err))
	}
	return &guestv1.ProbeDiskResponse{
		Blank: c.Blank, FsType: c.FSType, Bytes: uint64(c.Bytes), Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev),
	}, nil
}

// WriteDisk implements the protocol.
func (s *server) WriteDisk(ctx context.Context, req *guestv1.WriteDiskRequest) (*guestv1.Empty, error) {
	return &guestv1.Empty{}, status(s.writeDisk(ctx, req))
}

func (s *server) writeDisk(ctx context.Context, req *guestv1.WriteDiskRequest) (err error) {
	s.formats.mu.Lock()
	defer s.formats.mu.Unlock()
	if s.formats.open == nil {
		s.formats.open = map[string]*formatting{}
	}
	f := s.formats.open[req.GetSerial()]
	defer func() {
		if f != nil && (err != nil || req.GetLast()) {
			_ = f.Close()
			delete(s.formats.open, req.GetSerial())
		}
	}()
	if req.GetFirst() {
		if f != nil {
			// The host has given up on that attempt, perhaps with the disk that it was for.
			_ = f.Close()
			delete(s.formats.open, req.GetSerial())
			f = nil
		}
		device, err := s.m.disks.Find(ctx, req.GetSerial())
		if err != nil {
			return err
		}
		w, err := filesystem.StartFormat(device)
		if err != nil {
			return err
		}
		f = &formatting{Formatter: w}
		s.formats.open[req.GetSerial()] = f
	}
	if f == nil {
		return fmt.Errorf("disk %s is not being formatted: %w", req.GetSerial(), errInvalid)
	}
	for _, e := range req.GetExtents() {
		if f.written += len(e.GetData()); f.written > maxFormatMiB<<20 {
			return fmt.Errorf("file system of more than %d MiB: %w", maxFormatMiB, errInvalid)
		}
		if err := f.Write(e.GetOffset(), e.GetData()); err != nil {
			return err
		}
	}
	if req.GetLast() {
		return f.Finish()
	}
	return nil
}

// createDisk makes a volume of a disk.
func (s *server) createDisk(ctx context.Context, p *pod, req *guestv1.CreateVolumeRequest) error {
	d := req.GetDisk()
	device, err := s.m.disks.Find(ctx, d.GetSerial())
	if err != nil {
		return err
	}
	if req.GetKind() == guestv1.CreateVolumeRequest_BLOCK {
		return p.volumes.CreateDisk(req.GetId(), volume.Disk{Device: device}, nil)
	}
	return p.volumes.CreateDisk(req.GetId(), volume.Disk{Device: device, FSType: d.GetFsType()}, func(dir string) error {
		o := filesystem.Options{FSType: d.GetFsType(), Options: d.GetOptions(), ReadOnly: d.GetReadOnly()}
		if err := filesystem.Mount(device, dir, o); err != nil {
			return err
		}
		if !d.GetSetGroup() || d.GetReadOnly() {
			return nil
		}
		if err := filesystem.SetGroup(ctx, dir, d.GetGroup()); err != nil {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
			return err
		}
		return nil
	})
}

// GrowVolume implements the protocol.
func (s *server) GrowVolume(ctx context.Context, req *guestv1.GrowVolumeRequest) (*guestv1.GrowVolumeResponse, error) {
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	v, err := p.volumes.Get(req.GetId())
	if err != nil {
		return nil, status(err)
	}
	if v.Disk.Device == "" {
		return nil, status(fmt.Errorf("volume %s has no disk: %w", v.ID, errInvalid))
	}
	wctx, cancel := context.WithTimeout(ctx, growTimeout)
	defer cancel()
	if err := filesystem.WaitSize(wctx, v.Disk.Device, int64(min(req.GetBytes(), 1<<62))); err != nil {
		return nil, status(err)
	}
	if v.Kind == volume.Block {
		return &guestv1.GrowVolumeResponse{Bytes: req.GetBytes()}, nil
	}
	n, err := filesystem.Grow(v.Disk.Device, v.Root, v.Disk.FSType)
	return &guestv1.GrowVolumeResponse{Bytes: uint64(n)}, status(err)
}

// StatVolume implements the protocol.
func (s *server) StatVolume(_ context.Context, req *guestv1.StatVolumeRequest) (*guestv1.VolumeUsage, error) {
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	v, err := p.volumes.Get(req.GetId())
	if err != nil {
		return nil, status(err)
	}
	if v.Kind != volume.OnDisk {
		u, err := v.Usage()
		return &guestv1.VolumeUsage{Id: v.ID, UsedBytes: u.Bytes, UsedInodes: u.Inodes}, status(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(v.Root, &st); err != nil {
		return nil, status(fmt.Errorf("measuring volume %s: %w", v.ID, err))
	}
	block := uint64(st.Bsize)
	return &guestv1.VolumeUsage{
		Id: v.ID, UsedBytes: (st.Blocks - st.Bfree) * block, UsedInodes: st.Files - st.Ffree,
		CapacityBytes: st.Blocks * block, AvailableBytes: st.Bavail * block, Inodes: st.Files, AvailableInodes: st.Ffree,
	}, nil
}

// ReleaseVolumes implements the protocol.
func (s *server) ReleaseVolumes(ctx context.Context, req *guestv1.ReleaseVolumesRequest) (*guestv1.Empty, error) {
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	// One that fails or takes its time is no reason not to write out the others.
	ids := req.GetIds()
	errs := make([]error, len(ids)+1)
	if req.GetKill() {
		errs[len(ids)] = s.m.tree.Pod().Kill()
	}
	var wg sync.WaitGroup
	for i, id := range ids {
		wg.Go(func() { errs[i] = p.volumes.ReleaseDisk(ctx, id) })
	}
	wg.Wait()
	return &guestv1.Empty{}, status(errors.Join(errs...))
}
