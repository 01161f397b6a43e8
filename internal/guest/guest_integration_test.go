//go:build integration

package guest_test

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "atoll.dev/atoll/api/guest/v1"
)

// These tests boot the real init in a real micro-VM: they need root, qemu-system-x86_64, a pod
// kernel (ATOLL_TEST_KERNEL or build/vmlinux), mkfs.erofs, mkfs.ext4, busybox-static, cc.

// TestPod runs everything that can share one micro-VM.
func TestPod(t *testing.T) {
	testPod(t, start(t, nil))
}

// testPod uses a pod in every way that leaves it as it was, but for some.
func testPod(t *testing.T, v *vm, but ...string) {
	t.Helper()
	for name, f := range map[string]func(*testing.T, *vm){
		"basic": testBasic, "network": testNetwork, "stdio": testStdio, "exit": testExit, "errors": testErrors,
		"stdin": testStdin, "logs": testLogs, "tty": testTTY, "exec": testExec, "kill": testKill, "oom": testOOM,
		"users": testUsers, "capabilities": testCapabilities, "seccomp": testSeccomp, "readonly": testReadonly,
		"devices": testDevices, "volumes": testVolumes, "atomic": testAtomicUpdate, "inplace": testInPlace,
		"subpath": testSubPath, "image volume": testImageVolume, "memory volume": testMemoryVolume,
		"limits": testLimits, "stats": testStats, "debug": testDebugContainer, "dial": testDial,
		"unmount": testUnmount, "background": testBackground, "quota": testQuota,
	} {
		if slices.Contains(but, name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			sub := *vmView(v, t)
			f(t, &sub)
		})
	}
}

// vmView is the vm reporting to a subtest.
func vmView(v *vm, t *testing.T) *vm {
	return &vm{t: t, session: v.session, guest: v.guest, console: v.console, ids: v.ids}
}

func testBasic(t *testing.T, v *vm) {
	if got := v.must(sh("cat /proc/self/timerslack_ns")); got != "50000" {
		t.Errorf("timers of a container may be %s ns late", got)
	}
	got := v.must(sh("echo hello; uname -n; cat /proc/self/oom_score_adj; echo $$; pwd; echo $HOME $A; id; umask; cat /proc/1/cgroup"))
	if want := "hello\npod\n1000\n1\n/\n/root b\nuid=0(root) gid=0(root)\n0022\n0::/"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	j := sh("pwd; ls -d /made/here")
	j.spec.Process.Cwd = "/made/here"
	if got := v.must(j); got != "/made/here\n/made/here" {
		t.Errorf("cwd: %q", got)
	}
	if got := v.must(sh("ls /dev; ls -l /dev/null /dev/ptmx; mount | grep -c ' on / '; echo x >/dev/null; echo y >/new; cat /new")); !strings.Contains(got, "urandom") {
		t.Errorf("dev: %q", got)
	}
	if got := v.must(sh("ls /new 2>/dev/null; ls /")); strings.Contains(got, "new") {
		t.Errorf("writable layer leaked into another container: %q", got)
	}
}

func testNetwork(t *testing.T, v *vm) {
	got := v.must(sh("ip addr show eth0; ip route; ip -6 route; ip addr show lo; cat /proc/sys/net/ipv4/ip_unprivileged_port_start"))
	for _, want := range []string{
		"02:00:00:00:00:07", "mtu 1400", "10.0.2.15/24 brd 10.0.2.255", "fd00::5/64", "default via 10.0.2.2 dev eth0",
		"default via fe80::1 dev eth0", "127.0.0.1/8", "LOOPBACK,UP", "\n80",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}

func testStdio(t *testing.T, v *vm) {
	j := sh("echo out; echo err >&2; readlink /proc/self/fd/0")
	if got := v.must(j); got != "out\n/dev/null" || string(j.err) != "err\n" {
		t.Errorf("out %q err %q", got, j.err)
	}
	j = &job{spec: criSpec("cat"), stdin: strings.NewReader("through")}
	if got := v.must(j); got != "through" {
		t.Errorf("cat: %q", got)
	}
}

func testExit(t *testing.T, v *vm) {
	for script, want := range map[string]uint32{"exit 0": 0, "exit 7": 7, "kill -9 $$; sleep 9": 137, "exit 255": 255} {
		j := sh(script)
		if strings.HasPrefix(script, "kill") {
			j = sh("sh -c 'kill -9 $$'; exit $?") // a pid 1 cannot kill itself
		}
		if err := v.run(j); err != nil || j.wait.Status != want {
			t.Errorf("%q: status %d, %v", script, j.wait.GetStatus(), err)
		}
		if d := time.Since(time.Unix(0, j.wait.ExitedUnixNanos)); d < -time.Second || d > time.Minute {
			t.Errorf("exited %v ago", d)
		}
	}
}

func testErrors(t *testing.T, v *vm) {
	for _, c := range []struct {
		change func(*specs.Spec)
		want   string
	}{
		{func(s *specs.Spec) { s.Process.Args = []string{"nosuch"} }, `exec: "nosuch": executable file not found in $PATH`},
		{func(s *specs.Spec) { s.Process.Args = []string{"/bin/nosuch"} }, `exec: "/bin/nosuch": stat /bin/nosuch: no such file or directory`},
		{func(s *specs.Spec) { s.Process.Args = []string{"/bin/noexec"} }, `exec: "/bin/noexec": permission denied`},
		{func(s *specs.Spec) { s.Process.Args = []string{"/etc"} }, `exec /etc: permission denied`},
		{func(s *specs.Spec) { s.Process.Args = []string{"noformat"} }, `exec /bin/noformat: exec format error`},
		{func(s *specs.Spec) { s.Process.Args = []string{"nointerp"} }, `exec /bin/nointerp: no such file or directory`},
		{func(s *specs.Spec) { s.Process.Cwd = "/etc/passwd" }, `chdir to cwd ("/etc/passwd") set in config.json failed: not a directory`},
		{func(s *specs.Spec) { s.Process.Args = nil }, `no command specified`},
		{func(s *specs.Spec) { s.Mounts = append(s.Mounts, bind("/etc", "/x")) }, `not a volume`},
		{func(s *specs.Spec) { s.Mounts = append(s.Mounts, bind("/run/atoll/volumes/none", "/x")) }, `volume none: not found`},
	} {
		j := &job{spec: criSpec("true")}
		c.change(j.spec)
		if err := v.run(j); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %s", err, c.want)
		}
	}
	if _, err := v.guest.Wait(t.Context(), &guestv1.ProcessRequest{ContainerId: "none"}); err == nil {
		t.Error("waiting for nothing worked")
	}
}

// pattern is a reproducible stream of n bytes.
type pattern struct {
	n   int
	rng *rand.ChaCha8
}

func (p *pattern) Read(b []byte) (int, error) {
	if p.n == 0 {
		return 0, io.EOF
	}
	n := min(len(b), p.n)
	_, _ = p.rng.Read(b[:n])
	p.n -= n
	return n, nil
}

func sum(r io.Reader) string {
	h := sha256.New()
	_, _ = io.Copy(h, r)
	return fmt.Sprintf("%x", h.Sum(nil))
}

func testStdin(t *testing.T, v *vm) {
	const size = 100 << 20
	var seed [32]byte
	j := sh("head -c 1000000 | sha256sum | cut -d' ' -f1; cat | wc -c; md5sum </dev/null >/dev/null")
	j.stdin = &pattern{n: size, rng: rand.NewChaCha8(seed)}
	start := time.Now()
	got := v.must(j)
	t.Logf("100 MiB of stdin in %v", time.Since(start))
	want := sum(io.LimitReader(&pattern{n: size, rng: rand.NewChaCha8(seed)}, 1000000))
	f := strings.Fields(got)
	// head may read ahead, so only the first million is exact and the rest nearly all.
	if len(f) != 2 || f[0] != want {
		t.Errorf("got %q, want %s", got, want)
	}
	const echo = 8 << 20
	hash := sha256.New()
	j = &job{spec: criSpec("cat"), stdin: &pattern{n: echo, rng: rand.NewChaCha8(seed)}, stdout: hash}
	v.must(j)
	if got, want := fmt.Sprintf("%x", hash.Sum(nil)), sum(&pattern{n: echo, rng: rand.NewChaCha8(seed)}); got != want {
		t.Errorf("echo of 8 MiB differs: %s", got)
	}
	// A process that does not read its stdin ends all the same.
	j = &job{spec: criSpec("true"), stdin: &pattern{n: size, rng: rand.NewChaCha8(seed)}}
	v.must(j)
}

// slowWriter hashes and waits.
type slowWriter struct {
	hash.Hash
	pause time.Duration
	n     int
}

func (w *slowWriter) Write(p []byte) (int, error) {
	time.Sleep(w.pause)
	w.n += len(p)
	return w.Hash.Write(p)
}

func testLogs(t *testing.T, v *vm) {
	j := sh(`i=0; while [ $i -lt 20 ]; do seq $((i*1000)) $((i*1000+999)); i=$((i+1)); done`)
	got := strings.Fields(v.must(j))
	if len(got) != 20000 || got[19999] != "19999" {
		t.Errorf("%d lines", len(got))
	}
	w := &slowWriter{Hash: sha256.New(), pause: time.Millisecond}
	j = sh("dd if=/dev/zero bs=65536 count=100 2>/dev/null; echo end")
	j.stdout = w
	v.must(j)
	if w.n != 6553600+4 {
		t.Errorf("slow reader got %d bytes", w.n)
	}
}

func testTTY(t *testing.T, v *vm) {
	j := sh("tty; stty size; read a; echo got $a; test -t 0 && test -t 1 && test -t 2 && echo terminals; ls -l /dev/console; read b </dev/tty; echo $b")
	j.terminal, j.stdin = true, strings.NewReader("word\nagain\n")
	j.spec.Process.ConsoleSize = &specs.Box{Width: 90, Height: 30}
	got := v.must(j)
	for _, want := range []string{"/dev/pts/0", "30 90", "got word", "terminals", "/dev/console", "again"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	// Resizing while it runs, and job control signals.
	j = sh("trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.1; done")
	j.terminal, j.until = true, "ready"
	j.started = func(c string) {
		if _, err := v.guest.ResizePty(t.Context(), &guestv1.ResizePtyRequest{ContainerId: c, Width: 40, Height: 10}); err != nil {
			t.Error(err)
		}
	}
	if err := v.run(j); err != nil || j.wait.Status != 3 || !strings.Contains(string(j.out), "10 40") {
		t.Errorf("resize: %v %v %q", err, j.wait, j.out)
	}
	j = sh("cat; exit $?")
	pr, pw := io.Pipe()
	// cat must be there, since the shell, as pid 1, ignores the signal: the terminal and cat answer a line.
	j.terminal, j.stdin, j.until = true, io.MultiReader(strings.NewReader("x\n"), pr), "x\r\nx\r\n"
	j.started = func(string) {
		_, _ = io.WriteString(pw, "\x03")
	}
	if err := v.run(j); err != nil || j.wait.Status != 130 {
		t.Errorf("ctrl-C: %v %v %q", err, j.wait, j.out)
	}
}

// background runs a container until the test is done with it.
func (v *vm) background(j *job) string {
	v.t.Helper()
	j.keep = true
	up, done := make(chan struct{}), make(chan error, 1)
	j.started = func(string) { close(up) }
	go func() { done <- v.run(j) }()
	select {
	case <-up:
	case err := <-done:
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() {
		if err := v.kill(j.id, 9, true); err != nil {
			v.t.Logf("killing %s: %v", j.id, err)
		}
		<-done
		v.remove(j.id)
	})
	return j.id
}

func testExec(t *testing.T, v *vm) {
	c := v.background(sh("mkdir /here; trap 'exit 0' TERM; while :; do sleep 0.1; done"))
	proc := func(args ...string) *job { return &job{spec: criSpec(args...)} }
	j := proc("sh", "-c", "until ls -d /here 2>/dev/null; do sleep 0.1; done; ps | wc -l; id -u; echo $HOME; pwd; cat /proc/self/cgroup; cat")
	j.spec.Process.User = specs.User{UID: 1000, GID: 1000}
	j.spec.Process.Cwd = "/tmp"
	j.stdin = strings.NewReader("stdin")
	if err := v.exec(c, j); err != nil || j.wait.Status != 0 {
		t.Fatal(err, j.wait, string(j.err))
	}
	if got := string(j.out); !regexp.MustCompile(`^/here\n\d+\n1000\n/home/user\n/tmp\n0::/\nstdin$`).MatchString(got) {
		t.Errorf("got %q", got)
	}
	j = proc("nosuch")
	if err := v.exec(c, j); err == nil || !strings.Contains(err.Error(), `exec: "nosuch": executable file not found in $PATH`) {
		t.Errorf("missing command: %v", err)
	}
	j = proc("sh", "-c", "tty; exit 5")
	j.terminal = true
	if err := v.exec(c, j); err != nil || j.wait.Status != 5 || !strings.Contains(string(j.out), "/dev/pts/0") {
		t.Errorf("tty: %v %v %q", err, j.wait, j.out)
	}
	pids, err := v.guest.Pids(t.Context(), &guestv1.ProcessRequest{ContainerId: c})
	if err != nil || len(pids.Pids) < 1 {
		t.Errorf("pids: %v %v", pids, err)
	}
	// Many at once.
	errs := make(chan error, 8)
	for i := range cap(errs) {
		go func() {
			j := proc("echo", fmt.Sprint(i))
			err := v.exec(c, j)
			if err == nil && strings.TrimSpace(string(j.out)) != fmt.Sprint(i) {
				err = fmt.Errorf("exec %d: got %q", i, j.out)
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func testKill(t *testing.T, v *vm) {
	for _, c := range []struct {
		script string
		until  string
		sig    uint32
		all    bool
		want   uint32
	}{
		{"trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done", "up", 15, false, 9},
		{"sleep 1000", "", 9, false, 137},
		{"sleep 1000 & echo up; sleep 1000", "up", 9, true, 137},
	} {
		j := sh(c.script)
		j.until = c.until
		j.started = func(id string) {
			if err := v.kill(id, c.sig, c.all); err != nil {
				t.Error(err)
			}
		}
		if err := v.run(j); err != nil || j.wait.Status != c.want {
			t.Errorf("%q: %v %v", c.script, err, j.wait)
		}
	}
	j := sh("true")
	j.keep = true
	v.must(j)
	if err := v.kill(j.id, 15, false); err == nil || !strings.Contains(err.Error(), "NotFound") {
		t.Errorf("killing the dead: %v", err)
	}
	v.remove(j.id)
}

func testOOM(t *testing.T, v *vm) {
	limit := int64(16 << 20)
	j := sh("tail /dev/zero")
	j.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	if err := v.run(j); err != nil || j.wait.Status != 137 || !j.wait.OomKilled {
		t.Errorf("%v %v", err, j.wait)
	}
	e, err := v.guest.NextEvent(t.Context(), &guestv1.Empty{})
	if err != nil || e.Kind != guestv1.Event_OOM || e.ContainerId != j.id {
		t.Errorf("event %v, %v", e, err)
	}
	if got := v.must(sh("echo alive")); got != "alive" {
		t.Errorf("pod after OOM: %q", got)
	}
}

func testUsers(t *testing.T, v *vm) {
	j := sh("id -u; id -g; id -G; echo $HOME; echo x >/dev/stdout; touch /tmp/x 2>&1; grep -i capeff /proc/self/status; ls -l /proc/self/fd/1 >/dev/null && echo fds")
	umask := uint32(0o077)
	j.spec.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{1001, 2000}, Umask: &umask}
	got := v.must(j)
	for _, want := range []string{"1000\n1001\n1001 2000\n/home/user\nx\n", "CapEff:\t0000000000000000", "fds"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
}

func testCapabilities(t *testing.T, v *vm) {
	status := "grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status | tr -d '\\t'"
	j := sh(status)
	got := v.must(j)
	if !strings.Contains(got, "CapEff:00000000a80425fb") || !strings.Contains(got, "CapBnd:00000000a80425fb") || !strings.Contains(got, "NoNewPrivs:0") {
		t.Errorf("default: %q", got)
	}
	j = sh(status)
	caps := []string{"CAP_NET_BIND_SERVICE"}
	j.spec.Process.User = specs.User{UID: 1000, GID: 1000}
	j.spec.Process.NoNewPrivileges = true
	j.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps, Inheritable: caps, Ambient: caps}
	got = v.must(j)
	for _, set := range []string{"Inh", "Prm", "Eff", "Bnd", "Amb"} {
		if !strings.Contains(got, "Cap"+set+":0000000000000400") {
			t.Errorf("ambient: %q", got)
		}
	}
	if !strings.Contains(got, "NoNewPrivs:1") {
		t.Errorf("no_new_privs: %q", got)
	}
	j = sh(status)
	j.spec.Process.Capabilities = nil
	if got := v.must(j); !strings.Contains(got, "CapBnd:0000000000000000") {
		t.Errorf("none: %q", got)
	}
}
