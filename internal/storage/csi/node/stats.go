package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/linux/filesystem"
	"atoll.dev/atoll/internal/linux/loop"
	"atoll.dev/atoll/internal/storage/csi"
)

// published finds what is published of a volume at a path.
func (s *Service) published(volume, path string) (target, error) {
	switch {
	case volume == "":
		return target{}, invalid("the volume id is missing")
	case path == "":
		return target{}, invalid("the volume path is missing")
	}
	t, ok, err := s.targets.get(filepath.Clean(path))
	if err != nil {
		return target{}, err
	}
	if !ok || t.Volume != volume {
		return target{}, status.Errorf(codes.NotFound, "volume %s is not published at %s", volume, path)
	}
	return t, nil
}

// socket is that of the shim of a target's pod, "" while it does not have the volume open.
func (s *Service) socket(t target) (string, error) {
	open, err := s.records.Find(t.Volume)
	if err != nil {
		return "", err
	}
	for _, r := range open {
		if r.Pod == t.Pod {
			return r.Socket, nil
		}
	}
	return "", nil
}

// NodeGetVolumeStats implements csi.NodeServer.
func (s *Service) NodeGetVolumeStats(ctx context.Context, req *csispec.NodeGetVolumeStatsRequest) (*csispec.NodeGetVolumeStatsResponse, error) {
	t, err := s.published(req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, csi.Status(err)
	}
	st, err := s.stats(ctx, t)
	if err != nil {
		return nil, csi.Status(err)
	}
	resp := &csispec.NodeGetVolumeStatsResponse{
		Usage: []*csispec.VolumeUsage{{
			Unit: csispec.VolumeUsage_BYTES, Total: st.Capacity, Available: st.Available, Used: st.Bytes,
		}},
		VolumeCondition: &csispec.VolumeCondition{Message: "the volume is open"},
	}
	if !t.Block {
		resp.Usage = append(resp.Usage, &csispec.VolumeUsage{
			Unit: csispec.VolumeUsage_INODES, Total: st.Inodes, Available: st.InodesAvailable, Used: st.InodesUsed,
		})
	}
	if st.Stalled {
		resp.VolumeCondition = &csispec.VolumeCondition{
			Abnormal: true, Message: "the datastore is full: the pod stands still until there is room",
		}
	}
	return resp, nil
}

func (s *Service) stats(ctx context.Context, t target) (attach.Stats, error) {
	if !t.MicroVM {
		return statsHere(t)
	}
	socket, err := s.socket(t)
	if err != nil {
		return attach.Stats{}, err
	}
	if socket == "" {
		return attach.Stats{}, status.Errorf(codes.Unavailable, "the pod has not opened the volume yet")
	}
	var st attach.Stats
	if err := attach.Call(ctx, socket, attach.MethodStats, attach.VolumeRequest{Volume: t.Volume}, &st); err != nil {
		return attach.Stats{}, status.Errorf(codes.Unavailable, "asking the pod's shim: %v", err)
	}
	return st, nil
}

// statsHere measures a volume that is mounted, or is a device, on this host.
func statsHere(t target) (attach.Stats, error) {
	if t.Block {
		f, err := os.Open(t.Path)
		if err != nil {
			return attach.Stats{}, fmt.Errorf("measuring volume: %w", err)
		}
		defer f.Close()
		n, err := f.Seek(0, 2)
		if err != nil {
			return attach.Stats{}, fmt.Errorf("measuring volume: %w", err)
		}
		return attach.Stats{Capacity: n}, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(t.Path, &st); err != nil {
		return attach.Stats{}, fmt.Errorf("measuring volume: %w", err)
	}
	block := st.Bsize
	return attach.Stats{
		Bytes: int64(st.Blocks-st.Bfree) * block, Capacity: int64(st.Blocks) * block, Available: int64(st.Bavail) * block,
		Inodes: int64(st.Files), InodesUsed: int64(st.Files - st.Ffree), InodesAvailable: int64(st.Ffree),
	}, nil
}

// NodeExpandVolume implements csi.NodeServer. The disk is larger already (ControllerExpandVolume), this is about
// the file system on it.
func (s *Service) NodeExpandVolume(ctx context.Context, req *csispec.NodeExpandVolumeRequest) (*csispec.NodeExpandVolumeResponse, error) {
	t, err := s.published(req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, csi.Status(err)
	}
	_, v, err := s.cfg.Stores.Volume(ctx, t.Volume)
	if err != nil {
		return nil, csi.Status(err)
	}
	if limit := req.GetCapacityRange().GetLimitBytes(); limit > 0 && v.Size > limit {
		return nil, status.Errorf(codes.OutOfRange, "the volume has %d bytes, more than the limit of %d", v.Size, limit)
	}
	if want := req.GetCapacityRange().GetRequiredBytes(); want > v.Size {
		return nil, status.Errorf(codes.OutOfRange, "the volume has %d bytes, not %d; it was not expanded yet", v.Size, want)
	}
	if err := s.expand(ctx, t, v.Size); err != nil {
		return nil, csi.Status(err)
	}
	return &csispec.NodeExpandVolumeResponse{CapacityBytes: v.Size}, nil
}

func (s *Service) expand(ctx context.Context, t target, bytes int64) error {
	if t.MicroVM {
		socket, err := s.socket(t)
		if err != nil || socket == "" { // it grows when it is mounted
			return err
		}
		return attach.Call(ctx, socket, attach.MethodGrow, attach.ResizeRequest{Volume: t.Volume, Bytes: bytes}, nil)
	}
	defer s.lock(t.Volume)()
	if err := loop.Resize(t.Loop); err != nil {
		return err
	}
	if t.Block {
		return nil
	}
	_, err := filesystem.Grow(t.Loop, s.shared(t.Volume), t.FSType)
	return err
}
