//go:build integration

package shim_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/networktest"
	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/shim/cripb"
)

// TestFaults ends processes one after the other and looks at what is left.
func TestFaults(t *testing.T) {
	h := newHost(t, 2)
	h.waitReady(2)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *host)
	}{
		{"WaitingKilled", testWaitingKilled},
		{"QEMUKilled", testQEMUKilled},
		{"ShimKilled", testShimKilled},
		{"ContainerdRestarts", testContainerdRestarts},
		{"GuestPanics", testGuestPanics},
		{"PoolRestarts", testPoolRestarts},
		{"Burst", testBurst},
		{"NoLeak", testNoLeak},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, h.in(t)) })
	}
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	const patience = 3 * time.Minute
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

// running starts a pod with a container that sleeps.
func (h *host) running(id string) (*pod, *container) {
	h.t.Helper()
	p := h.runPod(id, nil)
	c := p.mustCreate(id+"-c", p.spec("/bin/sleep", "1000"))
	c.start()
	return p, c
}

func (p *pod) shimPID() int {
	p.t.Helper()
	resp, err := p.task.Connect(p.t.Context(), &taskapi.ConnectRequest{ID: p.id})
	if err != nil {
		p.t.Fatal(err)
	}
	return int(resp.ShimPid)
}

// testQEMUKilled: sandbox and containers have exited with 137.
func testQEMUKilled(t *testing.T, h *host) {
	p, c := h.running("qemu-killed")
	if err := unix.Kill(int(p.pid), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	resp, err := p.sandbox.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: p.id})
	if err != nil || resp.ExitStatus != 137 {
		t.Errorf("sandbox: %v, %v", resp, err)
	}
	if status := c.wait(); status != 137 {
		t.Errorf("container: %d", status)
	}
	var exit apievents.TaskExit
	h.event("/tasks/exit", &exit)
	if exit.ContainerID != c.id || exit.ExitStatus != 137 {
		t.Errorf("event: %v", &exit)
	}
	if resp, err := p.sandbox.SandboxStatus(t.Context(), &sandboxapi.SandboxStatusRequest{SandboxID: p.id}); err != nil || resp.State != "SANDBOX_NOTREADY" {
		t.Errorf("state: %v, %v", resp, err)
	}
	if _, err := p.create("too-late", p.spec("/bin/true")); err == nil {
		t.Error("a container was created in a dead micro-VM")
	}
	c.metrics()
	c.delete()
	p.stop()
}

// testShimKilled: QEMU ends with the shim, and "shim delete" removes the rest.
func testShimKilled(t *testing.T, h *host) {
	p, _ := h.running("shim-killed")
	if err := unix.Kill(p.shimPID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.closed
	eventually(t, "QEMU ends with its shim", func() bool { return !alive(int(p.pid)) })
	h.shimDelete(p.id)
	if _, ok, err := registry.New(h.run).Find(p.id); ok || err != nil {
		t.Errorf("record after delete: %v, %v", ok, err)
	}
	h.shimDelete(p.id) // again
	h.shimDelete("no-such-container")
	// A shim that is alive is ended, too.
	q, _ := h.running("shim-deleted")
	pid := q.shimPID()
	h.shimDelete(q.id)
	eventually(t, "shim and QEMU end", func() bool { return !alive(pid) && !alive(int(q.pid)) })
}

// shimDelete executes "shim delete" as containerd does, until it gets done in the time it has.
func (h *host) shimDelete(id string) {
	h.t.Helper()
	var out []byte
	eventually(h.t, "shim delete", func() (done bool) {
		cmd := exec.Command(h.shim, "-namespace", "k8s.io", "-id", id, "-address", filepath.Join(h.run, "containerd.sock"), "-bundle", h.dir, "delete")
		var err error
		if out, err = cmd.Output(); err != nil {
			h.t.Logf("shim delete: %v", err)
		}
		return err == nil
	})
	var resp taskapi.DeleteResponse
	if err := proto.Unmarshal(out, &resp); err != nil || resp.ExitStatus != 137 || resp.ExitedAt == nil {
		h.t.Errorf("shim delete printed %v, %v", &resp, err)
	}
}

// testContainerdRestarts: a new connection finds everything as it was.
func testContainerdRestarts(t *testing.T, h *host) {
	p, c := h.running("reconnect")
	_ = p.conn.Close()
	conn, err := net.Dial("unix", registry.New(h.run).Socket(h.member(p.id)))
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	p.conn, p.closed = ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(closed) })), closed
	p.sandbox, p.task = sandboxapi.NewTTRPCSandboxClient(p.conn), taskapi.NewTTRPCTaskClient(p.conn)
	for _, id := range []string{p.id, c.id} {
		if resp, err := p.task.Connect(t.Context(), &taskapi.ConnectRequest{ID: id}); err != nil || resp.TaskPid == 0 {
			t.Errorf("connect %s: %v, %v", id, resp, err)
		}
		if resp, err := p.task.Pids(t.Context(), &taskapi.PidsRequest{ID: id}); err != nil || len(resp.Processes) == 0 {
			t.Errorf("pids of %s: %v, %v", id, resp, err)
		}
	}
	c.pod = p
	if got := c.sh("echo still here"); got != "still here\n" {
		t.Errorf("got %q", got)
	}
	// containerd asks to shut down containers, too; the sandbox must live.
	if _, err := p.task.Shutdown(t.Context(), &taskapi.ShutdownRequest{ID: c.id}); err != nil {
		t.Error(err)
	}
	c.kill(9)
	c.wait()
	c.delete()
	p.stop()
}

func (h *host) member(sandbox string) string {
	h.t.Helper()
	e, ok, err := registry.New(h.run).Find(sandbox)
	if !ok || err != nil {
		h.t.Fatalf("no record of %s: %v", sandbox, err)
	}
	return e.Member
}

// testGuestPanics: a kernel panic ends the sandbox.
func testGuestPanics(t *testing.T, h *host) {
	p, c := h.running("panic")
	e := c.newExec("panic", false, "/bin/sh", "-c", "echo c > /proc/sysrq-trigger")
	_, startErr := p.task.Start(t.Context(), &taskapi.StartRequest{ID: e.id, ExecID: e.exec}) // the guest may have no time to answer
	if status := c.wait(); status != 137 {
		t.Errorf("status %d: %v, %s", status, startErr, e.stderr.String())
	}
	resp, err := p.sandbox.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: p.id})
	if err != nil || resp.ExitStatus != 137 {
		t.Errorf("sandbox: %v, %v", resp, err)
	}
	p.stop()
}

// testPoolRestarts: pods do not notice, and the next pool knows them.
func testPoolRestarts(t *testing.T, h *host) {
	p, c := h.running("survivor")
	h.waitReady(1)
	_ = h.pool.Process.Kill()
	_ = h.pool.Wait()
	eventually(t, "waiting members end with the pool", func() bool {
		entries, err := registry.New(h.run).List()
		return err == nil && len(entries) == 1
	})
	if got := c.sh("echo alive"); got != "alive\n" {
		t.Errorf("got %q", got)
	}
	started := make(chan *pod, 1)
	go func() {
		defer close(started) // runPod does not return when it fails
		started <- h.runPod("patient", nil)
	}() // waits for the pool
	h.startPool()
	patient, ok := <-started
	if !ok {
		t.FailNow()
	}
	patient.stop()
	h.waitReady(2)
	if got := c.sh("echo alive"); got != "alive\n" {
		t.Errorf("got %q", got)
	}
	p.stop()
}

// testBurst: more pods at once than there are warm members, with many containers and images in one.
func testBurst(t *testing.T, h *host) {
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			p := h.runPod(fmt.Sprintf("burst-%d", i), nil)
			p.run(fmt.Sprintf("burst-%d-c", i), p.spec("/bin/true"))
			p.stop()
		})
	}
	wg.Wait()
	p := h.runPod("many", nil)
	image := h.image
	for i := range 12 {
		p.image = filepath.Join(h.dir, fmt.Sprintf("copy-%d.erofs", i))
		copyFile(t, image, p.image)
		c := p.mustCreate(fmt.Sprintf("many-%d", i), p.spec("/bin/sleep", "1000"))
		c.start()
		if i == 11 {
			c.sh("echo from a SCSI disk")
		}
	}
	for i := 12; i < 64; i++ {
		p.mustCreate(fmt.Sprintf("many-%d", i), p.spec("/bin/sleep", "1000")).start()
	}
	p.stop()
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// testNoLeak: pods come and go and leave nothing.
func testNoLeak(t *testing.T, h *host) {
	h.waitReady(2)
	for i := range 10 {
		p, c := h.running(fmt.Sprintf("leak-%d", i))
		c.kill(9)
		c.wait()
		c.delete()
		p.stop()
	}
	h.waitReady(2)
	eventually(t, "only waiting members are left", func() bool {
		entries, err := registry.New(h.run).List()
		sandboxes, _ := os.ReadDir(filepath.Join(h.run, "sandboxes"))
		return err == nil && len(entries) == 2 && len(sandboxes) == 0
	})
	pool := filepath.Join(h.run, "netns", "pool")
	eventually(t, "only their taps are left", func() bool {
		taps := 0
		err := netns.Do(pool, func() error {
			links, err := netlink.LinkList()
			for _, l := range links {
				if l.Type() == "tuntap" {
					taps++
				}
			}
			return err
		})
		return err == nil && taps == 2
	})
}

// TestNetwork: a guest has the address of its pod's interface, and ports are forwarded into it.
func TestNetwork(t *testing.T) {
	h := newHost(t, 1)
	dir := t.TempDir()
	podNS, peerNS := filepath.Join(dir, "pod"), filepath.Join(dir, "peer")
	networktest.Namespace(t, podNS)
	networktest.Namespace(t, peerNS)
	join(t, podNS, peerNS)
	h.waitReady(1)
	cgroup := h.podCgroup()
	p := h.runPod("net", func(c *cripb.PodSandboxConfig, r *sandboxapi.CreateSandboxRequest) {
		r.NetnsPath = podNS
		c.Linux.CgroupParent = cgroup
	})
	member, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.pid))
	if err != nil || !strings.Contains(string(member), cgroup+"/vm-net") {
		t.Errorf("QEMU's cgroup: %s, %v", member, err)
	}
	c := p.mustCreate("net-c", p.spec("/bin/sh", "-c", "ip addr show eth0; ip route; while :; do echo hello | nc -l -p 8080; done"))
	c.start()
	dial := func(ns, addr string) string {
		var out []byte
		eventually(t, "connecting to "+addr, func() bool {
			err := netns.Do(ns, func() error {
				conn, err := net.DialTimeout("tcp", addr, 20*time.Second)
				if err != nil {
					return err
				}
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(time.Minute))
				out, err = io.ReadAll(conn)
				return err
			})
			return err == nil && len(out) > 0
		})
		return string(out)
	}
	if got := dial(peerNS, "10.9.0.2:8080"); got != "hello\n" {
		t.Errorf("over the network: %q", got)
	}
	if got := dial(podNS, "127.0.0.1:8080"); got != "hello\n" {
		t.Errorf("forwarded: %q", got)
	}
	c.kill(9)
	c.wait()
	if out := c.stdout.String(); !strings.Contains(out, "inet 10.9.0.2/24") || !strings.Contains(out, "default via 10.9.0.1") {
		t.Errorf("network in the guest: %s", out)
	}
	p.stop()
	eventually(t, "the pod's cgroup is empty", func() bool {
		left, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroup + "/vm-net")
		return len(left) == 0
	})
}

// join joins two namespaces: eth0 in the pod's, with an address and a route.
func join(t testing.TB, podNS, peerNS string) {
	t.Helper()
	peer, err := netns.Open(peerNS)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	up := func(name, addr string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	}
	networktest.Do(t, podNS, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer0", PeerNamespace: netlink.NsFd(peer.FD())}); err != nil {
			return err
		}
		if lo, err := netlink.LinkByName("lo"); err == nil {
			_ = netlink.LinkSetUp(lo)
		}
		return up("eth0", "10.9.0.2/24")
	})
	networktest.Do(t, peerNS, func() error { return up("peer0", "10.9.0.1/24") })
	networktest.Do(t, podNS, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IPv4(10, 9, 0, 1)})
	})
}

// podCgroup makes the cgroup of a pod in all hierarchies, as the kubelet does, and returns its name.
func (h *host) podCgroup() string {
	h.t.Helper()
	name := fmt.Sprintf("/atoll-shim-test-%d", os.Getpid())
	points, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		h.t.Fatal(err)
	}
	for _, p := range points {
		dir := filepath.Dir(p) + name
		if err := os.Mkdir(dir, 0o755); err != nil {
			h.t.Fatal(err)
		}
		h.t.Cleanup(func() { _ = os.Remove(dir) })
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			if v, err := os.ReadFile(filepath.Join(filepath.Dir(p), f)); err == nil {
				_ = os.WriteFile(filepath.Join(dir, f), v, 0o644)
			}
		}
	}
	return name
}
