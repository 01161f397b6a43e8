//go:build integration

package shim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	events "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/shim/cripb"
	"atoll.dev/atoll/internal/vm/vmtest"
)

// These tests need root, QEMU, busybox-static, erofs-utils, a C compiler and a pod kernel (see vmtest).

// host stands for a host with a warm pool, and for containerd and the kubelet on it.
type host struct {
	t       testing.TB
	dir     string
	run     string
	kubelet string
	shim    string       // containerd-shim-atoll-v1
	image   string       // EROFS with busybox
	pool    *poolProcess // shared by the copies of host
	events  chan *events.ForwardRequest
}

// poolProcess is the pool that runs now.
type poolProcess struct{ *exec.Cmd }

// Forward receives events as containerd does.
func (h *host) Forward(_ context.Context, r *events.ForwardRequest) (*emptypb.Empty, error) {
	h.events <- r
	return &emptypb.Empty{}, nil
}

func command(t testing.TB, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// newHost builds everything and starts a pool that keeps warm members.
func newHost(t testing.TB, warm int) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "atoll-shim") //nolint:usetesting // sockets live below it: their paths must stay short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := &host{
		t: t, dir: dir, run: filepath.Join(dir, "run"), kubelet: filepath.Join(dir, "kubelet"),
		shim: filepath.Join(dir, "containerd-shim-atoll-v1"), image: filepath.Join(dir, "busybox.erofs"),
		pool: &poolProcess{}, events: make(chan *events.ForwardRequest, 1000),
	}
	pod := filepath.Join(dir, "atoll-pod")
	command(t, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", pod, "atoll.dev/atoll/cmd/atoll-pod")
	if err := os.Link(pod, h.shim); err != nil {
		t.Fatal(err)
	}
	command(t, "../../guestos/exec/build.sh", filepath.Join(dir, "exec"))
	h.makeImage()
	for _, d := range []string{"run", "data", "kubelet", "containerd"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o711); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]any{
		"runDir": h.run, "dataDir": filepath.Join(dir, "data"), "binary": pod, "kernel": vmtest.Kernel(t),
		"execHelper": filepath.Join(dir, "exec"), "kubelet": h.kubelet, "containerd": filepath.Join(dir, "containerd"),
		"warm": warm, "memoryMiB": 256,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "pool.json"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	h.serveEvents()
	h.startPool()
	t.Cleanup(h.stopPool)
	return h
}

// makeImage makes an EROFS image with a busybox.
func (h *host) makeImage() {
	h.t.Helper()
	root := filepath.Join(h.dir, "root")
	for _, d := range []string{"bin", "etc", "data", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			h.t.Fatal(err)
		}
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		h.t.Fatal(err)
	}
	command(h.t, "cp", busybox, filepath.Join(root, "bin/busybox"))
	for _, name := range []string{"sh", "cat", "echo", "sleep", "ls", "id", "hostname", "wc", "head", "dd", "stat", "uname", "nc", "ip", "mount", "true", "test", "seq", "sha256sum", "kill", "ps", "readlink"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			h.t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "data/seed"), []byte("from the image\n"), 0o644); err != nil {
		h.t.Fatal(err)
	}
	command(h.t, "mkfs.erofs", h.image, root)
}

// serveEvents listens where containerd would.
func (h *host) serveEvents() {
	h.t.Helper()
	l, err := net.Listen("unix", filepath.Join(h.run, "containerd.sock.ttrpc"))
	if err != nil {
		h.t.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		h.t.Fatal(err)
	}
	events.RegisterTTRPCEventsService(srv, h)
	go func() { _ = srv.Serve(context.Background(), l) }()
	h.t.Cleanup(func() { _ = srv.Close() })
}

func (h *host) startPool() {
	h.t.Helper()
	log, err := os.OpenFile(filepath.Join(h.dir, "pool.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	h.pool.Cmd = exec.Command(filepath.Join(h.dir, "atoll-pod"), "pool", "--config", filepath.Join(h.dir, "pool.json"))
	h.pool.Stdout, h.pool.Stderr = log, log
	if err := h.pool.Start(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) stopPool() {
	_ = h.pool.Process.Signal(syscall.SIGTERM)
	_ = h.pool.Wait()
	if err := network.RemovePoolNetns(filepath.Join(h.run, "netns", "pool")); err != nil {
		h.t.Error(err)
	}
	if h.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(h.dir, "pool.log"))
		h.t.Logf("pool and shims:\n%s", log)
	}
}

// waitReady waits until n clones are ready.
func (h *host) waitReady(n int) wire.Status {
	h.t.Helper()
	var last wire.Status
	for deadline := time.Now().Add(5 * time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		s, err := wire.GetStatus(context.Background(), filepath.Join(h.run, "pool.sock"))
		if err == nil && s.Ready >= n {
			return s
		}
		last = s
	}
	h.t.Fatalf("%d clones are not ready: %+v", n, last)
	return last
}

// event waits for an event with the topic and returns its content.
func (h *host) event(topic string, into proto.Message) {
	h.t.Helper()
	for {
		select {
		case r := <-h.events:
			if r.Envelope.Topic != topic {
				continue
			}
			if err := proto.Unmarshal(r.Envelope.Event.Value, into); err != nil {
				h.t.Fatal(err)
			}
			return
		case <-time.After(3 * time.Minute):
			h.t.Fatalf("no event %s", topic)
		}
	}
}

// pod is a sandbox and a client of its shim.
type pod struct {
	*host
	id      string
	uid     string
	conn    *ttrpc.Client
	sandbox sandboxapi.TTRPCSandboxService
	task    taskapi.TTRPCTaskService
	pid     uint32
	closed  chan struct{}
}

// start executes "shim start" as containerd does and connects to the shim. It is tried again if the pool took too long,
// as the kubelet does.
func (h *host) start(id string) *pod {
	h.t.Helper()
	bundle := filepath.Join(h.dir, "containerd", id)
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		h.t.Fatal(err)
	}
	params, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: id, Namespace: "k8s.io",
		ContainerdGrpcAddress:  filepath.Join(h.run, "containerd.sock"),
		ContainerdTtrpcAddress: filepath.Join(h.run, "containerd.sock.ttrpc"),
	})
	if err != nil {
		h.t.Fatal(err)
	}
	var out []byte
	eventually(h.t, "shim start", func() bool {
		cmd := exec.Command(h.shim, "-namespace", "k8s.io", "-id", id, "-address", filepath.Join(h.run, "containerd.sock"), "start")
		cmd.Dir, cmd.Stdin = bundle, bytes.NewReader(params)
		var err error
		if out, err = cmd.CombinedOutput(); err == nil {
			return true
		}
		h.t.Logf("shim start: %v: %s", err, out)
		if !bytes.Contains(out, []byte("asking the warm pool for a micro-VM")) {
			h.t.Fatal("that is not for want of time")
		}
		return false
	})
	var result bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &result); err != nil || result.Version != 3 || result.Protocol != "ttrpc" {
		h.t.Fatalf("shim start printed %q: %v", out, err)
	}
	conn, err := net.Dial("unix", strings.TrimPrefix(result.Address, "unix://"))
	if err != nil {
		h.t.Fatal(err)
	}
	closed := make(chan struct{})
	p := &pod{host: h, id: id, uid: "uid-" + id, closed: closed}
	p.conn = ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(closed) }))
	p.sandbox, p.task = sandboxapi.NewTTRPCSandboxClient(p.conn), taskapi.NewTTRPCTaskClient(p.conn)
	h.t.Cleanup(func() { _ = p.conn.Close() })
	return p
}

// runPod starts a sandbox.
func (h *host) runPod(id string, edit func(*cripb.PodSandboxConfig, *sandboxapi.CreateSandboxRequest)) *pod {
	h.t.Helper()
	p := h.start(id)
	config := &cripb.PodSandboxConfig{
		Metadata:  &cripb.PodSandboxMetadata{Name: id, Namespace: "default", Uid: p.uid},
		Hostname:  "host-" + id,
		DnsConfig: &cripb.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"cluster.local"}},
		Linux: &cripb.LinuxPodSandboxConfig{SecurityContext: &cripb.LinuxSandboxSecurityContext{
			NamespaceOptions: &cripb.NamespaceOption{Pid: cripb.NamespaceMode_CONTAINER},
		}},
	}
	req := &sandboxapi.CreateSandboxRequest{SandboxID: id}
	if edit != nil {
		edit(config, req)
	}
	value, err := proto.Marshal(config)
	if err != nil {
		h.t.Fatal(err)
	}
	req.Options = &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: value}
	if _, err := p.sandbox.CreateSandbox(h.t.Context(), req); err != nil {
		h.t.Fatal(err)
	}
	resp, err := p.sandbox.StartSandbox(h.t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: id})
	if err != nil {
		h.t.Fatal(err)
	}
	p.pid = resp.Pid
	return p
}

// stop removes the sandbox as containerd does.
func (p *pod) stop() {
	p.t.Helper()
	ctx := context.Background()
	e, ok, err := registry.New(p.host.run).Find(p.id)
	if !ok || err != nil {
		p.t.Errorf("no record of %s: %v", p.id, err)
	}
	if _, err := p.sandbox.StopSandbox(ctx, &sandboxapi.StopSandboxRequest{SandboxID: p.id}); err != nil {
		p.t.Error(err)
	}
	if _, err := p.sandbox.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: p.id}); err != nil {
		p.t.Error(err)
	}
	_ = p.conn.Close()
	eventually(p.t, "the shim ends", func() bool { return !alive(e.PID) })
}

// volume is the kubelet's path of a volume.
func (p *pod) volume(plugin, name string) string {
	return filepath.Join(p.kubelet, "pods", p.uid, "volumes", "kubernetes.io~"+plugin, name)
}
