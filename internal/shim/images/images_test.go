package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/vm"
)

// fake is a machine with a guest in it. It fails when a disk is changed under a mount.
type fake struct {
	t *testing.T

	mu      sync.Mutex
	disks   map[string]string // path by serial
	mounted map[string]string // serial by image id
	fail    error             // of the next mounts
	stuck   bool              // unmounts fail
	hold    chan struct{}     // mounts wait for it
	adds    int
}

func newFake(t *testing.T) *fake {
	return &fake{t: t, disks: map[string]string{}, mounted: map[string]string{}}
}

func (f *fake) plug(serial, path string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.disks[serial] != "" {
		return fmt.Errorf("disk %s is taken", serial)
	}
	f.disks[serial] = path
	f.adds++
	return nil
}

func (f *fake) unplug(serial string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, s := range f.mounted {
		if s == serial {
			f.t.Errorf("disk %s is taken away while %s is mounted", serial, id)
		}
	}
	if f.disks[serial] == "" {
		return fmt.Errorf("no disk %s", serial)
	}
	delete(f.disks, serial)
	return nil
}

func (f *fake) AttachImage(_ context.Context, serial string, file *os.File) error {
	return f.plug(serial, file.Name())
}
func (f *fake) DetachImage(_ context.Context, serial string) error { return f.unplug(serial) }
func (f *fake) RemoveDisk(_ context.Context, serial string) error  { return f.unplug(serial) }
func (f *fake) HotAddDisk(_ context.Context, d vm.Disk) (int, error) {
	if !d.ReadOnly {
		f.t.Error("image disk is writable")
	}
	return 0, f.plug(d.Serial, d.File.Name())
}

func (f *fake) MountImage(_ context.Context, r *guestv1.MountImageRequest) (*guestv1.Empty, error) {
	if f.hold != nil {
		<-f.hold
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	if f.disks[r.Serial] == "" {
		return nil, fmt.Errorf("no disk %s", r.Serial)
	}
	f.mounted[r.Id] = r.Serial
	return &guestv1.Empty{}, nil
}

func (f *fake) UnmountImage(_ context.Context, r *guestv1.UnmountImageRequest) (*guestv1.Empty, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stuck {
		return nil, errors.New("device is busy")
	}
	if f.mounted[r.Id] == "" {
		return nil, errdefs.ErrNotFound
	}
	delete(f.mounted, r.Id)
	return &guestv1.Empty{}, nil
}

func file(t *testing.T, name string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestSharedByContainers(t *testing.T) {
	f := newFake(t)
	s := New(f, f)
	path := file(t, "a.erofs")
	ids := make([]string, 20)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			var err error
			if ids[i], err = s.Acquire(t.Context(), path); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if f.adds != 1 {
		t.Errorf("attached %d times", f.adds)
	}
	for i, id := range ids {
		if id != ids[0] {
			t.Errorf("ids %q and %q", id, ids[0])
		}
		if err := s.Release(t.Context(), id); err != nil {
			t.Error(err)
		}
		if last := i == len(ids)-1; (len(f.disks) == 0) != last {
			t.Errorf("after %d releases %d disks", i+1, len(f.disks))
		}
	}
	if again, err := s.Acquire(t.Context(), path); err != nil || again == ids[0] {
		t.Errorf("attached anew as %q, %v", again, err)
	}
}

func TestOverflowToSCSI(t *testing.T) {
	f := newFake(t)
	s := New(f, f)
	var ids []string
	for i := range vm.ImageSlots + 5 {
		id, err := s.Acquire(t.Context(), file(t, fmt.Sprint(i)))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if len(f.disks) != vm.ImageSlots+5 {
		t.Fatalf("disks: %v", f.disks)
	}
	for _, id := range ids {
		if err := s.Release(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.disks) != 0 || s.slots != [vm.ImageSlots]bool{} {
		t.Errorf("left: %v %v", f.disks, s.slots)
	}
}

func TestStuckSlotIsNotUsedAgain(t *testing.T) {
	f := newFake(t)
	s := New(f, f)
	a, b := file(t, "a"), file(t, "b")
	id, err := s.Acquire(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	f.stuck = true
	if err := s.Release(t.Context(), id); err == nil {
		t.Fatal("released although the guest did not unmount")
	}
	f.stuck = false
	if _, err := s.Acquire(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if f.disks["img0"] != a || f.disks["img1"] != b {
		t.Errorf("disks: %v", f.disks)
	}
}

func TestFailures(t *testing.T) {
	f := newFake(t)
	s := New(f, f)
	if _, err := s.Acquire(t.Context(), "/no/such/image"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing image: %v", err)
	}
	boom := errors.New("bad superblock")
	f.fail = boom
	path := file(t, "bad")
	if _, err := s.Acquire(t.Context(), path); !errors.Is(err, boom) {
		t.Errorf("bad image: %v", err)
	}
	if len(f.disks) != 0 {
		t.Errorf("left: %v", f.disks)
	}
	f.fail = nil
	if _, err := s.Acquire(t.Context(), path); err != nil {
		t.Errorf("second try: %v", err)
	}
	if err := s.Release(t.Context(), "unknown"); err != nil {
		t.Error(err)
	}
}

// TestWaiterGivesUp: one that did not wait for the end of another's attempt is no user of the image.
func TestWaiterGivesUp(t *testing.T) {
	f := newFake(t)
	f.hold = make(chan struct{})
	s := New(f, f)
	path := file(t, "a.erofs")
	first := make(chan string, 1)
	go func() {
		id, err := s.Acquire(context.Background(), path)
		if err != nil {
			t.Error(err)
		}
		first <- id
	}()
	for users := 0; users == 0; {
		s.mu.Lock()
		users = len(s.images)
		s.mu.Unlock()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Acquire(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("gave up: %v", err)
	}
	close(f.hold)
	if err := s.Release(t.Context(), <-first); err != nil {
		t.Error(err)
	}
	if len(f.mounted) != 0 || len(f.disks) != 0 {
		t.Errorf("left: %v, %v", f.mounted, f.disks)
	}
}
