package guest

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/container"
	"atoll.dev/atoll/internal/guest/volume"
)

// MountImage implements the protocol.
func (s *server) MountImage(ctx context.Context, req *guestv1.MountImageRequest) (*guestv1.Empty, error) {
	if err := checkID(req.GetId()); err != nil {
		return nil, err
	}
	err := s.m.disks.MountImage(ctx, req.GetId(), req.GetSerial(), req.GetFsType())
	return &guestv1.Empty{}, status(err)
}

// UnmountImage implements the protocol.
func (s *server) UnmountImage(ctx context.Context, req *guestv1.UnmountImageRequest) (*guestv1.Empty, error) {
	if err := checkID(req.GetId()); err != nil {
		return nil, err
	}
	return &guestv1.Empty{}, status(s.m.disks.UnmountImage(ctx, req.GetId()))
}

// CreateVolume implements the protocol.
func (s *server) CreateVolume(ctx context.Context, req *guestv1.CreateVolumeRequest) (*guestv1.Empty, error) {
	if err := checkID(req.GetId()); err != nil {
		return nil, err
	}
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	if k := req.GetKind(); k == guestv1.CreateVolumeRequest_DISK || k == guestv1.CreateVolumeRequest_BLOCK {
		return &guestv1.Empty{}, status(s.createDisk(ctx, p, req))
	}
	kinds := map[guestv1.CreateVolumeRequest_Kind]volume.Kind{
		guestv1.CreateVolumeRequest_SCRATCH: volume.Scratch, guestv1.CreateVolumeRequest_MEMORY: volume.Memory,
		guestv1.CreateVolumeRequest_PUSHED: volume.Pushed, guestv1.CreateVolumeRequest_IMAGE: volume.Image,
	}
	kind, ok := kinds[req.GetKind()]
	if !ok {
		return nil, status(fmt.Errorf("volume kind %d: %w", req.GetKind(), errInvalid))
	}
	err = p.volumes.Create(req.GetId(), kind, req.GetSizeBytes(), req.GetMode(), req.GetUid(), req.GetGid())
	return &guestv1.Empty{}, status(err)
}

// PutFiles implements the protocol.
func (s *server) PutFiles(_ context.Context, req *guestv1.PutFilesRequest) (*guestv1.Empty, error) {
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	files := make([]volume.File, len(req.GetFiles()))
	for i, f := range req.GetFiles() {
		files[i] = volume.File{
			Path: f.GetPath(), Mode: f.GetMode(), UID: f.GetUid(), GID: f.GetGid(),
			Data: f.GetData(), Target: f.GetTarget(), Append: f.GetAppend(),
		}
	}
	return &guestv1.Empty{}, status(p.volumes.Put(req.GetVolume(), files, req.GetReplace(), req.GetCommit()))
}

// maxTail bounds GetFile; a termination message has at most 4 KiB.
const maxTail = 1 << 20

// GetFile implements the protocol.
func (s *server) GetFile(_ context.Context, req *guestv1.GetFileRequest) (*guestv1.GetFileResponse, error) {
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	data, err := p.volumes.Tail(req.GetVolume(), req.GetPath(), int64(min(req.GetMaxBytes(), maxTail)))
	return &guestv1.GetFileResponse{Data: data}, status(err)
}

// CreateContainer implements the protocol.
func (s *server) CreateContainer(_ context.Context, req *guestv1.CreateContainerRequest) (*guestv1.CreateContainerResponse, error) {
	if err := checkID(req.GetId()); err != nil {
		return nil, err
	}
	p, err := s.thePod()
	if err != nil {
		return nil, err
	}
	create := container.Create{
		ID: req.GetId(), Spec: req.GetSpec(), Lowers: req.GetLowers(), Terminal: req.GetTerminal(),
		Stdin: req.GetStdin(), Seccomp: req.GetSeccomp(), SeccompFlags: req.GetSeccompFlags(),
	}
	for _, v := range req.GetImageVolumes() {
		create.ImageVolumes = append(create.ImageVolumes, container.ImageVolume{Volume: v.GetVolume(), Path: v.GetImagePath()})
	}
	return &guestv1.CreateContainerResponse{}, status(p.containers.Create(create))
}

// Start implements the protocol.
func (s *server) Start(_ context.Context, req *guestv1.ProcessRequest) (*guestv1.StartResponse, error) {
	c, err := s.theContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	pid, err := c.Start(req.GetExecId())
	return &guestv1.StartResponse{Pid: uint32(pid)}, status(err)
}

// CreateExec implements the protocol.
func (s *server) CreateExec(_ context.Context, req *guestv1.CreateExecRequest) (*guestv1.Empty, error) {
	if err := checkID(req.GetExecId()); err != nil {
		return nil, err
	}
	c, err := s.theContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &guestv1.Empty{}, status(c.CreateExec(container.Exec{
		ID: req.GetExecId(), Process: req.GetProcess(), Terminal: req.GetTerminal(), Stdin: req.GetStdin(),
		Seccomp: req.GetSeccomp(), SeccompFlags: req.GetSeccompFlags(),
	}))
}

// Wait implements the protocol.
func (s *server) Wait(ctx context.Context, req *guestv1.ProcessRequest) (*guestv1.WaitResponse, error) {
	c, err := s.theContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	state, err := c.Wait(ctx, req.GetExecId())
	if err != nil {
		return nil, status(err)
	}
	return waitResponse(state), nil
}

func waitResponse(state container.State) *guestv1.WaitResponse {
	r := &guestv1.WaitResponse{Status: uint32(state.Status), OomKilled: state.OOMKilled}
	if !state.ExitedAt.IsZero() {
		r.ExitedUnixNanos = state.ExitedAt.UnixNano()
	}
	return r
}

// Kill implements the protocol.
func (s *server) Kill(_ context.Context, req *guestv1.KillRequest) (*guestv1.Empty, error) {
	c, err := s.theContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &guestv1.Empty{}, status(c.Kill(req.GetExecId(), unix.Signal(req.GetSignal()), req.GetAll()))
}

// Delete implements the protocol.
func (s *server) Delete(ctx context.Context, req *guestv1.ProcessRequest) (*guestv1.WaitResponse, error) {
	c, err := s.theContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	state, err := c.Delete(ctx, req.GetExecId())
	if err != nil {
		return nil, status(err)
	}
	return waitResponse(state), nil
}

// ResizePty implements the protocol.
func (s *server) ResizePty(_ context.Context, req *guestv1.ResizePtyRequest) (*guestv1.Empty, error) {
	c, err := s.theContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &guestv1.Empty{}, status(c.Resize(req.GetExecId(), uint16(req.GetWidth()), uint16(req.GetHeight())))
}

// Update implements the protocol.
func (s *server) Update(_ context.Context, req *guestv1.UpdateRequest) (*guestv1.Empty, error) {
	c, err := s.theContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &guestv1.Empty{}, status(c.Update(req.GetResources()))
}

// Pids implements the protocol.
func (s *server) Pids(_ context.Context, req *guestv1.ProcessRequest) (*guestv1.PidsResponse, error) {
	c, err := s.theContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	pids, err := c.Pids()
	resp := &guestv1.PidsResponse{Pids: make([]uint32, len(pids))}
	for i, p := range pids {
		resp.Pids[i] = uint32(p)
	}
	return resp, status(err)
}

// NextEvent implements the protocol.
func (s *server) NextEvent(ctx context.Context, _ *guestv1.Empty) (*guestv1.Event, error) {
	e, err := s.m.watch.Next(ctx)
	if err != nil {
		return nil, status(err)
	}
	kind := guestv1.Event_OOM
	if e.Kind == container.EventLowMemory {
		kind = guestv1.Event_LOW_MEMORY
	}
	return &guestv1.Event{Kind: kind, ContainerId: e.Container}, nil
}
