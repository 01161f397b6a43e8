package volumes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
)

// guest keeps what the real one would.
type guest struct {
	mu      sync.Mutex
	volumes map[string]*guestv1.CreateVolumeRequest
	files   map[string]map[string]*guestv1.File
	staged  map[string]map[string]*guestv1.File
	commits map[string]int
	log     []byte
	stats   *guestv1.StatsResponse
	asked   int // for stats
	refuse  int // so many PutFiles
}

func newGuest() *guest {
	return &guest{
		volumes: map[string]*guestv1.CreateVolumeRequest{}, files: map[string]map[string]*guestv1.File{},
		staged: map[string]map[string]*guestv1.File{}, commits: map[string]int{},
	}
}

func (g *guest) CreateVolume(_ context.Context, r *guestv1.CreateVolumeRequest) (*guestv1.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.volumes[r.Id] != nil {
		return nil, errors.New("volume exists")
	}
	g.volumes[r.Id] = r
	g.files[r.Id] = map[string]*guestv1.File{}
	return &guestv1.Empty{}, nil
}

func (g *guest) PutFiles(_ context.Context, r *guestv1.PutFilesRequest) (*guestv1.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refuse > 0 {
		g.refuse--
		return nil, errors.New("the guest does not answer")
	}
	if g.staged[r.Volume] == nil {
		g.staged[r.Volume] = map[string]*guestv1.File{}
		if !r.Replace {
			maps.Copy(g.staged[r.Volume], g.files[r.Volume])
		}
	}
	total := 0
	for _, f := range r.Files {
		total += len(f.Data)
		if f.Append {
			f.Data = append(g.staged[r.Volume][f.Path].Data, f.Data...)
		}
		g.staged[r.Volume][f.Path] = f
	}
	if total > channel.MaxFrame {
		return nil, fmt.Errorf("frame of %d bytes", total)
	}
	if r.Commit {
		g.files[r.Volume] = g.staged[r.Volume]
		delete(g.staged, r.Volume)
		g.commits[r.Volume]++
	}
	return &guestv1.Empty{}, nil
}

func (g *guest) GetFile(_ context.Context, r *guestv1.GetFileRequest) (*guestv1.GetFileResponse, error) {
	if r.Volume != PodVolume || r.Path != "termination/c1" {
		return nil, errors.New("no such file")
	}
	return &guestv1.GetFileResponse{Data: g.log}, nil
}

func (g *guest) Stats(context.Context, *guestv1.StatsRequest) (*guestv1.StatsResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked++
	return g.stats, nil
}

func (g *guest) data(volume, path string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	f := g.files[volume][path]
	if f == nil {
		return "<none>"
	}
	return string(f.Data)
}

// host is a kubelet's directory with one pod.
type host struct {
	t    *testing.T
	root string
	pod  string
}

func newHost(t *testing.T) host {
	t.Helper()
	root := t.TempDir()
	h := host{t: t, root: root, pod: filepath.Join(root, "pods", testUID)}
	h.write("etc-hosts", "127.0.0.1 localhost")
	h.write("containers/main/aabbccdd", "")
	if err := os.MkdirAll(filepath.Join(h.pod, "volumes/kubernetes.io~empty-dir/cache"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(h.pod, "volumes/kubernetes.io~empty-dir/cache"), 0o777|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	h.publish("cm", "..1", map[string]string{"key": "one", "sub/deep": "x"})
	return h
}

func (h host) write(name, data string) {
	h.t.Helper()
	p := filepath.Join(h.pod, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(data), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// publish writes a volume as the kubelet's AtomicWriter does.
func (h host) publish(volume, dir string, files map[string]string) {
	h.t.Helper()
	base := "volumes/kubernetes.io~configmap/" + volume
	for name, data := range files {
		h.write(filepath.Join(base, dir, name), data)
	}
	root := filepath.Join(h.pod, base)
	for name := range files {
		top, _, _ := bytes.Cut([]byte(name), []byte("/"))
		_ = os.Symlink(filepath.Join("..data", string(top)), filepath.Join(root, string(top)))
	}
	tmp := filepath.Join(root, "..data_tmp")
	if err := os.Symlink(dir, tmp); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(root, "..data")); err != nil {
		h.t.Fatal(err)
	}
}

func (h host) mounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/etc/hosts", Source: filepath.Join(h.pod, "etc-hosts")},
		{Destination: "/dev/termination-log", Source: filepath.Join(h.pod, "containers/main/aabbccdd")},
		{Destination: "/cache", Source: filepath.Join(h.pod, "volumes/kubernetes.io~empty-dir/cache")},
		{Destination: "/cm", Source: filepath.Join(h.pod, "volumes/kubernetes.io~configmap/cm")},
		{Destination: "/data", Source: "/c/cri/containers/c1/volumes/00ff"},
	}
}

func (h host) set(g Guest) *Set {
	return New(g, nil, Roots{Kubelet: h.root, Containerd: "/c"})
}

func TestPrepare(t *testing.T) {
	h, g := newHost(t), newGuest()
	s := h.set(g)
	c, err := s.Prepare(t.Context(), "c1", h.mounts())
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"pod/hosts", "pod/termination/c1", "v-cache", "v-cm", "i-00ff"} {
		if got, err := c.Bind(h.mounts()[i]); err != nil || got != "/run/atoll/volumes/"+want {
			t.Errorf("mount %d: got %q, %v", i, got, err)
		}
	}
	if v := g.volumes["v-cache"]; v.Kind != guestv1.CreateVolumeRequest_SCRATCH || v.Mode != 0o2777 {
		t.Errorf("emptyDir: %v", v)
	}
	if len(c.Filled) != 1 || c.Filled[0].Volume != "i-00ff" || c.Filled[0].ImagePath != "/data" {
		t.Errorf("image volumes: %v", c.Filled)
	}
	for path, want := range map[string]string{"..1/key": "one", "..1/sub/deep": "x", "none": "<none>"} {
		if got := g.data("v-cm", path); got != want {
			t.Errorf("%s: got %q", path, got)
		}
	}
	if f := g.files["v-cm"]["..data"]; f.Target != "..1" || f.Mode&unix.S_IFMT != unix.S_IFLNK {
		t.Errorf("..data: %v", f)
	}
	if g.data("pod", "hosts") != "127.0.0.1 localhost" {
		t.Error("hosts was not sent")
	}
	// A second container finds everything there; nothing is sent twice.
	if _, err := s.Prepare(t.Context(), "c2", h.mounts()); err != nil {
		t.Fatal(err)
	}
	if g.commits["v-cm"] != 1 || g.commits["pod"] != 2 {
		t.Errorf("commits: %v", g.commits)
	}
	if _, err := c.Bind(specs.Mount{Source: "/other"}); err == nil {
		t.Error("an unknown mount has a guest path")
	}
	if _, err := s.Prepare(t.Context(), "c3", []specs.Mount{{Destination: "/x", Source: "/srv"}}); err == nil {
		t.Error("a host path was accepted")
	}
}

func TestBegin(t *testing.T) {
	h, g := newHost(t), newGuest()
	s := h.set(g)
	s.Begin(t.Context(), map[string][]byte{"hostname": []byte("web-0\n")})
	for _, id := range []string{"c1", "c2"} {
		if _, err := s.Prepare(t.Context(), id, h.mounts()[:1]); err != nil {
			t.Fatal(err)
		}
	}
	if g.data("pod", "hostname") != "web-0\n" || g.data("pod", "hosts") != "127.0.0.1 localhost" {
		t.Errorf("files %v", g.files["pod"])
	}
	g.volumes["pod"] = nil
	s = h.set(failing{g})
	s.Begin(t.Context(), nil)
	for range 2 {
		if _, err := s.Prepare(t.Context(), "c1", nil); !errors.Is(err, errNoSpace) {
			t.Errorf("got %v", err)
		}
	}
}

var errNoSpace = errors.New("no space")

// failing is a guest that makes no volumes.
type failing struct{ *guest }

func (failing) CreateVolume(context.Context, *guestv1.CreateVolumeRequest) (*guestv1.Empty, error) {
	return nil, errNoSpace
}

// TestBeginAgain: a guest that was late once gets the files with the next container.
func TestBeginAgain(t *testing.T) {
	h, g := newHost(t), newGuest()
	s := h.set(&late{guest: g})
	s.Begin(t.Context(), map[string][]byte{"hostname": []byte("web-0\n")})
	if _, err := s.Prepare(t.Context(), "c1", nil); err != nil {
		t.Fatal(err)
	}
	if got := g.data("pod", "hostname"); got != "web-0\n" {
		t.Errorf("hostname %q", got)
	}
}

// late is a guest that does not answer the first time.
type late struct {
	*guest
	asked bool
}

func (g *late) PutFiles(ctx context.Context, r *guestv1.PutFilesRequest) (*guestv1.Empty, error) {
	if !g.asked {
		g.asked = true
		return nil, context.DeadlineExceeded
	}
	return g.guest.PutFiles(ctx, r)
}

func TestTerminationLog(t *testing.T) {
	h, g := newHost(t), newGuest()
	s := h.set(g)
	c, err := s.Prepare(t.Context(), "c1", h.mounts())
	if err != nil {
		t.Fatal(err)
	}
	g.log = []byte("out of cheese")
	if err := s.SaveTerminationLog(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(h.pod, "containers/main/aabbccdd")
	if got, err := os.ReadFile(log); err != nil || string(got) != "out of cheese" {
		t.Fatalf("got %q, %v", got, err)
	}
	g.log = make([]byte, maxTerminationLog+1)
	if err := s.SaveTerminationLog(t.Context(), c); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a guest that answers too much: %v", err)
	}
	g.log = []byte("x")
	if err := os.Remove(log); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", log); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveTerminationLog(t.Context(), c); err == nil {
		t.Error("wrote through a link")
	}
	_ = os.Remove(log)
	if err := s.SaveTerminationLog(t.Context(), c); err != nil {
		t.Errorf("log is gone: %v", err)
	}
	if err := s.SaveTerminationLog(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestLiveUpdate(t *testing.T) {
	for _, mode := range []string{"inotify", "poll", "a guest that does not answer at first"} {
		t.Run(mode, func(t *testing.T) {
			h, g := newHost(t), newGuest()
			s := h.set(g)
			if mode != "inotify" {
				s.watch.interval = 5 * time.Millisecond
			}
			if mode == "poll" {
				s.watch.inotify = func() *inotify { return nil }
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			if _, err := s.Prepare(ctx, "c1", h.mounts()); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(mode, "a guest") {
				g.mu.Lock()
				g.refuse = 3
				g.mu.Unlock()
			}
			h.publish("cm", "..2", map[string]string{"key": "two", "new": "n"})
			deadline := time.Now().Add(time.Minute)
			for g.data("v-cm", "..2/key") != "two" || g.data("v-cm", "..2/new") != "n" {
				if time.Now().After(deadline) {
					t.Fatal("the change did not arrive")
				}
				time.Sleep(5 * time.Millisecond)
			}
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
}

func TestLargeConfigMap(t *testing.T) {
	h, g := newHost(t), newGuest()
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	h.publish("big", "..1", map[string]string{"a": string(big), "b": string(big[:1000]), "c": string(big)})
	s := h.set(g)
	m := []specs.Mount{{Destination: "/big", Source: filepath.Join(h.pod, "volumes/kubernetes.io~configmap/big")}}
	if _, err := s.Prepare(t.Context(), "c1", m); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"a": string(big), "b": string(big[:1000]), "c": string(big)} {
		if got := g.data("v-big", "..1/"+name); got != want {
			t.Errorf("%s: %d bytes arrived of %d", name, len(got), len(want))
		}
	}
}

func TestTreeBounds(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(maxTreeBytes + 1); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	if _, err := ReadTree(dir); !errors.Is(err, ErrTooLarge) {
		t.Errorf("large file: %v", err)
	}
	_ = os.Remove(f.Name())
	deep := dir
	for range maxTreeDepth + 2 {
		deep = filepath.Join(deep, "d")
	}
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadTree(dir); !errors.Is(err, ErrTooLarge) {
		t.Errorf("deep tree: %v", err)
	}
	if _, err := ReadTree(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func TestRequests(t *testing.T) {
	reqs := Requests("v", nil, true)
	if len(reqs) != 1 || !reqs[0].Commit || !reqs[0].Replace {
		t.Fatalf("empty tree: %v", reqs)
	}
	var files []*guestv1.File
	for i := range 5000 {
		files = append(files, &guestv1.File{Path: fmt.Sprintf("%0700d", i)})
	}
	reqs = Requests("v", files, true)
	if len(reqs) < 2 {
		t.Fatal("3.5 MB of names went into one message")
	}
	n := 0
	for i, r := range reqs {
		n += len(r.Files)
		if r.Replace != (i == 0) || r.Commit != (i == len(reqs)-1) {
			t.Errorf("request %d: replace %v commit %v", i, r.Replace, r.Commit)
		}
	}
	if n != len(files) {
		t.Errorf("%d files", n)
	}
}

func FuzzInotify(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, '.', '.', 'd', 'a', 't', 'a', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(_ *testing.T, b []byte) {
		(&inotify{dirs: map[int32]string{1: "d"}}).switched(b)
	})
}

// slowDisks takes its time to mount a volume.
type slowDisks struct {
	Disks

	called, hold chan struct{}
}

func (d slowDisks) Mount(context.Context, string) (string, error) {
	close(d.called)
	<-d.hold
	return "d-pvc", nil
}

// TestSlowDisk: while a disk is being attached, other containers start and ConfigMaps follow changes.
func TestSlowDisk(t *testing.T) {
	h, g := newHost(t), newGuest()
	d := slowDisks{called: make(chan struct{}), hold: make(chan struct{})}
	s := New(g, d, Roots{Kubelet: h.root, Containerd: "/c"})
	pvc := specs.Mount{Destination: "/pvc", Source: filepath.Join(h.pod, "volumes/kubernetes.io~csi/pvc/mount")}
	done := make(chan error, 1)
	go func() {
		c, err := s.Prepare(context.Background(), "c2", append(h.mounts(), pvc))
		if err == nil {
			_, err = c.Bind(pvc)
		}
		done <- err
	}()
	<-d.called
	others := make(chan error, 1)
	go func() {
		_, err := s.Prepare(context.Background(), "c1", h.mounts())
		h.publish("cm", "..2", map[string]string{"key": "two"})
		others <- errors.Join(err, s.refresh(context.Background(), h.mounts()[3].Source))
	}()
	select {
	case err := <-others:
		if err != nil || g.data("v-cm", "..2/key") != "two" {
			t.Errorf("%v, %q", err, g.data("v-cm", "..2/key"))
		}
	case <-time.After(time.Minute):
		t.Error("others wait for the disk")
	}
	close(d.hold)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
