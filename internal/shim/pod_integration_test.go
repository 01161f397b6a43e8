//go:build integration

package shim_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	apievents "github.com/containerd/containerd/api/events"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"atoll.dev/atoll/internal/shim/cripb"
)

// TestPod goes through what a pod can do, in one host and, where it does not matter, one pod.
func TestPod(t *testing.T) {
	h := newHost(t, 1)
	h.waitReady(1)
	t.Run("Hello", func(t *testing.T) { testHello(t, h) })
	p := h.runPod("main", nil)
	defer p.stop()
	t.Run("Files", func(t *testing.T) { testFiles(t, p.in(t)) }) // before Volumes writes a file of the pod
	for name, test := range map[string]func(*testing.T, *pod){
		"Volumes": testVolumes, "Exec": testExec, "Kill": testKill, "Terminal": testTerminal,
		"Stats": testStats, "Usage": testUsage, "Score": testScore, "Stress": testStress, "Refused": testRefused, "Privileged": testPrivileged, "Seccomp": testSeccomp, "StartFails": testStartFails,
	} {
		t.Run(name, func(t *testing.T) { test(t, p.in(t)) })
	}
	t.Run("SharedPID", func(t *testing.T) { testSharedPID(t, h.in(t)) })
	t.Run("Memory", func(t *testing.T) { testMemory(t, h.in(t)) })
	t.Run("Clock", func(t *testing.T) { testClock(t, h.in(t)) })
}

// in makes failures those of a subtest.
func (h *host) in(t testing.TB) *host {
	c := *h
	c.t = t
	return &c
}

func (p *pod) in(t testing.TB) *pod {
	c := *p
	c.host = p.host.in(t)
	return &c
}

// testHello is the whole path: shim start, sandbox, container, output, removal.
func testHello(t *testing.T, h *host) {
	h = h.in(t)
	p := h.runPod("hello", nil)
	c := p.run("hello-1", p.spec("/bin/echo", "hello from a micro-VM"))
	if got := c.stdout.String(); got != "hello from a micro-VM\n" {
		t.Errorf("output %q", got)
	}
	var exit apievents.TaskExit
	h.event("/tasks/exit", &exit)
	if exit.ContainerID != "hello-1" || exit.ExitStatus != 0 {
		t.Errorf("exit event: %v", &exit)
	}
	status, err := p.sandbox.SandboxStatus(t.Context(), &sandboxapi.SandboxStatusRequest{SandboxID: p.id, Verbose: true})
	if err != nil || status.State != "SANDBOX_READY" || !strings.Contains(status.Info["atoll"], "sandbox setup") {
		t.Errorf("status %v, %v", status, err)
	}
	t.Log(status.GetInfo()["atoll"])
	p.stop()
}

// testFiles: the pod's own files, its name and its kernel.
func testFiles(t *testing.T, p *pod) {
	c := p.run("files", p.spec("/bin/sh", "-c", "hostname; cat /etc/hostname /etc/resolv.conf; cat /etc/hosts | head -n 1; test -w /dev/shm && echo shm"))
	want := "host-main\nhost-main\nsearch cluster.local\nnameserver 10.96.0.10\n127.0.0.1\tlocalhost\nshm\n"
	if got := c.stdout.String(); got != want {
		t.Errorf("got %q", got)
	}
	ro := p.spec("/bin/sh", "-c", "echo x > /file || echo refused; echo x >> /etc/hosts || echo refused")
	ro.Root.Readonly = true
	c = p.mustCreate("files-ro", ro)
	c.start()
	c.wait()
	if got := c.stdout.String(); got != "refused\nrefused\n" {
		t.Errorf("read-only root: %q", got)
	}
	c.delete()
}

// testVolumes: every kind of volume, live update, termination message.
func testVolumes(t *testing.T, p *pod) {
	cm := p.volume("configmap", "cm")
	publish := func(version, value string) {
		dir := filepath.Join(cm, version)
		for _, err := range []error{
			os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "key"), []byte(value), 0o640),
			os.Symlink(version, filepath.Join(cm, "..tmp")), os.Rename(filepath.Join(cm, "..tmp"), filepath.Join(cm, "..data")),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		_ = os.Symlink("..data/key", filepath.Join(cm, "key"))
	}
	publish("..1", "one")
	cache, log := p.volume("empty-dir", "cache"), filepath.Join(p.kubelet, "pods", p.uid, "containers/c/aabb")
	hosts := filepath.Join(p.kubelet, "pods", p.uid, "etc-hosts")
	for _, f := range []string{log, hosts} {
		if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, []byte("10.0.0.1 me\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_ = os.Truncate(log, 0)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(cache, 0o777|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(cache, 0, 2000); err != nil {
		t.Fatal(err)
	}
	s := p.spec("/bin/sh", "-c", "while test ! -e /cache/end; do sleep 0.1; done; echo -n bye > /dev/termination-log")
	bind := func(dest, source, mode string) specs.Mount {
		return specs.Mount{Destination: dest, Type: "bind", Source: source, Options: []string{"rbind", "rprivate", mode}}
	}
	s.Mounts = append(
		s.Mounts, bind("/cm", cm, "ro"), bind("/cache", cache, "rw"), bind("/etc/hosts", hosts, "rw"),
		bind("/dev/termination-log", log, "rw"),
		bind("/data", filepath.Join(p.dir, "containerd/cri/containers/volumes-1/volumes/00aa"), "rw"),
	)
	c := p.mustCreate("volumes-1", s)
	c.start()
	got := c.sh("cat /cm/key; echo; stat -c '%a %u %g' /cache; stat -c %a /cm/..data/key; cat /etc/hosts /data/seed; echo x > /cm/key || echo ro")
	if want := "one\n2777 0 2000\n640\n10.0.0.1 me\nfrom the image\nro\n"; got != want {
		t.Errorf("got %q", got)
	}
	publish("..2", "two")
	for deadline := time.Now().Add(3 * time.Minute); c.sh("cat /cm/key") != "two"; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the update did not arrive")
		}
	}
	e := c.newExec("end", false, "/bin/sh", "-c", "echo done > /cache/end")
	e.start()
	e.wait() // by itself, or with the container
	e.delete()
	if status := c.wait(); status != 0 {
		t.Errorf("status %d: %s", status, c.stderr.String())
	}
	if got, err := os.ReadFile(log); err != nil || string(got) != "bye" {
		t.Errorf("termination message %q, %v", got, err)
	}
	c.delete()
}

// testExec: standard input and its end, a lot of data, exit codes.
func testExec(t *testing.T, p *pod) {
	c := p.mustCreate("exec", p.spec("/bin/sleep", "1000"))
	c.start()
	e := c.newExec("in", true, "/bin/sh", "-c", "wc -c; exit 3")
	e.start()
	w, err := os.OpenFile(e.stdin, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	const size = 8 << 20
	if _, err := w.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if _, err := p.task.CloseIO(t.Context(), &taskapi.CloseIORequest{ID: c.id, ExecID: "in", Stdin: true}); err != nil {
		t.Fatal(err)
	}
	if status := e.wait(); status != 3 || strings.TrimSpace(e.stdout.String()) != fmt.Sprint(size) {
		t.Errorf("status %d, output %q", status, e.stdout.String())
	}
	e.delete()
	if got := len(c.sh("dd if=/dev/zero bs=65536 count=64 2>/dev/null")); got != 4<<20 {
		t.Errorf("%d bytes of output", got)
	}
	if got := c.sh("echo to stderr >&2; echo $$"); strings.TrimSpace(got) == "1" {
		t.Errorf("exec is process %s", got)
	}
	pids, err := p.task.Pids(t.Context(), &taskapi.PidsRequest{ID: c.id})
	if err != nil || len(pids.Processes) != 1 {
		t.Errorf("pids: %v, %v", pids, err)
	}
	c.kill(9)
	if status := c.wait(); status != 137 {
		t.Errorf("status %d", status)
	}
	c.delete()
}

// testStress starts, kills and removes containers, one after the other and at once.
func testStress(_ *testing.T, p *pod) {
	for i := range 30 {
		c := p.mustCreate(fmt.Sprintf("stress-%d", i), p.spec("/bin/sleep", "1000"))
		c.start()
		if i%3 == 0 {
			c.sh("echo hello")
		}
		c.kill(9)
		c.wait()
		c.delete()
	}
}

func (c *container) kill(signal uint32) {
	c.t.Helper()
	if _, err := c.task.Kill(c.t.Context(), &taskapi.KillRequest{ID: c.id, ExecID: c.exec, Signal: signal}); err != nil {
		c.t.Fatal(err)
	}
}

// testKill: signals, and containers that were never started.
func testKill(t *testing.T, p *pod) {
	c := p.mustCreate("kill", p.spec("/bin/sh", "-c", "trap 'exit 7' TERM; echo >/tmp/trap; while :; do sleep 0.1; done"))
	state, err := p.task.State(t.Context(), &taskapi.StateRequest{ID: c.id})
	if err != nil || state.Status.String() != "CREATED" || state.Pid <= 1<<22 {
		t.Errorf("state %v, %v", state, err)
	}
	c.start()
	c.sh("until [ -e /tmp/trap ]; do sleep 0.1; done")
	c.kill(15)
	if status := c.wait(); status != 7 {
		t.Errorf("status %d", status)
	}
	if _, err := p.task.Kill(t.Context(), &taskapi.KillRequest{ID: c.id, Signal: 9}); err == nil {
		t.Error("a process that has ended was killed")
	}
	c.delete()
	never := p.mustCreate("never", p.spec("/bin/true"))
	never.kill(9)
	if resp, err := p.task.Wait(t.Context(), &taskapi.WaitRequest{ID: never.id}); err != nil || resp.ExitStatus != 137 {
		t.Errorf("never started: %v, %v", resp, err)
	}
	never.delete()
	unused := p.mustCreate("unused", p.spec("/bin/true"))
	unused.delete()
	if _, err := p.task.State(t.Context(), &taskapi.StateRequest{ID: "unused"}); err == nil {
		t.Error("a deleted container has a state")
	}
}

// testTerminal: one stream in both directions, with a size.
func testTerminal(t *testing.T, p *pod) {
	s := p.spec("/bin/sh")
	s.Process.Terminal = true
	c, err := p.createTerminal("tty", s)
	if err != nil {
		t.Fatal(err)
	}
	c.start()
	if _, err := p.task.ResizePty(t.Context(), &taskapi.ResizePtyRequest{ID: c.id, Width: 91, Height: 33}); err != nil {
		t.Error(err)
	}
	w, err := os.OpenFile(c.stdin, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteString("busybox stty size; test -t 0 && echo is''tty; exit 5\n"); err != nil {
		t.Fatal(err)
	}
	if status := c.wait(); status != 5 {
		t.Errorf("status %d", status)
	}
	if got := c.stdout.String(); !strings.Contains(got, "33 91") || !strings.Contains(got, "istty") {
		t.Errorf("output %q", got)
	}
	c.delete()
}

// testStats: usage is counted, memory limits kill, and the kill is seen after the end.
func testStats(t *testing.T, p *pod) {
	limit := int64(32 << 20)
	s := p.spec("/bin/sh", "-c", "until [ -e /tmp/go ]; do sleep 0.1; done; dd if=/dev/zero of=/dev/null bs=100M count=1")
	s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	c := p.mustCreate("oom", s)
	c.start()
	m := c.metrics()
	if m.Memory.UsageLimit != uint64(limit) {
		t.Errorf("limit %d", m.Memory.UsageLimit)
	}
	e := c.newExec("go", false, "/bin/sh", "-c", "echo >/tmp/go")
	e.start()
	e.wait() // by itself, or with the container
	e.delete()
	if status := c.wait(); status != 137 {
		t.Errorf("status %d: %s", status, c.stderr.String())
	}
	var oom apievents.TaskOOM
	p.event("/tasks/oom", &oom)
	if oom.ContainerID != "oom" || c.metrics().MemoryEvents.GetOomKill() == 0 {
		t.Errorf("oom event %v, metrics %v", &oom, c.metrics().MemoryEvents)
	}
	c.delete()
	if resp, err := p.sandbox.SandboxMetrics(t.Context(), &sandboxapi.SandboxMetricsRequest{SandboxID: p.id}); err != nil || resp.Metrics.GetData() == nil {
		t.Errorf("sandbox metrics: %v, %v", resp, err)
	}
}

func (c *container) metrics() *stats.Metrics {
	c.t.Helper()
	resp, err := c.task.Stats(c.t.Context(), &taskapi.StatsRequest{ID: c.id})
	if err != nil {
		c.t.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(resp.Stats)
	if err != nil {
		c.t.Fatal(err)
	}
	return v.(*stats.Metrics)
}

// testRefused: what needs the host is refused with the way out, and leaves nothing behind.
func testRefused(t *testing.T, p *pod) {
	s := p.spec("/bin/true")
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/host", Type: "bind", Source: "/etc", Options: []string{"rbind"}})
	err := p.refusal("refused", s)
	if err == nil || !strings.Contains(err.Error(), `path "/etc" of the host`) || !strings.Contains(err.Error(), "runc") {
		t.Errorf("host path: %v", err)
	}
	p.run("refused", p.spec("/bin/true"))
}

// testSeccomp: the profile holds in the guest, for execs, too.
func testSeccomp(t *testing.T, p *pod) {
	s := p.spec("/bin/sleep", "1000")
	errno := uint(95)
	s.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Syscalls:      []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &errno}},
	}
	c := p.mustCreate("seccomp", s)
	c.start()
	e := c.newExec("mkdir", false, "/bin/busybox", "mkdir", "/tmp/x")
	e.start()
	if status := e.wait(); status == 0 || !strings.Contains(e.stderr.String(), "not supported") {
		t.Errorf("status %d, output %q, %q", status, e.stdout.String(), e.stderr.String())
	}
	e.delete()
	c.kill(9)
	c.wait()
	c.delete()
}

// testStartFails: a command that is not there.
func testStartFails(t *testing.T, p *pod) {
	c := p.mustCreate("nocmd", p.spec("/bin/nosuch"))
	_, err := p.task.Start(t.Context(), &taskapi.StartRequest{ID: c.id})
	if err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("start: %v", err)
	}
	c.wait()
	c.delete()
}

// testSharedPID: containers see each other's processes only where the pod says so, or by target.
func testSharedPID(t *testing.T, h *host) {
	p := h.runPod("shared", func(c *cripb.PodSandboxConfig, _ *sandboxapi.CreateSandboxRequest) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = cripb.NamespaceMode_POD
	})
	defer p.stop()
	s := p.spec("/bin/sleep", "4711")
	s.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", p.pid)
	a := p.mustCreate("shared-a", s)
	a.start()
	s = p.spec("/bin/ps")
	s.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", p.pid)
	if got := p.run("shared-b", s).stdout.String(); !strings.Contains(got, "sleep 4711") {
		t.Errorf("processes of the pod: %s", got)
	}
	state, err := p.task.State(t.Context(), &taskapi.StateRequest{ID: a.id})
	if err != nil {
		t.Fatal(err)
	}
	s = p.spec("/bin/ps")
	s.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", state.Pid)
	if got := p.run("shared-c", s).stdout.String(); !strings.Contains(got, "sleep 4711") {
		t.Errorf("processes of the target: %s", got)
	}
	a.kill(9)
	a.wait()
	a.delete()
}

// testMemory: a pod with larger limits gets a larger micro-VM, at the start and later.
func testMemory(t *testing.T, h *host) {
	p := h.runPod("large", func(c *cripb.PodSandboxConfig, _ *sandboxapi.CreateSandboxRequest) {
		c.Linux.Resources = &cripb.LinuxContainerResources{MemoryLimitInBytes: 512 << 20, CpuPeriod: 100000, CpuQuota: 200000}
	})
	defer p.stop()
	limit := int64(1 << 30)
	s := p.spec("/bin/sh", "-c", "head -n 1 /proc/meminfo; busybox nproc")
	got := p.run("large-1", s).stdout.String()
	if !strings.Contains(got, "\n2\n") {
		t.Errorf("CPUs: %q", got)
	}
	t.Log(got)
	s = p.spec("/bin/sh", "-c", "head -n 1 /proc/meminfo")
	s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	var kib int
	if _, err := fmt.Sscanf(p.run("large-2", s).stdout.String(), "MemTotal: %d kB", &kib); err != nil || kib < 1<<20 {
		t.Errorf("memory %d KiB, %v", kib, err)
	}
}
