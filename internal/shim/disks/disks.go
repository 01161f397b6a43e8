// Package disks gives the persistent volumes of a pod to its micro-VM.
//
// A volume was published by the CSI node service, which wrote a record (package handover) and mounted
// nothing. When the first container needs it, the agent is asked how to open it (package attach), QEMU gets
// its files as a SCSI disk, and the guest mounts it, after a new file system was written on a blank one. It
// stays until the pod ends: Release then has the guest unmount it and QEMU close it, so that all is on disk
// and the lock is free when the sandbox has stopped. Whatever kills QEMU or this process before loses nothing
// that a container has synchronized: the next pod's guest replays the journal.
//
// While volumes are attached, Serve answers the agent: statistics, snapshots, growth, limits.
// internal/shim/volumes calls Mount and Device, internal/shim/sandbox Release, the daemon wires it.
//
// What can go wrong: the volume was not published (ErrUnpublished), the agent is not there or refuses, another
// process has the volume open (vm.ErrLocked), it holds something else than was asked for, the guest does not
// let go (its disk is taken away; what it had not written is lost, as with a power cut).
package disks

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"sync"
	"time"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/vm"
)

const (
	// guestTimeout bounds calls to the guest; giving many files to a group takes long.
	guestTimeout = 90 * time.Second
	// releaseTimeout bounds how long the guest may take to write out and unmount at the pod's end: the kubelet
	// gives a sandbox two minutes to stop. stalledTimeout is for when a datastore is full and nothing can be
	// written.
	releaseTimeout = 80 * time.Second
	stalledTimeout = 20 * time.Second
	// statTimeout bounds how long the guest may take to say what a volume holds.
	statTimeout = 20 * time.Second
)

// ErrUnpublished is wrapped when there is no record of a volume: it is not one of ours.
var ErrUnpublished = errors.New("volume was not published by " + handover.Driver)

// Machine is the part of a virtual machine that volumes need.
type Machine interface {
	AddVolume(ctx context.Context, v vm.Volume) (lun int, err error)
	SnapshotVolume(ctx context.Context, serial string, frozen, overlay vm.Layer) error
	ResizeVolume(ctx context.Context, serial string, bytes int64) error
	LimitVolume(ctx context.Context, serial string, l vm.Limits) error
	RemoveVolume(ctx context.Context, serial string) error
	Stalled() bool
	OnGoingOn(func())
}

// Guest is the part of the guest protocol that volumes need.
type Guest interface {
	ProbeDisk(context.Context, *guestv1.ProbeDiskRequest) (*guestv1.ProbeDiskResponse, error)
	WriteDisk(context.Context, *guestv1.WriteDiskRequest) (*guestv1.Empty, error)
	CreateVolume(context.Context, *guestv1.CreateVolumeRequest) (*guestv1.Empty, error)
	GrowVolume(context.Context, *guestv1.GrowVolumeRequest) (*guestv1.GrowVolumeResponse, error)
	StatVolume(context.Context, *guestv1.StatVolumeRequest) (*guestv1.VolumeUsage, error)
	ReleaseVolumes(context.Context, *guestv1.ReleaseVolumesRequest) (*guestv1.Empty, error)
}

// Config is what a Set works with.
type Config struct {
	Kubelet string // the kubelet's root directory
	RunDir  string // with the agent's socket and the records
	Socket  string // of this shim, for the agent; made with the first volume
	Scratch string // directory for new file systems on their way
}

// Set is the persistent volumes of one pod.
type Set struct {
	cfg     Config
	pod     string // uid
	machine Machine
	guest   Guest
	records attach.Records
	life    context.Context // ends with Release
	end     context.CancelFunc

	attaching sync.Mutex // held over the attaching of a volume; comes before mu
	serving   bool       // guarded by attaching

	mu    sync.Mutex       // guards the field below, not held over calls
	disks map[string]*disk // by name
}

// disk is a volume that the guest has.
type disk struct {
	id     string // in the guest
	serial string
	volume handover.Volume
	device handover.Device // in the guest
	broken bool            // it could not be attached, nor taken away again: QEMU may have it open

	mu     sync.Mutex       // held over each change of the disk, not over calls to the guest; guards the fields below
	layers []handover.Layer // lowest first
	size   int64
}

// New makes an empty set for a pod.
func New(cfg Config, pod string, m Machine, g Guest) *Set {
	s := &Set{cfg: cfg, pod: pod, machine: m, guest: g, records: attach.NewRecords(cfg.RunDir), disks: map[string]*disk{}}
	s.life, s.end = context.WithCancel(context.Background())
	return s
}

// Mount makes sure that the guest has the volume, and returns its id there. name is that of the
// PersistentVolume.
func (s *Set) Mount(ctx context.Context, name string) (string, error) {
	v, err := handover.ReadVolume(handover.PublishedVolume(s.cfg.Kubelet, s.pod, name))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("volume %s: %w", name, ErrUnpublished)
	}
	if err != nil {
		return "", err
	}
	if v.Block != nil {
		return "", fmt.Errorf("volume %s is a block device and cannot be mounted", name)
	}
	d, err := s.ensure(ctx, name, v)
	if err != nil {
		return "", fmt.Errorf("attaching volume %s: %w", name, err)
	}
	return d.id, nil
}

// Device makes sure that the guest has the block volume in whose place the kubelet was given a device, and
// returns the device in the guest; false if the device is none of ours.
func (s *Set) Device(ctx context.Context, host handover.Device) (handover.Device, bool, error) {
	all, err := handover.ReadVolumes(s.cfg.Kubelet, s.pod)
	if err != nil {
		return handover.Device{}, false, err
	}
	for name, v := range all {
		if v.Block == nil || *v.Block != host {
			continue
		}
		d, err := s.ensure(ctx, name, v)
		if err != nil {
			return handover.Device{}, true, fmt.Errorf("attaching block volume %s: %w", name, err)
		}
		return d.device, true, nil
	}
	return handover.Device{}, false, nil
}

// ensure attaches a volume once. While the agent is asked how, mu is free and the volume is not known yet: the
// agent may be about to change the volume, and wait for an answer from here.
func (s *Set) ensure(ctx context.Context, name string, v handover.Volume) (*disk, error) {
	ending := errors.New("the pod is ending")
	if s.life.Err() != nil { // Release may hold attaching for long
		return nil, ending
	}
	s.attaching.Lock()
	defer s.attaching.Unlock()
	if s.life.Err() != nil {
		return nil, ending
	}
	if d := s.find(name); d != nil && !d.broken {
		return d, nil
	} else if d != nil {
		if err := s.remove(ctx, d); err != nil {
			return nil, fmt.Errorf("what is left of an earlier attempt: %w", err)
		}
		s.forget(name, d)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	if err := s.serve(); err != nil {
		return nil, err
	}
	d := &disk{id: "d-" + name, serial: serialOf(v.ID), volume: v}
	if !channel.ValidID(d.id) {
		return nil, fmt.Errorf("volume name %q is not valid", name)
	}
	if s.attached(d.serial) {
		return nil, errors.New("the pod has the same volume under another name")
	}
	record := attach.Record{Volume: v.ID, Pod: s.pod, Socket: s.cfg.Socket}
	if err := s.records.Put(record); err != nil {
		return nil, err
	}
	err := s.attach(ctx, d)
	if err != nil {
		failed := s.remove(ctx, d)
		if failed == nil {
			return nil, errors.Join(err, s.records.Remove(v.ID, s.pod))
		}
		d.broken = true // the record stays, and Release or the next attempt tries again
		err = errors.Join(err, failed)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disks[name] = d
	return d, err
}

// remove has QEMU close a volume. After an error it may have it open still.
func (s *Set) remove(ctx context.Context, d *disk) error {
	err := s.machine.RemoveVolume(ctx, d.serial)
	if errors.Is(err, vm.ErrExited) || errors.Is(err, vm.ErrNoVolume) {
		return nil
	}
	return err
}

func (s *Set) find(name string) *disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.disks[name]
}

func (s *Set) attached(serial string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.disks {
		if d.serial == serial {
			return true
		}
	}
	return false
}

// serialOf is a serial number for a volume, whose handle may be too long for one.
func serialOf(volume string) string {
	sum := sha256.Sum256([]byte(volume))
	return "v" + hex.EncodeToString(sum[:10])
}

// attach opens the volume and makes the guest use it. After an error, some of that may have been done.
func (s *Set) attach(ctx context.Context, d *disk) error {
	opened, err := s.open(ctx, d.volume.ID)
	if err != nil {
		return err
	}
	readOnly := d.volume.ReadOnly || opened.Disk.ReadOnly
	if err := s.plug(ctx, d, opened, readOnly); err != nil {
		return err
	}
	gctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	probe, err := s.guest.ProbeDisk(gctx, &guestv1.ProbeDiskRequest{Serial: d.serial})
	if err != nil {
		return fmt.Errorf("waiting for the disk in the guest: %w", err)
	}
	d.device = handover.Device{Major: int64(probe.GetMajor()), Minor: int64(probe.GetMinor())}
	req := &guestv1.CreateVolumeRequest{Id: d.id, Kind: guestv1.CreateVolumeRequest_BLOCK, Disk: &guestv1.DiskVolume{Serial: d.serial}}
	if d.volume.Block == nil {
		fsType := d.volume.FSType
		if probe.GetBlank() {
			if readOnly {
				return errors.New("the volume is read-only and has no file system yet; let a pod write to it first")
			}
			if err := s.format(gctx, d, fsType); err != nil {
				return err
			}
		}
		req.Kind = guestv1.CreateVolumeRequest_DISK
		req.Disk.FsType, req.Disk.Options, req.Disk.ReadOnly = fsType, d.volume.MountOptions, readOnly
		if g := d.volume.FSGroup; g != nil {
			req.Disk.SetGroup, req.Disk.Group = true, *g
		}
	}
	if _, err := s.guest.CreateVolume(gctx, req); err != nil {
		return fmt.Errorf("mounting in the guest: %w", err)
	}
	return nil
}

// open asks the agent.
func (s *Set) open(ctx context.Context, volume string) (attach.Opened, error) {
	return Ask(ctx, s.cfg.RunDir, attach.OpenRequest{Volume: volume, Pod: s.pod})
}

// plug gives the volume's files, or what it takes to reach Ceph, to QEMU.
func (s *Set) plug(ctx context.Context, d *disk, opened attach.Opened, readOnly bool) error {
	v, err := Volume(opened, readOnly)
	defer CloseVolume(v)
	if err != nil {
		return err
	}
	v.Serial = d.serial
	if _, err := s.machine.AddVolume(ctx, v); err != nil {
		return err
	}
	d.layers, d.size = opened.Disk.Layers, opened.Disk.Size
	if readOnly {
		return nil
	}
	// It may have been decided to grow the volume while nobody had it open.
	return s.machine.ResizeVolume(ctx, d.serial, d.size)
}

// Release takes all volumes away; no more can come. When it returns without an error they are closed. The
// containers must have ended. It is called again when QEMU has ended, which closes what is left.
func (s *Set) Release(ctx context.Context) error {
	s.end()
	s.attaching.Lock()
	defer s.attaching.Unlock()
	s.mu.Lock()
	all := maps.Clone(s.disks) // no more can come
	s.mu.Unlock()
	if len(all) == 0 {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	var errs []error
	if err := s.unmount(ctx, all); err != nil {
		errs = append(errs, fmt.Errorf("unmounting volumes in the guest: %w", err))
	}
	for name, d := range all {
		d.mu.Lock() // for a change that is under way
		err := s.remove(ctx, d)
		d.mu.Unlock()
		if err != nil {
			errs = append(errs, err) // the record says so until QEMU has ended
			continue
		}
		s.forget(name, d)
	}
	return errors.Join(errs...)
}

// unmount has the guest write everything out and let go of the volumes.
func (s *Set) unmount(ctx context.Context, all map[string]*disk) error {
	timeout := releaseTimeout
	if s.machine.Stalled() {
		timeout = stalledTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req := &guestv1.ReleaseVolumesRequest{Kill: true}
	for _, d := range all {
		req.Ids = append(req.Ids, d.id)
		// What is written now is the last of it, and the pod waits.
		if err := s.machine.LimitVolume(ctx, d.serial, vm.Limits{}); err != nil && !errors.Is(err, vm.ErrExited) {
			slog.Warn("lifting limits of a volume that is released", "volume", d.volume.ID, "error", err)
		}
	}
	_, err := s.guest.ReleaseVolumes(ctx, req)
	return err
}

// forget forgets a volume that is closed.
func (s *Set) forget(name string, d *disk) {
	s.mu.Lock()
	delete(s.disks, name)
	s.mu.Unlock()
	if err := s.records.Remove(d.volume.ID, s.pod); err != nil {
		slog.Warn("forgetting open volume", "volume", d.volume.ID, "error", err)
	}
}
