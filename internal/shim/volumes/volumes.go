// Package volumes gives the volumes of a pod to its guest.
//
// A host directory is never mounted in a guest. What a bind mount of the spec means there is found by
// its path (Locate): an emptyDir becomes a directory or tmpfs of the guest, a ConfigMap, Secret,
// projected or downward API volume a tree of files that is sent and kept up to date, and single files
// (/etc/hosts, the termination log) become files of the pod's own volume. Everything else is refused
// with an error that names the way out.
//
// Set holds the volumes of one pod and is the only thing here with state. internal/shim/task asks it
// for the guest path of each mount before a container is created; the daemon runs its watcher. The
// kubelet measures emptyDirs, which are empty on the host: what they take in the guest is written down
// for it (package handover). Nothing is mounted, on the host or in the guest.
//
// What can go wrong: a volume that is too large (ErrTooLarge), a kind that needs the host
// (spec.ErrUnsupported), files that vanish while they are read (read again), a guest that answers
// nonsense (its own pod suffers).
package volumes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/shim/disks"
	"atoll.dev/atoll/internal/shim/spec"
)

// PodVolume is the id of the volume with the pod's own files.
const PodVolume = "pod"

// maxTerminationLog bounds what is copied back; the kubelet reads the last 4 KiB.
const maxTerminationLog = 12 << 10

// callTimeout bounds each call to the guest, which may starve among emulated ones.
const callTimeout = 90 * time.Second

// Guest is the part of the guest protocol that volumes need.
type Guest interface {
	CreateVolume(context.Context, *guestv1.CreateVolumeRequest) (*guestv1.Empty, error)
	PutFiles(context.Context, *guestv1.PutFilesRequest) (*guestv1.Empty, error)
	GetFile(context.Context, *guestv1.GetFileRequest) (*guestv1.GetFileResponse, error)
	Stats(context.Context, *guestv1.StatsRequest) (*guestv1.StatsResponse, error)
}

// Disks gives persistent volumes to the guest.
type Disks interface {
	// Mount returns the id in the guest of a volume with that name.
	Mount(ctx context.Context, name string) (string, error)
	// Device returns the device in the guest for the one that stands for a block volume on the host; false if
	// it is the host's own.
	Device(ctx context.Context, host handover.Device) (handover.Device, bool, error)
}

// Set is the volumes of one pod.
type Set struct {
	guest    Guest
	disks    Disks
	roots    Roots
	watch    *watcher
	begun    chan error        // holds the result of Begin while nobody waits, nil before it is called
	first    map[string][]byte // files of Begin
	measure  chan struct{}     // buffered; somebody wants to know what volumes take
	interval time.Duration     // between two reports of that

	mu      sync.Mutex // held over each change in the guest; guards the fields below
	volumes map[string]*volume
	files   map[string]digest // of the pod's own files, by guest path below PodVolume
}

// volume is a volume that the guest has.
type volume struct {
	kind guestv1.CreateVolumeRequest_Kind
	host string // directory on the host
	size uint64 // of a memory volume in bytes
	sent digest // of a pushed tree
}

// Container is what a container needs from the volumes.
type Container struct {
	// TerminationLog is the host's file for the termination message, "" for none.
	TerminationLog string
	// Filled are the volumes to fill from the image, by their place in it.
	Filled []*guestv1.ImageVolume

	id    string
	binds map[string]string // guest path by host source
	files []podFile         // to send
}

// podFile is a single host file that becomes one of the pod's own files.
type podFile struct{ host, name string }

// New makes an empty set. Paths outside of roots are refused.
func New(guest Guest, disks Disks, roots Roots) *Set {
	return &Set{
		guest: guest, disks: disks, roots: roots, watch: newWatcher(), measure: make(chan struct{}, 1), interval: reportInterval,
		volumes: map[string]*volume{}, files: map[string]digest{},
	}
}

// Run keeps pushed volumes up to date and reports what emptyDirs take, until ctx ends.
func (s *Set) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.reports(ctx) })
	return s.watch.run(ctx, func(host string) error {
		err := s.refresh(ctx, host)
		if err != nil && ctx.Err() == nil {
			slog.Warn("updating volume in guest", "volume", host, "error", err)
		}
		if errors.Is(err, ErrTooLarge) { // until it is changed
			return nil
		}
		return err
	})
}

// Prepare makes sure that the guest has, in their current state, all volumes that the bind mounts of a
// container use.
func (s *Set) Prepare(ctx context.Context, id string, mounts []specs.Mount) (*Container, error) {
	c := &Container{id: id, binds: map[string]string{}}
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	locs := make([]Location, len(mounts))
	for i, m := range mounts {
		var err error
		if locs[i], err = s.roots.Locate(m.Source); err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
	}
	// Before the others, which must not wait for the minutes that this can take.
	for i, m := range mounts {
		if locs[i].Kind != KindDisk {
			continue
		}
		guest, err := s.mount(ctx, locs[i])
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		c.binds[m.Source] = guest
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, m := range mounts {
		if locs[i].Kind == KindDisk {
			continue
		}
		guest, err := s.prepare(ctx, c, m, locs[i])
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		c.binds[m.Source] = guest
	}
	if err := s.sendFiles(ctx, c.files); err != nil {
		return nil, err
	}
	c.files = nil
	return c, nil
}

// Begin writes the first files of the pod's own volume in the background. Prepare waits for them. Names
// are relative. It may be called once, before anything else.
func (s *Set) Begin(ctx context.Context, files map[string][]byte) {
	s.begun, s.first = make(chan error, 1), files
	go func() { s.begun <- s.putPodFiles(ctx, files) }()
}

// wait waits for what was begun, and does it again if it has failed: a host that is too busy makes a guest
// late, and a pod that never started again for that would be lost.
func (s *Set) wait(ctx context.Context) error {
	if s.begun == nil {
		return nil
	}
	select {
	case err := <-s.begun:
		if err != nil {
			err = s.putPodFiles(ctx, s.first)
		}
		s.begun <- err // for the next one
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Bind is the guest path of the source of one of the mounts given to Prepare.
func (c *Container) Bind(m specs.Mount) (string, error) {
	guest, ok := c.binds[m.Source]
	if !ok {
		return "", fmt.Errorf("mount %s: volume was not prepared", m.Destination)
	}
	return guest, nil
}

// mount makes sure that the guest has a persistent volume.
func (s *Set) mount(ctx context.Context, loc Location) (string, error) {
	id, err := s.disks.Mount(ctx, loc.ID)
	if errors.Is(err, disks.ErrUnpublished) {
		return "", fmt.Errorf("%w: volume %q of another CSI driver; %s", spec.ErrUnsupported, loc.ID, spec.Instead)
	}
	return guestPath(id, loc.Sub), err
}

// prepare makes sure that the guest has a volume that is not a disk. Callers hold mu.
func (s *Set) prepare(ctx context.Context, c *Container, m specs.Mount, loc Location) (string, error) {
	switch loc.Kind {
	case KindEmptyDir:
		return guestPath(loc.ID, loc.Sub), s.ensureDir(ctx, loc)
	case KindPushed:
		return guestPath(loc.ID, loc.Sub), s.ensurePushed(ctx, loc)
	case KindImage:
		c.Filled = append(c.Filled, &guestv1.ImageVolume{Volume: loc.ID, ImagePath: m.Destination})
		return guestPath(loc.ID, ""), s.create(ctx, loc, &guestv1.CreateVolumeRequest{Kind: guestv1.CreateVolumeRequest_IMAGE})
	case KindHosts:
		c.files = append(c.files, podFile{loc.Host, "hosts"})
		return guestPath(PodVolume, "hosts"), nil
	case KindTerminationLog:
		c.TerminationLog = loc.Host
		c.files = append(c.files, podFile{loc.Host, terminationLog(c.id)})
		return guestPath(PodVolume, terminationLog(c.id)), nil
	}
	return "", fmt.Errorf("volume kind %d is not handled", loc.Kind)
}

// Device finds the device in the guest for one of the host that the kubelet gave to a container. It is false
// for devices that do not stand for a block volume.
func (s *Set) Device(ctx context.Context, d specs.LinuxDevice) (specs.LinuxDevice, bool, error) {
	if d.Type != "b" {
		return d, false, nil
	}
	guest, ok, err := s.disks.Device(ctx, handover.Device{Major: d.Major, Minor: d.Minor})
	if ok && err == nil {
		d.Major, d.Minor = guest.Major, guest.Minor
	}
	return d, ok, err
}

func terminationLog(container string) string { return "termination/" + container }

func guestPath(id, sub string) string { return filepath.Join(channel.VolumesDir, id, sub) }

// create makes a volume once. The root of a directory that the kubelet made on the host gets the same
// owner and mode.
func (s *Set) create(ctx context.Context, loc Location, req *guestv1.CreateVolumeRequest) error {
	if s.volumes[loc.ID] != nil {
		return nil
	}
	req.Id = loc.ID
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := s.guest.CreateVolume(ctx, req); err != nil {
		return fmt.Errorf("creating volume %s in the guest: %w", loc.ID, err)
	}
	s.volumes[loc.ID] = &volume{kind: req.Kind, host: loc.Host, size: req.SizeBytes}
	return nil
}

// ensureDir makes an emptyDir: on tmpfs when the kubelet mounted one for it, of the same size.
func (s *Set) ensureDir(ctx context.Context, loc Location) error {
	if s.volumes[loc.ID] != nil {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(loc.Host, &st); err != nil {
		return fmt.Errorf("reading volume %s: %w", loc.Host, err)
	}
	req := &guestv1.CreateVolumeRequest{
		Kind: guestv1.CreateVolumeRequest_SCRATCH, Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid,
	}
	medium, err := mediumOf(loc.Host)
	if err != nil {
		return err
	}
	if medium.memory {
		req.Kind, req.SizeBytes = guestv1.CreateVolumeRequest_MEMORY, medium.size
	}
	return s.create(ctx, loc, req)
}

// ensurePushed makes a volume of files and sends them, or what changed since.
func (s *Set) ensurePushed(ctx context.Context, loc Location) error {
	if err := s.create(ctx, loc, &guestv1.CreateVolumeRequest{Kind: guestv1.CreateVolumeRequest_PUSHED}); err != nil {
		return err
	}
	// The watch may begin after the tree was read: it looks once more then.
	s.watch.add(loc.Host)
	return s.push(ctx, loc.ID)
}

// refresh sends a pushed volume again after its directory changed.
func (s *Set) refresh(ctx context.Context, host string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, v := range s.volumes {
		if v.host == host && v.kind == guestv1.CreateVolumeRequest_PUSHED {
			return s.push(ctx, id)
		}
	}
	return nil
}

// push sends the current tree unless it is the one that was sent last.
func (s *Set) push(ctx context.Context, id string) error {
	v := s.volumes[id]
	tree, err := ReadTree(v.host)
	if err != nil {
		return fmt.Errorf("reading volume %s: %w", id, err)
	}
	if tree.Digest == v.sent {
		return nil
	}
	for _, req := range Requests(id, tree.Files, true) {
		if err := s.put(ctx, req); err != nil {
			return fmt.Errorf("sending volume %s: %w", id, err)
		}
	}
	v.sent = tree.Digest
	return nil
}

func (s *Set) put(ctx context.Context, req *guestv1.PutFilesRequest) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := s.guest.PutFiles(ctx, req)
	return err
}

// putPodFiles makes the pod's own volume with its first files.
func (s *Set) putPodFiles(ctx context.Context, files map[string][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*guestv1.File, 0, len(files))
	for name, data := range files {
		out = append(out, &guestv1.File{Path: name, Mode: unix.S_IFREG | 0o644, Data: data})
	}
	return s.putFiles(ctx, out)
}

func (s *Set) putFiles(ctx context.Context, files []*guestv1.File) error {
	loc := Location{ID: PodVolume}
	if err := s.create(ctx, loc, &guestv1.CreateVolumeRequest{Kind: guestv1.CreateVolumeRequest_PUSHED}); err != nil {
		return err
	}
	for _, req := range Requests(PodVolume, files, false) {
		if err := s.put(ctx, req); err != nil {
			return fmt.Errorf("sending pod files: %w", err)
		}
	}
	return nil
}

// sendFiles sends single host files that the guest does not have. What containers wrote into one in the
// guest stays until the host's file changes.
func (s *Set) sendFiles(ctx context.Context, list []podFile) error {
	var changed []*guestv1.File
	digests := map[string]digest{}
	for _, l := range list {
		f, err := readSingle(l.host)
		if err != nil {
			return fmt.Errorf("reading %s: %w", l.host, err)
		}
		f.Path = l.name
		if d := digestOf([]*guestv1.File{f}); s.files[l.name] != d {
			digests[l.name] = d
			changed = append(changed, f)
		}
	}
	if len(changed) == 0 {
		return nil
	}
	if err := s.putFiles(ctx, changed); err != nil {
		return err
	}
	maps.Copy(s.files, digests)
	return nil
}

// SaveTerminationLog copies the container's termination message to the host's file, where the kubelet
// looks for it.
func (s *Set) SaveTerminationLog(ctx context.Context, c *Container) error {
	if c == nil || c.TerminationLog == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := s.guest.GetFile(ctx, &guestv1.GetFileRequest{
		Volume: PodVolume, Path: terminationLog(c.id), MaxBytes: maxTerminationLog,
	})
	if err != nil {
		return fmt.Errorf("reading termination message: %w", err)
	}
	data := resp.GetData()
	if len(data) > maxTerminationLog {
		return fmt.Errorf("reading termination message: %w: %d bytes", ErrTooLarge, len(data))
	}
	if len(data) == 0 {
		return nil
	}
	// The path is the kubelet's; never through a link, and only while the file is still there.
	f, err := os.OpenFile(c.TerminationLog, os.O_WRONLY|os.O_TRUNC|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("saving termination message: %w", err)
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("saving termination message: %w", err)
	}
	return nil
}
