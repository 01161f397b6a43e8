// Package images gives container images to a guest: EROFS files on the host become read-only disks of
// the virtual machine and are mounted there.
//
// An image used by several containers of the pod is attached once. The machine has a few preplugged
// disks whose content can be swapped, which is fast; images beyond those are hot-added as SCSI disks.
// The package neither makes images nor container root file systems. internal/shim/task calls it when a
// container is created and deleted.
//
// What can go wrong: an image that is missing or no image (the guest cannot mount it), too many images
// (vm.ErrLimit), and a guest that does not confirm an unmount: then its disk is never used again, since
// it would mix two images.
package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/vm"
)

// callTimeout bounds each call to the guest, which may starve among emulated ones.
const callTimeout = 90 * time.Second

// Machine is the part of a virtual machine that images need.
type Machine interface {
	AttachImage(ctx context.Context, serial string, f *os.File) error
	DetachImage(ctx context.Context, serial string) error
	HotAddDisk(ctx context.Context, d vm.Disk) (lun int, err error)
	RemoveDisk(ctx context.Context, serial string) error
}

// Guest is the part of the guest protocol that images need.
type Guest interface {
	MountImage(context.Context, *guestv1.MountImageRequest) (*guestv1.Empty, error)
	UnmountImage(context.Context, *guestv1.UnmountImageRequest) (*guestv1.Empty, error)
}

// Store is the images of one guest.
type Store struct {
	machine Machine
	guest   Guest

	mu     sync.Mutex // guards the fields below, not held over calls
	slots  [vm.ImageSlots]bool
	images map[string]*image // by path
	serial int               // of the last id and hot-added disk
}

// image is an image that the guest has, or is about to have or to lose.
type image struct {
	id    string
	path  string
	slot  int  // -1: hot-added
	stuck bool // the guest may still have it mounted: its disk must not be used again
	users int
	ready chan struct{} // closed when the fields below are final
	err   error
}

// New makes an empty store.
func New(m Machine, g Guest) *Store {
	return &Store{machine: m, guest: g, images: map[string]*image{}}
}

// Acquire makes the image at path available in the guest and returns its id there. Every successful
// call needs a Release.
func (s *Store) Acquire(ctx context.Context, path string) (string, error) {
	for {
		img, mine := s.join(path)
		if mine {
			img.err = s.attach(ctx, img)
			if img.err != nil {
				s.forget(img)
			}
			close(img.ready)
		}
		select {
		case <-img.ready:
		case <-ctx.Done():
			// The others may be gone by now: then this one takes the image away.
			err := s.Release(context.WithoutCancel(ctx), img.id)
			return "", errors.Join(fmt.Errorf("attaching image %s: %w", path, ctx.Err()), err)
		}
		switch {
		case img.err == nil:
			return img.id, nil
		case mine:
			return "", fmt.Errorf("attaching image %s: %w", path, img.err)
		}
		// Another container's attempt failed, perhaps because its request was cancelled.
	}
}

// join adds a user to the image, or makes a new one that the caller must attach.
func (s *Store) join(path string) (img *image, mine bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if img := s.images[path]; img != nil {
		img.users++
		return img, false
	}
	s.serial++
	img = &image{
		id: fmt.Sprintf("image%d", s.serial), path: path, slot: -1, users: 1,
		ready: make(chan struct{}),
	}
	for i := range s.slots {
		if !s.slots[i] {
			s.slots[i], img.slot = true, i
			break
		}
	}
	s.images[path] = img
	return img, true
}

// forget takes an image out of the store and frees its slot.
func (s *Store) forget(img *image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if img.slot >= 0 && !img.stuck {
		s.slots[img.slot] = false
	}
	delete(s.images, img.path)
}

// serialOf is the serial number by which the guest finds the image's disk.
func (img *image) serialOf() string {
	if img.slot >= 0 {
		return vm.SlotSerial(img.slot)
	}
	return img.id
}

func (s *Store) attach(ctx context.Context, img *image) error {
	f, err := os.Open(img.path)
	if err != nil {
		return err
	}
	defer f.Close() // QEMU has its own copy
	if img.slot >= 0 {
		err = s.machine.AttachImage(ctx, img.serialOf(), f)
	} else {
		_, err = s.machine.HotAddDisk(ctx, vm.Disk{Serial: img.serialOf(), File: f, ReadOnly: true})
	}
	if err != nil {
		return err
	}
	mctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = s.guest.MountImage(mctx, &guestv1.MountImageRequest{Id: img.id, Serial: img.serialOf(), FsType: "erofs"})
	if err == nil {
		return nil
	}
	// Whether the guest mounted it is not known: ask it to undo that before the disk is taken away.
	dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	return errors.Join(err, s.detach(dctx, img))
}

// Release gives up one use of an image by its id. The last one unmounts it and frees its disk.
func (s *Store) Release(ctx context.Context, id string) error {
	img := s.leave(id)
	if img == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := s.detach(ctx, img); err != nil {
		slog.Warn("detaching image", "image", img.path, "error", err)
		return fmt.Errorf("detaching image %s: %w", img.path, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if img.slot >= 0 {
		s.slots[img.slot] = false
	}
	return nil
}

// leave removes a user and returns the image if that was the last.
func (s *Store) leave(id string) *image {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, img := range s.images {
		if img.id != id {
			continue
		}
		if img.users--; img.users > 0 {
			return nil
		}
		// From now on the same path is attached anew, on another disk.
		delete(s.images, img.path)
		return img
	}
	return nil
}

// detach takes an image away, unless the guest does not confirm that it is not mounted.
func (s *Store) detach(ctx context.Context, img *image) error {
	_, err := s.guest.UnmountImage(ctx, &guestv1.UnmountImageRequest{Id: img.id})
	if err != nil && !errdefs.IsNotFound(err) {
		img.stuck = true
		return err
	}
	if img.slot >= 0 {
		return s.machine.DetachImage(ctx, img.serialOf())
	}
	return s.machine.RemoveDisk(ctx, img.serialOf())
}
