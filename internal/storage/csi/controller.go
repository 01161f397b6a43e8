package csi

import (
	"context"
	"errors"
	"maps"
	"math"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

// controller is the Controller service. Its methods are those of csi.ControllerServer; the specification
// says what they must do.
type controller struct {
	csi.UnimplementedControllerServer
	cfg   Config
	calls *calls
}

// ControllerGetCapabilities implements csi.ControllerServer.
func (c *controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	var out []*csi.ControllerServiceCapability
	for _, t := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_READONLY,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
	} {
		out = append(out, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}},
		})
	}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: out}, nil
}

// DeleteVolume implements csi.ControllerServer. A text that is no handle names no volume, so it is gone.
func (c *controller) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("the volume id is missing")
	}
	store, id, err := c.cfg.Stores.Resolve(req.GetVolumeId())
	if errors.Is(err, stores.ErrHandle) {
		return &csi.DeleteVolumeResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return do(ctx, c.calls, id, func(ctx context.Context) (*csi.DeleteVolumeResponse, error) {
		err := store.Delete(ctx, id)
		if errors.Is(err, datastore.ErrInvalid) { // an id that no volume can have
			err = nil
		}
		return &csi.DeleteVolumeResponse{}, err
	})
}

// volume reads the record of a volume that must exist.
func (c *controller) volume(ctx context.Context, handle string) (stores.Store, datastore.Volume, error) {
	if handle == "" {
		return stores.Store{}, datastore.Volume{}, invalid("the volume id is missing")
	}
	s, v, err := c.cfg.Stores.Volume(ctx, handle)
	if errors.Is(err, datastore.ErrInvalid) {
		err = status.Errorf(codes.NotFound, "there is no volume %q", handle)
	}
	return s, v, err
}

// ControllerPublishVolume implements csi.ControllerServer. It checks only; see the package documentation.
func (c *controller) ControllerPublishVolume(ctx context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	switch {
	case req.GetVolumeId() == "":
		return nil, invalid("the volume id is missing")
	case req.GetNodeId() == "":
		return nil, invalid("the node id is missing")
	case req.GetVolumeCapability() == nil:
		return nil, invalid("the volume capability is missing")
	}
	if err := checkCapability(req.GetVolumeCapability()); err != nil {
		return nil, err
	}
	store, v, err := c.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if req.GetNodeId() != c.cfg.Node {
		return nil, status.Errorf(codes.NotFound, "node %q is not served here, but by the agent of that host", req.GetNodeId())
	}
	mode := Mode(req.GetVolumeCapability(), req.GetReadonly())
	if mode == datastore.ReadWriteMany && !store.Shared {
		return nil, invalid("datastore %q is not shared, so that access mode ReadWriteMany is not possible", store.Name)
	}
	for _, a := range v.Attachments {
		here := len(heldBy(datastore.Volume{Attachments: []datastore.Attachment{a}}, c.cfg.Node)) > 0
		if !here && (a.Mode == datastore.ReadWrite || mode == datastore.ReadWrite) {
			return nil, status.Errorf(codes.FailedPrecondition, "the volume is in use by %s since %s", a.Holder, a.Since.Format("2006-01-02 15:04:05"))
		}
	}
	return do(ctx, c.calls, v.ID, func(ctx context.Context) (*csi.ControllerPublishVolumeResponse, error) {
		return &csi.ControllerPublishVolumeResponse{}, c.notePublished(ctx, store, v.ID, mode)
	})
}

// publishedLabel precedes the label of a volume that says how it is published to a node.
const publishedLabel = "published/"

// notePublished remembers how a volume is published to this node.
func (c *controller) notePublished(ctx context.Context, store stores.Store, id string, mode datastore.Mode) error {
	v, err := store.Volume(ctx, id)
	if err != nil {
		return err
	}
	switch was := v.Labels[publishedLabel+c.cfg.Node]; was {
	case string(mode):
		return nil
	case "":
	default:
		return status.Errorf(codes.AlreadyExists, "the volume is published to node %q as %q already, and cannot be %q as well", c.cfg.Node, was, mode)
	}
	labels := maps.Clone(v.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[publishedLabel+c.cfg.Node] = string(mode)
	return store.SetLabels(ctx, id, labels)
}

// ControllerUnpublishVolume implements csi.ControllerServer.
func (c *controller) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	store, v, err := c.volume(ctx, req.GetVolumeId())
	if status.Code(Status(err)) == codes.NotFound {
		return &csi.ControllerUnpublishVolumeResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	node := req.GetNodeId()
	if node == "" { // all nodes, of which this one is what we know
		node = c.cfg.Node
	}
	if users := c.cfg.Open.Users(req.GetVolumeId()); node == c.cfg.Node && len(users) > 0 {
		return nil, status.Errorf(codes.FailedPrecondition, "the volume is still open in %v", users)
	}
	return do(ctx, c.calls, v.ID, func(ctx context.Context) (*csi.ControllerUnpublishVolumeResponse, error) {
		v, err := store.Volume(ctx, v.ID)
		if err != nil {
			return nil, err
		}
		for _, a := range heldBy(v, node) {
			if err := store.Detach(ctx, v.ID, a.Holder); err != nil {
				return nil, err
			}
		}
		if _, ok := v.Labels[publishedLabel+node]; ok {
			labels := maps.Clone(v.Labels)
			delete(labels, publishedLabel+node)
			err = store.SetLabels(ctx, v.ID, labels)
		}
		return &csi.ControllerUnpublishVolumeResponse{}, err
	})
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (c *controller) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("the volume id is missing")
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, invalid("the volume capabilities are missing")
	}
	store, _, err := c.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	err = checkCapabilities(req.GetVolumeCapabilities())
	if err == nil && !store.Shared && hasMode(req.GetVolumeCapabilities(), csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER) {
		err = invalid("datastore %q is not shared, so that access mode ReadWriteMany is not possible", store.Name)
	}
	if err == nil {
		if _, policyErr := ParsePolicy(req.GetParameters()); policyErr != nil {
			err = invalid("%v", policyErr)
		}
	}
	if err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: status.Convert(err).Message()}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: req.GetVolumeContext(), VolumeCapabilities: req.GetVolumeCapabilities(), Parameters: req.GetParameters(),
	}}, nil
}

// GetCapacity implements csi.ControllerServer. A request that CreateVolume would refuse whatever the room is
// not a matter of capacity: the answer is that there is room, so that CreateVolume is called and its error,
// which says what is wrong, reaches the user. So it is for a claim that is bound immediately, of which
// external-provisioner asks before it takes it on, and which it leaves alone without a word if there is no
// room: no scheduler is there to say so.
func (c *controller) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if t := req.GetAccessibleTopology(); t != nil && !c.here(t) {
		return &csi.GetCapacityResponse{}, nil
	}
	room, err := c.room(ctx, req)
	switch status.Code(Status(err)) {
	case codes.OK:
		if req.GetParameters()[metadataPrefix+stores.LabelClaim] != "" {
			room = math.MaxInt64
		}
	case codes.InvalidArgument:
		room = datastore.MaxSize
	case codes.ResourceExhausted: // not on this host
		room = 0
	default:
		return nil, err
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: room, MaximumVolumeSize: wrapperspb.Int64(min(room, datastore.MaxSize)), MinimumVolumeSize: wrapperspb.Int64(datastore.MinSize),
	}, nil
}

// room is the size of the largest volume of the kind asked for.
func (c *controller) room(ctx context.Context, req *csi.GetCapacityRequest) (int64, error) {
	policy, err := ParsePolicy(req.GetParameters())
	if err != nil {
		return 0, invalid("%v", err)
	}
	caps := req.GetVolumeCapabilities()
	if len(caps) > 0 {
		if err := checkCapabilities(caps); err != nil {
			return 0, err
		}
	}
	candidates, err := c.candidates(ctx, plan{policy: policy, shared: hasMode(caps, csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)})
	if err != nil {
		return 0, err
	}
	var room int64
	for _, s := range candidates {
		now := s.Status(ctx)
		most := now.Creatable
		if policy.Provisioning != datastore.Thin {
			most = min(most, now.Free)
		}
		room = max(room, most)
	}
	return room, nil
}

// ControllerExpandVolume implements csi.ControllerServer.
func (c *controller) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	r := req.GetCapacityRange()
	if req.GetVolumeId() == "" {
		return nil, invalid("the volume id is missing")
	}
	if r == nil {
		return nil, invalid("the capacity range is missing")
	}
	store, v, err := c.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	size, limit, err := volumeSize(r, "", false)
	if err != nil {
		return nil, err
	}
	if limit > 0 && v.Size > limit {
		return nil, status.Errorf(codes.OutOfRange, "the volume has %d bytes, more than the limit of %d; volumes cannot shrink", v.Size, limit)
	}
	v, err = do(ctx, c.calls, v.ID, func(ctx context.Context) (datastore.Volume, error) {
		if v.Size >= size {
			return v, nil
		}
		return store.Expand(ctx, v.ID, size, c.cfg.Open.Live(req.GetVolumeId()))
	})
	if err != nil {
		return nil, err
	}
	node := req.GetVolumeCapability().GetBlock() == nil && !c.cfg.Open.InMachine(req.GetVolumeId())
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Size, NodeExpansionRequired: node}, nil
}

// ControllerModifyVolume implements csi.ControllerServer.
func (c *controller) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("the volume id is missing")
	}
	limits, err := ParseLimits(req.GetMutableParameters())
	if err != nil {
		return nil, invalid("%v", err)
	}
	store, v, err := c.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return do(ctx, c.calls, v.ID, func(ctx context.Context) (*csi.ControllerModifyVolumeResponse, error) {
		v, err := store.Volume(ctx, v.ID)
		if err != nil {
			return nil, err
		}
		labels := maps.Clone(v.Labels)
		if labels == nil {
			labels = map[string]string{}
		}
		setLimitLabels(labels, limits)
		// The record first: what is opened from now on has the new limits.
		if !maps.Equal(labels, v.Labels) {
			if err := store.SetLabels(ctx, v.ID, labels); err != nil {
				return nil, err
			}
		}
		return &csi.ControllerModifyVolumeResponse{}, c.cfg.Open.Limit(ctx, req.GetVolumeId(), limits)
	})
}
