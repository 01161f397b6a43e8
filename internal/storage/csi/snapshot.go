package csi

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

// CreateSnapshot implements csi.ControllerServer.
func (c *controller) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	switch {
	case req.GetSourceVolumeId() == "":
		return nil, invalid("the source volume id is missing")
	case req.GetName() == "":
		return nil, invalid("the name is missing")
	}
	for name := range req.GetParameters() {
		if !strings.HasPrefix(name, metadataPrefix) {
			return nil, invalid("parameter %q: a VolumeSnapshotClass of this driver has no parameters; remove it", name)
		}
	}
	store, volume, err := c.cfg.Stores.Resolve(req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	id := engineID("s", req.GetName())
	// The name may be that of a snapshot on another datastore.
	for _, other := range c.cfg.Stores.All() {
		if other.Name == store.Name {
			continue
		}
		if _, err := other.SnapshotByID(ctx, id); err == nil {
			return nil, status.Errorf(codes.AlreadyExists, "a snapshot of this name exists on datastore %q", other.Name)
		}
	}
	snap, err := do(ctx, c.calls, volume, func(ctx context.Context) (datastore.Snapshot, error) {
		return store.Snapshot(ctx, id, volume, c.cfg.Open.Live(req.GetSourceVolumeId()))
	})
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: snapshotOf(store, snap)}, nil
}

func snapshotOf(store stores.Store, s datastore.Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId: stores.Handle(store.Name, s.ID), SourceVolumeId: stores.Handle(store.Name, s.Volume),
		SizeBytes: s.Size, CreationTime: timestamppb.New(s.Created.Truncate(time.Microsecond)), ReadyToUse: true,
	}
}

// DeleteSnapshot implements csi.ControllerServer.
func (c *controller) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, invalid("the snapshot id is missing")
	}
	store, id, err := c.cfg.Stores.Resolve(req.GetSnapshotId())
	if errors.Is(err, stores.ErrHandle) {
		return &csi.DeleteSnapshotResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return do(ctx, c.calls, id, func(ctx context.Context) (*csi.DeleteSnapshotResponse, error) {
		err := store.DeleteSnapshot(ctx, id)
		if errors.Is(err, datastore.ErrInvalid) {
			err = nil
		}
		return &csi.DeleteSnapshotResponse{}, err
	})
}

// ListVolumes implements csi.ControllerServer.
func (c *controller) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	var all []*csi.ListVolumesResponse_Entry
	for _, s := range c.cfg.Stores.All() {
		contents, err := s.List(ctx)
		if err != nil {
			return nil, err
		}
		for _, v := range contents.Volumes {
			all = append(all, &csi.ListVolumesResponse_Entry{Volume: &csi.Volume{VolumeId: stores.Handle(s.Name, v.ID), CapacityBytes: v.Size}})
		}
	}
	part, next, err := page(all, func(e *csi.ListVolumesResponse_Entry) string { return e.GetVolume().GetVolumeId() }, req.GetStartingToken(), req.GetMaxEntries())
	return &csi.ListVolumesResponse{Entries: part, NextToken: next}, err
}

// ListSnapshots implements csi.ControllerServer.
func (c *controller) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	var all []*csi.ListSnapshotsResponse_Entry
	for _, s := range c.cfg.Stores.All() {
		if elsewhere(req.GetSnapshotId(), s.Name) || elsewhere(req.GetSourceVolumeId(), s.Name) {
			continue
		}
		contents, err := s.List(ctx)
		if err != nil {
			return nil, err
		}
		for _, snap := range contents.Snapshots {
			e := snapshotOf(s, snap)
			if (req.GetSnapshotId() == "" || req.GetSnapshotId() == e.GetSnapshotId()) &&
				(req.GetSourceVolumeId() == "" || req.GetSourceVolumeId() == e.GetSourceVolumeId()) {
				all = append(all, &csi.ListSnapshotsResponse_Entry{Snapshot: e})
			}
		}
	}
	part, next, err := page(all, func(e *csi.ListSnapshotsResponse_Entry) string { return e.GetSnapshot().GetSnapshotId() }, req.GetStartingToken(), req.GetMaxEntries())
	return &csi.ListSnapshotsResponse{Entries: part, NextToken: next}, err
}

// elsewhere tells whether a handle names something on another datastore.
func elsewhere(handle, store string) bool {
	return handle != "" && !strings.HasPrefix(handle, store+"/")
}

// page cuts a list at the token, which is the handle of the first entry wanted, and at most entries.
func page[T any](all []T, handle func(T) string, token string, most int32) (part []T, next string, err error) {
	if token != "" {
		if _, _, err := stores.Split(token); err != nil {
			return nil, "", status.Errorf(codes.Aborted, "the starting token %q is not one of this driver", token)
		}
	}
	slices.SortFunc(all, func(a, b T) int { return strings.Compare(handle(a), handle(b)) })
	from, _ := slices.BinarySearchFunc(all, token, func(e T, token string) int { return strings.Compare(handle(e), token) })
	part = all[from:]
	if most > 0 && len(part) > int(most) {
		return part[:most], handle(part[most]), nil
	}
	return part, "", nil
}
