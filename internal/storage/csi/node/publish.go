package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	csispec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/csi"
	"atoll.dev/atoll/internal/storage/datastore"
)

// What the kubelet says about the pod (podInfoOnMount).
const (
	contextPod       = "csi.storage.k8s.io/pod.name"
	contextNamespace = "csi.storage.k8s.io/pod.namespace"
	contextUID       = "csi.storage.k8s.io/pod.uid"
	contextEphemeral = "csi.storage.k8s.io/ephemeral"
)

// defaultFSType is the file system of a volume for which nobody names one.
const defaultFSType = "ext4"

func invalid(format string, args ...any) error {
	return status.Error(codes.InvalidArgument, fmt.Sprintf(format, args...))
}

// NodePublishVolume implements csi.NodeServer.
func (s *Service) NodePublishVolume(ctx context.Context, req *csispec.NodePublishVolumeRequest) (*csispec.NodePublishVolumeResponse, error) {
	t, err := s.wanted(ctx, req)
	if err != nil {
		return nil, csi.Status(err)
	}
	defer s.lock(t.Volume)()
	if err := s.publish(ctx, t); err != nil {
		return nil, csi.Status(err)
	}
	return &csispec.NodePublishVolumeResponse{}, nil
}

// wanted reads a request.
func (s *Service) wanted(ctx context.Context, req *csispec.NodePublishVolumeRequest) (target, error) {
	c, info := req.GetVolumeCapability(), req.GetVolumeContext()
	switch {
	case req.GetVolumeId() == "":
		return target{}, invalid("the volume id is missing")
	case !filepath.IsAbs(req.GetTargetPath()):
		return target{}, invalid("the target path is missing or not absolute")
	case c == nil || c.GetBlock() == nil && c.GetMount() == nil:
		return target{}, invalid("the volume capability is missing")
	case info[contextEphemeral] == "true":
		return target{}, invalid("inline CSI volumes are not supported; use a generic ephemeral volume (ephemeral.volumeClaimTemplate)")
	}
	path := filepath.Clean(req.GetTargetPath())
	t := target{
		Path: path, Volume: req.GetVolumeId(), Pod: info[contextUID], Name: filepath.Base(filepath.Dir(path)),
		Mode: csi.Mode(c, req.GetReadonly()), Block: c.GetBlock() != nil,
		Alone: c.GetAccessMode().GetMode() == csispec.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	}
	if m := c.GetMount(); m != nil {
		t.FSType, t.Options = m.GetFsType(), m.GetMountFlags()
		if t.FSType == "" {
			t.FSType = defaultFSType
		}
		if slices.Contains(t.Options, "ro") && t.Mode == datastore.ReadWrite {
			t.Mode = datastore.ReadOnly
		}
		if g := m.GetVolumeMountGroup(); g != "" {
			n, err := strconv.ParseUint(g, 10, 32)
			if err != nil {
				return target{}, invalid("volume mount group %q is not a number", g)
			}
			group := uint32(n)
			t.Group = &group
		}
	}
	use := hostUse
	if t.Pod != "" {
		micro, err := s.cfg.MicroVM(ctx, info[contextNamespace], info[contextPod], t.Pod)
		if err != nil {
			return target{}, fmt.Errorf("finding out how pod %s/%s runs: %w", info[contextNamespace], info[contextPod], err)
		}
		if t.MicroVM = micro; micro {
			use = "pod/" + t.Pod
		}
	}
	t.Holder = csi.Holder(s.cfg.Node, use)
	t.Request = digest(fmt.Sprint(t.Volume, t.Mode, t.Block, t.FSType, t.Options, t.MicroVM, t.Pod))
	return t, nil
}

func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// publish does what is asked for, whatever of it was done before. Callers hold the volume's lock.
func (s *Service) publish(ctx context.Context, t target) error {
	store, id, err := s.cfg.Stores.Resolve(t.Volume)
	if err != nil {
		return err
	}
	old, again, err := s.targets.get(t.Path)
	if err != nil {
		return err
	}
	if again && old.Request != t.Request {
		return status.Errorf(codes.AlreadyExists, "at %s volume %s is published in another way", t.Path, old.Volume)
	}
	if err := s.alone(t); err != nil {
		return err
	}
	if again {
		t.Loop, t.Backing = old.Loop, old.Backing
	}
	// Before the record: what does not exist, or is in use, leaves nothing behind.
	disk, err := store.Attach(ctx, id, t.Holder, t.Mode)
	if err != nil {
		return err
	}
	if err := s.targets.put(t); err != nil {
		return err
	}
	return s.orUndo(ctx, t, s.publishRecorded(ctx, t, disk))
}

// publishRecorded does what the record says.
func (s *Service) publishRecorded(ctx context.Context, t target, disk handover.Disk) error {
	switch {
	case t.MicroVM && t.Block:
		return s.publishStandIn(t, disk.Size)
	case t.MicroVM:
		if err := s.handOver(t, nil); err != nil {
			return err
		}
		return makeDir(t.Path)
	}
	return s.publishHere(ctx, t, disk)
}

// orUndo undoes what has failed, unless the target has something mounted from before: the kubelet unpublishes
// nothing after an error that it takes for final.
func (s *Service) orUndo(ctx context.Context, t target, err error) error {
	if err == nil || isMounted(t.Path) {
		return err
	}
	if failed := s.unpublish(context.WithoutCancel(ctx), t.Volume, t.Path); failed != nil {
		return errors.Join(err, failed)
	}
	return err
}

// isMounted tells whether something is mounted at a path; if it cannot be found out, there is.
func isMounted(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	if errors.Is(err, unix.ENOENT) {
		return false
	}
	return err != nil || st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// alone refuses a volume that is for one pod only (ReadWriteOncePod) and is published already.
func (s *Service) alone(t target) error {
	others, err := s.targets.of(t.Volume)
	if err != nil {
		return err
	}
	for _, o := range others {
		if o.Path != t.Path && (o.Alone || t.Alone) {
			return status.Errorf(codes.FailedPrecondition, "volume %s is published at %s, and one of the two is for a single pod (ReadWriteOncePod)", t.Volume, o.Path)
		}
	}
	return nil
}

// handOver leaves the record for the pod's shim.
func (s *Service) handOver(t target, block *handover.Device) error {
	v := handover.Volume{
		ID: t.Volume, FSType: t.FSType, MountOptions: t.Options, ReadOnly: t.Mode == datastore.ReadOnly,
		FSGroup: t.Group, Block: block,
	}
	return v.Write(handover.PublishedVolume(s.cfg.Kubelet, t.Pod, t.Name))
}

func makeDir(path string) error {
	if err := os.MkdirAll(path, 0o750); err != nil {
		return fmt.Errorf("making the target directory: %w", err)
	}
	return nil
}

// NodeUnpublishVolume implements csi.NodeServer.
func (s *Service) NodeUnpublishVolume(ctx context.Context, req *csispec.NodeUnpublishVolumeRequest) (*csispec.NodeUnpublishVolumeResponse, error) {
	switch {
	case req.GetVolumeId() == "":
		return nil, invalid("the volume id is missing")
	case !filepath.IsAbs(req.GetTargetPath()):
		return nil, invalid("the target path is missing or not absolute")
	}
	defer s.lock(req.GetVolumeId())()
	if err := s.unpublish(ctx, req.GetVolumeId(), filepath.Clean(req.GetTargetPath())); err != nil {
		return nil, csi.Status(err)
	}
	return &csispec.NodeUnpublishVolumeResponse{}, nil
}

// unpublish undoes what the record of a path says. Callers hold the volume's lock.
func (s *Service) unpublish(ctx context.Context, volume, path string) error {
	t, ok, err := s.targets.get(path)
	if err != nil {
		return err
	}
	if !ok {
		return removeTarget(path)
	}
	if t.Volume != volume {
		return status.Errorf(codes.InvalidArgument, "at %s volume %s is published, not %s", path, t.Volume, volume)
	}
	last := true // that uses the volume by this holder
	if t.MicroVM {
		err = s.takeBack(t)
	} else {
		last, err = s.unpublishHere(ctx, t)
	}
	if err != nil {
		return err
	}
	if err := removeTarget(path); err != nil {
		return err
	}
	if !last {
		return s.targets.remove(path)
	}
	store, id, err := s.cfg.Stores.Resolve(t.Volume)
	if err != nil {
		return err
	}
	if err := store.Detach(ctx, id, t.Holder); err != nil {
		return err
	}
	return s.targets.remove(path)
}

// takeBack makes sure that the pod's shim has closed the volume, and takes away what stands for it here.
func (s *Service) takeBack(t target) error {
	open, err := s.records.Find(t.Volume)
	if err != nil {
		return err
	}
	for _, r := range open {
		if r.Pod == t.Pod {
			return status.Errorf(codes.FailedPrecondition, "the micro-VM of pod %s has the volume open still", t.Pod)
		}
	}
	file := handover.PublishedVolume(s.cfg.Kubelet, t.Pod, t.Name)
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("taking the volume's record back: %w", err)
	}
	_ = os.Remove(filepath.Dir(file)) // with the pod's last volume
	if t.Block {
		return s.removeStandIn(t)
	}
	return nil
}

// removeTarget removes a target path: a file, or a directory with nothing in it but directories, which the
// kubelet makes for sub paths.
func removeTarget(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil && st.IsDir() {
		err = removeDirs(path)
	} else if err == nil {
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the target path: %w", err)
	}
	return nil
}

func removeDirs(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			return fmt.Errorf("%s has the file %s, which does not belong there", dir, e.Name())
		}
		if err := removeDirs(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return unix.Rmdir(dir)
}
