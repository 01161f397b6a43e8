package csi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/images"
	"atoll.dev/atoll/internal/storage/stores"
)

// Sizes of volumes in bytes.
const (
	defaultSize = 1 << 30
	// The least that a file system fits in.
	minExt4 = 16 << 20
	minXFS  = 320 << 20 // xfs_growfs and mkfs.xfs refuse less than 300 MiB
)

// created is a volume and where it is.
type created struct {
	store  stores.Store
	volume datastore.Volume
}

// CreateVolume implements csi.ControllerServer.
func (c *controller) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	plan, err := c.plan(req)
	if err != nil {
		return nil, err
	}
	got, err := do(ctx, c.calls, plan.spec.ID, func(ctx context.Context) (created, error) { return c.create(ctx, plan) })
	if err != nil {
		return nil, c.underway(ctx, plan, err)
	}
	out := &csi.Volume{
		VolumeId:      stores.Handle(got.store.Name, got.volume.ID),
		CapacityBytes: got.volume.Size,
		ContentSource: req.GetVolumeContentSource(),
		VolumeContext: map[string]string{},
	}
	if plan.fsType != "" {
		out.VolumeContext[ParamFSType] = plan.fsType
	}
	for _, host := range c.hosts(got.store) {
		out.AccessibleTopology = append(out.AccessibleTopology, &csi.Topology{Segments: map[string]string{TopologyKey: host}})
	}
	return &csi.CreateVolumeResponse{Volume: out}, nil
}

// plan is a request that makes sense.
type plan struct {
	policy Policy
	spec   datastore.Spec
	// fsType is empty for a block volume.
	fsType string
	// source is the handle of what the volume is a copy of.
	source string
	// shared: several nodes will write.
	shared bool
}

// plan checks everything that does not depend on the datastores.
func (c *controller) plan(req *csi.CreateVolumeRequest) (plan, error) {
	if req.GetName() == "" {
		return plan{}, invalid("the name is missing")
	}
	policy, err := ParsePolicy(req.GetParameters())
	if err != nil {
		return plan{}, invalid("%v", err)
	}
	if changed, err := ParseLimits(req.GetMutableParameters()); err != nil {
		return plan{}, invalid("%v", err)
	} else if changed != (Limits{}) {
		policy.Limits = changed
	}
	p := plan{policy: policy, shared: hasMode(req.GetVolumeCapabilities(), csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)}
	if err := checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return plan{}, err
	}
	if p.fsType, err = fileSystem(req.GetVolumeCapabilities(), policy.FSType); err != nil {
		return plan{}, err
	}
	if !c.accessible(req.GetAccessibilityRequirements()) {
		return plan{}, status.Errorf(codes.ResourceExhausted, "no datastore of node %q is in the topology that is asked for", c.cfg.Node)
	}
	p.spec = datastore.Spec{
		ID: engineID("v", req.GetName()), Provisioning: policy.Provisioning, Encryption: policy.Encryption,
		Labels: maps.Clone(policy.Labels),
	}
	setLimitLabels(p.spec.Labels, policy.Limits)
	if p.shared {
		p.spec.Format = handover.FormatRaw
	}
	if err := p.setSource(req.GetVolumeContentSource()); err != nil {
		return plan{}, err
	}
	p.spec.Size, p.spec.Limit, err = volumeSize(req.GetCapacityRange(), p.fsType, p.source != "")
	return p, err
}

// setSource reads what the volume is a copy of.
func (p *plan) setSource(source *csi.VolumeContentSource) error {
	if source == nil {
		return nil
	}
	p.spec.Source = &datastore.Source{}
	switch {
	case source.GetSnapshot() != nil:
		p.source = source.GetSnapshot().GetSnapshotId()
	case source.GetVolume() != nil:
		p.source = source.GetVolume().GetVolumeId()
	default:
		return invalid("the content source is of no known kind")
	}
	name, id, err := stores.Split(p.source)
	if err != nil {
		return err // NotFound: there is no such source
	}
	if source.GetSnapshot() != nil {
		p.spec.Source.Snapshot = id
	} else {
		p.spec.Source.Volume = id
	}
	if p.policy.Datastore != "" && p.policy.Datastore != name {
		return invalid("parameter %q: the source is on datastore %q, and a copy has to be on the same one; use a StorageClass of that datastore",
			ParamDatastore, name)
	}
	return nil
}

// create chooses a datastore and makes the volume there.
func (c *controller) create(ctx context.Context, p plan) (created, error) {
	candidates, err := c.candidates(ctx, p)
	if err != nil {
		return created{}, err
	}
	if candidates, err = madeBefore(ctx, candidates, p.spec.ID); err != nil {
		return created{}, err
	}
	if len(candidates) == 1 { // what is there needs no image any more
		if v, err := candidates[0].Volume(ctx, p.spec.ID); err == nil && v.State == datastore.StateReady && images.IsCopy(v) {
			return created{store: candidates[0], volume: v}, nil
		}
	}
	image, err := c.image(ctx, &p)
	if err != nil {
		return created{}, err
	}
	var failed error
	for _, s := range candidates {
		spec := p.spec
		if spec.Encryption, err = c.encryption(ctx, p, s); err != nil {
			return created{}, err
		}
		if spec.Source != nil && spec.Source.Volume != "" {
			source := *spec.Source
			source.Live = c.cfg.Open.Live(p.source)
			spec.Source = &source
		}
		if image != nil {
			err = c.importing(ctx, s, image, &spec)
		}
		var v datastore.Volume
		if err == nil {
			v, err = s.Create(ctx, spec)
			if image != nil && errors.Is(err, datastore.ErrNotFound) { // removed between the two; not for good
				err = status.Errorf(codes.Aborted, "image %s has just been removed from datastore %q", image.Name, s.Name)
			}
		}
		if err == nil {
			return created{store: s, volume: v}, nil
		}
		failed = fmt.Errorf("datastore %q: %w", s.Name, err)
		if !errors.Is(err, datastore.ErrFull) { // one that gives no answer may still make the volume
			break
		}
	}
	return created{}, failed
}

// encryption is the class of encryption of a volume to be made. One that an earlier call has made keeps what
// it has, whatever its claim says by now: another class it will be given, and it cannot be made anew.
func (c *controller) encryption(ctx context.Context, p plan, s stores.Store) (string, error) {
	claim, namespace := p.policy.Labels[stores.LabelClaim], p.policy.Labels[stores.LabelNamespace]
	if c.cfg.Encryption == nil || claim == "" || namespace == "" {
		return p.policy.Encryption, nil
	}
	v, err := s.Volume(ctx, p.spec.ID)
	switch {
	case err != nil && !errors.Is(err, datastore.ErrNotFound):
		return "", fmt.Errorf("datastore %q: %w", s.Name, err)
	case err == nil && v.State == datastore.StateReady && v.Encryption == "":
		return p.policy.Encryption, nil // what a StorageClass asks for does not change: without it is another volume
	case err == nil && v.State == datastore.StateReady:
		return v.Encryption, nil
	}
	class, err := c.cfg.Encryption(ctx, namespace, claim, p.policy.Encryption)
	switch {
	case errors.Is(err, datastore.ErrUnavailable) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		return "", status.Error(codes.Unavailable, err.Error())
	case err != nil:
		return "", status.Error(codes.FailedPrecondition, err.Error())
	}
	return class, nil
}

// madeBefore returns the datastore that an earlier call has made the volume on, or else all, with those first
// where one has begun to. Where that cannot be found out there may be a second volume: Unavailable.
func madeBefore(ctx context.Context, candidates []stores.Store, id string) ([]stores.Store, error) {
	if len(candidates) == 1 {
		return candidates, nil
	}
	var begun, others []stores.Store
	var failed error
	for _, s := range candidates {
		switch v, err := s.Volume(ctx, id); {
		case err == nil && v.State == datastore.StateReady:
			return []stores.Store{s}, nil
		case err == nil:
			begun = append(begun, s)
		case errors.Is(err, datastore.ErrNotFound):
			others = append(others, s)
		default:
			failed = status.Errorf(codes.Unavailable, "datastore %q may have the volume already: %v", s.Name, err)
		}
	}
	return append(begun, others...), failed
}

// candidates are the datastores a volume may be on, the best one first.
func (c *controller) candidates(ctx context.Context, p plan) ([]stores.Store, error) {
	switch {
	case p.source != "":
		s, _, err := c.cfg.Stores.Resolve(p.source)
		return []stores.Store{s}, err
	case p.policy.Selector == nil:
		name := p.policy.Datastore
		if name == "" {
			name = stores.Default
		}
		s, err := c.cfg.Stores.Get(name)
		switch {
		case errors.Is(err, stores.ErrElsewhere): // the claim may go to that host
			return nil, status.Errorf(codes.ResourceExhausted, "parameter %q: datastore %q is not on node %q", ParamDatastore, name, c.cfg.Node)
		case errors.Is(err, stores.ErrNone):
			return nil, invalid("parameter %q: there is no datastore %q; `atoll datastore ls` lists what there is", ParamDatastore, name)
		case err != nil:
			return nil, err
		}
		if p.shared && !s.Shared {
			return nil, invalid("parameter %q: access mode ReadWriteMany needs a shared datastore, and %q is not one; use ReadWriteOnce or a shared datastore",
				ParamDatastore, name)
		}
		return []stores.Store{s}, nil
	}
	type candidate struct {
		store stores.Store
		free  int64
	}
	var found []candidate
	for _, s := range c.cfg.Stores.All() {
		if matches(s.Labels, p.policy.Selector) && (s.Shared || !p.shared) {
			found = append(found, candidate{s, s.Status(ctx).Creatable})
		}
	}
	if len(found) == 0 {
		what := ""
		if p.shared {
			what = "shared "
		}
		message := fmt.Sprintf("parameter %q: no %sdatastore open on node %q has these labels; `atoll datastore ls -o wide` lists them", ParamSelector, what, c.cfg.Node)
		if c.cfg.Stores.Complete() {
			return nil, invalid("%s", message)
		}
		return nil, status.Error(codes.ResourceExhausted, message)
	}
	slices.SortStableFunc(found, func(a, b candidate) int {
		switch {
		case a.free > b.free:
			return -1
		case a.free < b.free:
			return 1
		}
		return 0
	})
	var out []stores.Store
	for _, f := range found {
		out = append(out, f.store)
	}
	return out, nil
}

func matches(labels, selector map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// accessible tells whether this node is in a topology that is asked for.
func (c *controller) accessible(r *csi.TopologyRequirement) bool {
	if len(r.GetRequisite()) == 0 {
		return true
	}
	return slices.ContainsFunc(r.GetRequisite(), c.here)
}

func (c *controller) here(t *csi.Topology) bool {
	for k, v := range t.GetSegments() {
		if k != TopologyKey || v != c.cfg.Node {
			return false
		}
	}
	return true
}

// hosts are the nodes that reach a datastore.
func (c *controller) hosts(s stores.Store) []string {
	if s.Shared && len(s.Hosts) > 0 {
		return s.Hosts
	}
	return []string{c.cfg.Node}
}

// volumeSize settles how large a volume becomes, and the most it may be (0: any).
func volumeSize(r *csi.CapacityRange, fsType string, copied bool) (size, limit int64, err error) {
	size, limit = r.GetRequiredBytes(), r.GetLimitBytes()
	smallest := int64(datastore.MinSize)
	switch fsType {
	case fsExt4:
		smallest = minExt4
	case fsXFS:
		smallest = minXFS
	}
	switch {
	case size < 0 || limit < 0:
		return 0, 0, invalid("a size cannot be negative")
	case limit > 0 && size > limit:
		return 0, 0, invalid("resources.requests.storage is %d bytes, more than resources.limits.storage, %d", size, limit)
	case size > datastore.MaxSize:
		return 0, 0, status.Errorf(codes.OutOfRange, "resources.requests.storage is %d bytes; a volume has at most %d (64Ti)", size, int64(datastore.MaxSize))
	case limit > 0 && limit < smallest:
		return 0, 0, status.Errorf(codes.OutOfRange, "resources.limits.storage is %d bytes; such a volume has at least %d (%dMi)", limit, smallest, smallest>>20)
	case size == 0 && copied:
		return 0, limit, nil
	case size == 0:
		size = defaultSize
		if limit > 0 {
			size = min(size, limit)
		}
	}
	return max(size, smallest), limit, nil
}

// engineID makes an id of the engine from a name of any form. The same name always has the same id.
func engineID(kind, name string) string {
	if plainName().MatchString(name) && !strings.HasPrefix(name, kind+"-") {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return kind + "-" + hex.EncodeToString(sum[:20])
}

func plainName() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`) }
