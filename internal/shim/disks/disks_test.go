package disks

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/vm"
)

// fake is a machine and its guest.
type fake struct {
	mu      sync.Mutex
	calls   []string
	fail    map[string]error // by call
	blank   bool
	stalled bool
	stalls  bool          // while it is asked what a volume holds
	hold    chan struct{} // CreateVolume waits for it
	writing chan struct{} // ReleaseVolumes waits for it
}

func (f *fake) call(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, name)
	return f.fail[name]
}

func (f *fake) said() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { f.calls = nil }()
	return strings.Join(f.calls, " ")
}

func (f *fake) AddVolume(context.Context, vm.Volume) (int, error) { return 0, f.call("add") }
func (f *fake) SnapshotVolume(_ context.Context, _ string, _, _ vm.Layer) error {
	return f.call("snapshot")
}
func (f *fake) ResizeVolume(context.Context, string, int64) error    { return f.call("resize") }
func (f *fake) LimitVolume(context.Context, string, vm.Limits) error { return f.call("limit") }
func (f *fake) RemoveVolume(context.Context, string) error           { return f.call("remove") }
func (f *fake) OnGoingOn(func())                                     {}
func (f *fake) Stalled() bool                                        { return f.stalled }

func (f *fake) ProbeDisk(context.Context, *guestv1.ProbeDiskRequest) (*guestv1.ProbeDiskResponse, error) {
	return &guestv1.ProbeDiskResponse{Blank: f.blank, Major: 8, Minor: 16}, f.call("probe")
}

func (f *fake) WriteDisk(context.Context, *guestv1.WriteDiskRequest) (*guestv1.Empty, error) {
	return nil, f.call("write")
}

func (f *fake) CreateVolume(_ context.Context, r *guestv1.CreateVolumeRequest) (*guestv1.Empty, error) {
	if f.hold != nil {
		<-f.hold
	}
	return nil, f.call("create:" + r.GetKind().String())
}

func (f *fake) GrowVolume(context.Context, *guestv1.GrowVolumeRequest) (*guestv1.GrowVolumeResponse, error) {
	return nil, f.call("grow")
}

func (f *fake) StatVolume(context.Context, *guestv1.StatVolumeRequest) (*guestv1.VolumeUsage, error) {
	const absurd = 1 << 63
	if f.stalls {
		f.stalled = true
		return nil, context.DeadlineExceeded
	}
	return &guestv1.VolumeUsage{UsedBytes: absurd, CapacityBytes: 100, AvailableBytes: 90, Inodes: 5}, f.call("stat")
}

func (f *fake) ReleaseVolumes(_ context.Context, r *guestv1.ReleaseVolumesRequest) (*guestv1.Empty, error) {
	if !r.GetKill() {
		return nil, errors.New("without kill")
	}
	err := f.call("release")
	if f.writing != nil {
		<-f.writing
	}
	return nil, err
}

// newSet makes a pod with one published volume, "pvc" ("store/v"), and an agent that opens it.
func newSet(t *testing.T, f *fake, v handover.Volume) *Set {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{Kubelet: filepath.Join(dir, "kubelet"), RunDir: dir, Socket: filepath.Join(dir, "shim"), Scratch: dir}
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := v.Write(handover.PublishedVolume(cfg.Kubelet, "pod", "pvc")); err != nil {
		t.Fatal(err)
	}
	l, err := attach.Listen(attach.AgentSocket(dir))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go func() {
		_ = attach.Serve(ctx, l, map[string]attach.Handler{
			attach.MethodOpen: attach.Handle(func(_ context.Context, r attach.OpenRequest) (attach.Opened, error) {
				if r.Volume != "store/v" || r.Pod != "pod" {
					return attach.Opened{}, attach.ErrNotFound
				}
				return attach.Opened{Disk: handover.Disk{Size: 32 << 20, Layers: []handover.Layer{{ID: "l", File: image, Format: handover.FormatQCOW2}}}}, nil
			}),
		})
	}()
	s := New(cfg, "pod", f, f)
	t.Cleanup(func() { _ = s.Release(context.Background()) })
	return s
}

func TestMountOnce(t *testing.T) {
	f := &fake{}
	s := newSet(t, f, handover.Volume{ID: "store/v", FSType: "ext4"})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if id, err := s.Mount(t.Context(), "pvc"); id != "d-pvc" || err != nil {
				t.Errorf("%q, %v", id, err)
			}
		})
	}
	wg.Wait()
	if got := f.said(); got != "add resize probe create:DISK" {
		t.Errorf("did %q", got)
	}
	if err := s.Release(t.Context()); err != nil || f.said() != "limit release remove" {
		t.Error(err)
	}
	if _, err := s.Mount(t.Context(), "pvc"); err == nil {
		t.Error("mounted after the end")
	}
}

// TestUndo: whatever fails, nothing is left open and it can be tried again.
func TestUndo(t *testing.T) {
	bad := errors.New("bad")
	for call, want := range map[string]string{
		"add": "add remove", "resize": "add resize remove", "probe": "add resize probe remove",
		"write": "add resize probe write remove", "create:DISK": "add resize probe write create:DISK remove",
	} {
		f := &fake{fail: map[string]error{call: bad}, blank: true}
		s := newSet(t, f, handover.Volume{ID: "store/v", FSType: "ext4"})
		if _, err := s.Mount(t.Context(), "pvc"); !errors.Is(err, bad) {
			t.Errorf("%s: %v", call, err)
		}
		if got := f.said(); got != want {
			t.Errorf("%s: did %q, want %q", call, got, want)
		}
		if rec, err := s.records.Find("store/v"); len(rec) != 0 || err != nil {
			t.Errorf("%s: records %v, %v", call, rec, err)
		}
		f.fail = nil
		if _, err := s.Mount(t.Context(), "pvc"); err != nil {
			t.Errorf("%s: again: %v", call, err)
		}
	}
}

// TestNotUndone: while QEMU may have a volume open the record says so, and nobody may use it.
func TestNotUndone(t *testing.T) {
	bad := errors.New("bad")
	for _, call := range []string{"add", "resize", "probe", "create:DISK"} {
		f := &fake{fail: map[string]error{call: bad, "remove": bad}}
		s := newSet(t, f, handover.Volume{ID: "store/v", FSType: "ext4"})
		for range 2 {
			if d, err := s.Mount(t.Context(), "pvc"); d != "" || !errors.Is(err, bad) {
				t.Errorf("%s: %q, %v", call, d, err)
			}
		}
		if rec, err := s.records.Find("store/v"); len(rec) != 1 || err != nil {
			t.Errorf("%s: records %v, %v", call, rec, err)
		}
		if _, err := s.snapshot(t.Context(), attach.SnapshotRequest{Volume: "store/v"}); !errors.Is(err, attach.ErrNotFound) {
			t.Errorf("%s: a snapshot of it: %v", call, err)
		}
		f.said()
		f.fail = map[string]error{"remove": map[string]error{"probe": vm.ErrExited, "add": vm.ErrNoVolume}[call]}
		if call == "resize" {
			if _, err := s.Mount(t.Context(), "pvc"); err != nil || f.said() != "remove add resize probe create:DISK" {
				t.Errorf("%s: again: %v", call, err)
			}
		}
		if err := s.Release(t.Context()); err != nil || f.said() != "limit release remove" {
			t.Errorf("%s: releasing: %v", call, err)
		}
		if rec, err := s.records.Find("store/v"); len(rec) != 0 || err != nil {
			t.Errorf("%s: records in the end %v, %v", call, rec, err)
		}
	}
}

func TestRefused(t *testing.T) {
	f := &fake{blank: true}
	s := newSet(t, f, handover.Volume{ID: "store/v", FSType: "ext4", ReadOnly: true})
	if _, err := s.Mount(t.Context(), "other"); !errors.Is(err, ErrUnpublished) {
		t.Errorf("not published: %v", err)
	}
	if _, err := s.Mount(t.Context(), "pvc"); err == nil || !strings.Contains(err.Error(), "no file system yet") {
		t.Errorf("blank and read-only: %v", err)
	}
	s = newSet(t, f, handover.Volume{ID: "store/w"})
	if _, err := s.Mount(t.Context(), "pvc"); !errors.Is(err, attach.ErrNotFound) {
		t.Errorf("not known to the agent: %v", err)
	}
}

// TestDeepest: a micro-VM opens whatever the engine can make.
func TestDeepest(t *testing.T) {
	if vm.MaxLayers <= handover.MaxLayers {
		t.Errorf("a micro-VM takes %d layers, a chain may have %d and one that is being added", vm.MaxLayers, handover.MaxLayers)
	}
}

func TestBlock(t *testing.T) {
	f := &fake{blank: true}
	s := newSet(t, f, handover.Volume{ID: "store/v", Block: &handover.Device{Major: 7, Minor: 3}})
	if _, err := s.Mount(t.Context(), "pvc"); err == nil {
		t.Error("a block volume was mounted")
	}
	if _, ok, err := s.Device(t.Context(), handover.Device{Major: 7, Minor: 4}); ok || err != nil {
		t.Errorf("a device of the host: %v, %v", ok, err)
	}
	for range 2 {
		if d, ok, err := s.Device(t.Context(), handover.Device{Major: 7, Minor: 3}); !ok || err != nil || d != (handover.Device{Major: 8, Minor: 16}) {
			t.Errorf("%v, %v, %v", d, ok, err)
		}
	}
	if got := f.said(); got != "add resize probe create:BLOCK" {
		t.Errorf("did %q", got)
	}
}

// TestBusy: while a volume is being opened the agent learns that it is not known, and does not wait.
func TestBusy(t *testing.T) {
	f := &fake{hold: make(chan struct{})}
	s := newSet(t, f, handover.Volume{ID: "store/v", FSType: "ext4"})
	done := make(chan error, 1)
	go func() {
		_, err := s.Mount(context.Background(), "pvc")
		done <- err
	}()
	for { // until it is on its way
		f.mu.Lock()
		n := len(f.calls)
		f.mu.Unlock()
		if n >= 3 {
			break
		}
	}
	err := attach.Call(t.Context(), s.cfg.Socket, attach.MethodSnapshot, attach.SnapshotRequest{Volume: "store/v"}, nil)
	if !errors.Is(err, attach.ErrNotFound) {
		t.Errorf("snapshot of a volume that is being opened: %v", err)
	}
	close(f.hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var st attach.Stats
	if err := attach.Call(t.Context(), s.cfg.Socket, attach.MethodStats, attach.VolumeRequest{Volume: "store/v"}, &st); err != nil || st.Capacity != 100 || st.Bytes > 1<<50 {
		t.Errorf("%+v, %v", st, err)
	}
	f.stalls = true
	if err := attach.Call(t.Context(), s.cfg.Socket, attach.MethodStats, attach.VolumeRequest{Volume: "store/v"}, &st); err != nil || !st.Stalled {
		t.Errorf("of a machine that stalls meanwhile: %+v, %v", st, err)
	}
}

// TestReleaseIsSlow: while the guest writes out, whoever else wants something learns that the volume is going.
func TestReleaseIsSlow(t *testing.T) {
	f := &fake{writing: make(chan struct{})}
	s := newSet(t, f, handover.Volume{ID: "store/v", FSType: "ext4"})
	if _, err := s.Mount(t.Context(), "pvc"); err != nil {
		t.Fatal(err)
	}
	released := make(chan error, 1)
	go func() { released <- s.Release(context.Background()) }()
	for said := ""; !strings.Contains(said, "release"); {
		said += f.said()
	}
	others := make(chan error, 2)
	go func() {
		_, err := s.status(context.Background(), attach.VolumeRequest{Volume: "store/v"})
		others <- err
		_, err = s.Mount(context.Background(), "pvc")
		others <- err
	}()
	for _, want := range []string{"not known", "ending"} {
		select {
		case err := <-others:
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
		case <-time.After(time.Minute):
			t.Errorf("waits for the guest; want %q", want)
		}
	}
	close(f.writing)
	if err := <-released; err != nil || f.said() != "remove" {
		t.Error(err)
	}
}
