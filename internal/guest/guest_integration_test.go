//go:build integration

package guest_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
)

// These tests boot the real init in a real micro-VM: they need root, qemu-system-x86_64, a pod
// kernel (ATOLL_TEST_KERNEL or build/guest/vmlinux), mkfs.erofs, mkfs.ext4, busybox-static, cc.

// TestPod runs everything that can share one micro-VM.
func TestPod(t *testing.T) {
	v := start(t, nil)
	for name, f := range map[string]func(*testing.T, *vm){
		"basic": testBasic, "network": testNetwork, "stdio": testStdio, "exit": testExit, "errors": testErrors,
		"stdin": testStdin, "logs": testLogs, "tty": testTTY, "exec": testExec, "kill": testKill, "oom": testOOM,
		"users": testUsers, "capabilities": testCapabilities, "seccomp": testSeccomp, "readonly": testReadonly,
		"devices": testDevices, "volumes": testVolumes, "atomic": testAtomicUpdate, "inplace": testInPlace,
		"subpath": testSubPath, "image volume": testImageVolume, "memory volume": testMemoryVolume,
		"limits": testLimits, "stats": testStats, "debug": testDebugContainer, "dial": testDial,
		"unmount": testUnmount, "background": testBackground,
	} {
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
	j.terminal = true
	j.started = func(c string) {
		time.Sleep(500 * time.Millisecond)
		if _, err := v.guest.ResizePty(t.Context(), &guestv1.ResizePtyRequest{ContainerId: c, Width: 40, Height: 10}); err != nil {
			t.Error(err)
		}
	}
	if err := v.run(j); err != nil || j.wait.Status != 3 || !strings.Contains(string(j.out), "10 40") {
		t.Errorf("resize: %v %v %q", err, j.wait, j.out)
	}
	j = sh("cat; exit $?")
	pr, pw := io.Pipe()
	j.terminal, j.stdin = true, pr
	j.started = func(string) {
		time.Sleep(time.Second) // cat must be there; the shell, as pid 1, ignores the signal
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
	j := proc("sh", "-c", "ls -d /here; ps | wc -l; id -u; echo $HOME; pwd; cat /proc/self/cgroup; cat")
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
		sig    uint32
		all    bool
		want   uint32
	}{
		{"trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done", 15, false, 9},
		{"sleep 1000", 9, false, 137},
		{"sleep 1000 & sleep 1000", 9, true, 137},
	} {
		j := sh(c.script)
		j.started = func(id string) {
			time.Sleep(500 * time.Millisecond)
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

// filter denies one system call with EPERM.
func filter(nr uint32) []byte {
	var b bytes.Buffer
	for _, f := range []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: nr},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x00050000 | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x7fff0000},
	} {
		_ = binary.Write(&b, binary.LittleEndian, f)
	}
	return b.Bytes()
}

func testSeccomp(t *testing.T, v *vm) {
	for _, nnp := range []bool{false, true} {
		j := sh("grep Seccomp: /proc/self/status | tr -d '\\t'; mkdir /tmp/d || echo denied")
		j.spec.Process.NoNewPrivileges = nnp
		if nnp {
			j.spec.Process.User = specs.User{UID: 1000, GID: 1000}
		}
		j.seccomp = filter(unix.SYS_MKDIR)
		if got := v.must(j); got != "Seccomp:2\ndenied" {
			t.Errorf("nnp %v: %q, %s", nnp, got, j.err)
		}
	}
}

func testReadonly(t *testing.T, v *vm) {
	j := sh("touch /x || echo ro; touch /dev/shm/x && echo shm; echo 1 >/proc/sys/kernel/panic || echo sysctl; touch /sys/x || echo sys; mkdir /sys/fs/cgroup/x || echo cgroup; wc -c </proc/keys; ls /sys/firmware | wc -l")
	j.spec.Root.Readonly = true
	if got := v.must(j); got != "ro\nshm\nsysctl\nsys\ncgroup\n0\n0" {
		t.Errorf("got %q\n%s", got, j.err)
	}
}

func testDevices(t *testing.T, v *vm) {
	j := sh("mknod /tmp/vda b 254 0; head -c1 /tmp/vda || echo nodev; mknod /dev/vda b 254 0; head -c1 /dev/vda || echo filtered; mknod /dev/kmsg c 1 11; cat /dev/kmsg || echo filtered; head -c4 /dev/urandom | wc -c; ls /dev/extra && cat /dev/extra")
	j.spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/extra", Type: "c", Major: 1, Minor: 3}}
	if got := v.must(j); got != "nodev\nfiltered\nfiltered\n4\n/dev/extra" {
		t.Errorf("got %q\n%s", got, j.err)
	}
}

func testVolumes(t *testing.T, v *vm) {
	src := v.volume("shared", guestv1.CreateVolumeRequest_SCRATCH)
	a := sh("echo data >/v/file; ls -ld /v | cut -c1-10")
	a.spec.Mounts = append(a.spec.Mounts, bind(src, "/v", "rw"))
	if got := v.must(a); got != "drwxrwxrwx" {
		t.Errorf("mode %q", got)
	}
	b := sh("cat /deep/er/v/file; touch /deep/er/v/x || echo ro")
	b.spec.Mounts = append(b.spec.Mounts, bind(src, "/deep/er/v", "ro"))
	if got := v.must(b); got != "data\nro" {
		t.Errorf("got %q", got)
	}
	// A symlink in the image at the destination stays in the container.
	c := sh("cat /target/file; cat /real/file")
	c.spec.Mounts = append(c.spec.Mounts, bind(src, "/real"), bind(src, "/target"))
	if got := v.must(c); got != "data\ndata" {
		t.Errorf("got %q", got)
	}
}

func dir(path string) *guestv1.File { return &guestv1.File{Path: path, Mode: unix.S_IFDIR | 0o755} }

func link(path, target string) *guestv1.File {
	return &guestv1.File{Path: path, Mode: unix.S_IFLNK | 0o777, Target: target}
}

func file(path, data string) *guestv1.File {
	return &guestv1.File{Path: path, Mode: unix.S_IFREG | 0o640, Gid: 1000, Data: []byte(data)}
}

func (v *vm) put(volume string, replace bool, files ...*guestv1.File) {
	v.t.Helper()
	req := &guestv1.PutFilesRequest{Volume: volume, Files: files, Replace: replace, Commit: true}
	if _, err := v.guest.PutFiles(v.t.Context(), req); err != nil {
		v.t.Fatal(err)
	}
}

func testAtomicUpdate(t *testing.T, v *vm) {
	src := v.volume("config", guestv1.CreateVolumeRequest_PUSHED)
	v.put("config", true, dir("..1"), file("..1/a", "one"), file("..1/b", "one"), file("..1/gone", "x"),
		link("..data", "..1"), link("a", "..data/a"), link("b", "..data/b"), link("gone", "..data/gone"))
	j := sh(`cat /c/a /c/b; ls -l /c/..data/a | cut -d' ' -f1; echo; echo ready >/s/ready
		while [ "$(cat /c/a)" = one ]; do sleep 0.05; done; cat /c/a /c/b; ls -a /c | tr '\n' ' '`)
	sync := v.volume("sync", guestv1.CreateVolumeRequest_SCRATCH)
	j.spec.Mounts = append(j.spec.Mounts, bind(src, "/c", "ro"), bind(sync, "/s", "rw"))
	j.started = func(string) {
		time.Sleep(time.Second)
		v.put("config", true, dir("..2"), file("..2/a", "two"), file("..2/b", "two"),
			link("..data", "..2"), link("a", "..data/a"), link("b", "..data/b"))
	}
	if got := v.must(j); got != "oneone-rw-r-----\n\ntwotwo. .. ..2 ..data a b" {
		t.Errorf("got %q", got)
	}
	for _, bad := range []string{"../x", "/x", "a/../../x", "", "a//b", ".."} {
		_, err := v.guest.PutFiles(t.Context(), &guestv1.PutFilesRequest{Volume: "config", Files: []*guestv1.File{file(bad, "")}, Commit: true})
		if err == nil {
			t.Errorf("path %q accepted", bad)
		}
	}
}

func testInPlace(t *testing.T, v *vm) {
	src := v.volume("hosts", guestv1.CreateVolumeRequest_PUSHED)
	v.put("hosts", false, file("hosts", "old"), file("message", ""))
	j := sh(`cat /etc/hosts; while [ "$(cat /etc/hosts)" = old ]; do sleep 0.05; done; cat /etc/hosts; echo the end >/dev/message`)
	j.spec.Mounts = append(j.spec.Mounts, bind(src+"/hosts", "/etc/hosts", "rw"), bind(src+"/message", "/dev/message", "rw"))
	j.started = func(string) {
		time.Sleep(500 * time.Millisecond)
		v.put("hosts", false, file("hosts", "new content"))
	}
	if got := v.must(j); got != "oldnew content" {
		t.Errorf("got %q", got)
	}
	resp, err := v.guest.GetFile(t.Context(), &guestv1.GetFileRequest{Volume: "hosts", Path: "message", MaxBytes: 4})
	if err != nil || string(resp.Data) != "end\n" {
		t.Errorf("message %q, %v", resp.GetData(), err)
	}
}

func testSubPath(t *testing.T, v *vm) {
	src := v.volume("sub", guestv1.CreateVolumeRequest_SCRATCH)
	j := sh("echo x >/v/f; ls -ld /v | cut -c1-10")
	j.spec.Mounts = append(j.spec.Mounts, bind(src+"/a/b", "/v", "rw"))
	if got := v.must(j); got != "drwxrwxrwx" {
		t.Errorf("got %q", got)
	}
	j = sh("cat /v/a/b/f; cat /f; ln -s / /v/escape; ln -s ../../../../.. /v/up")
	j.spec.Mounts = append(j.spec.Mounts, bind(src, "/v", "rw"), bind(src+"/a/b/f", "/f", "ro"))
	if got := v.must(j); got != "x\nx" {
		t.Errorf("got %q", got)
	}
	for _, s := range []string{"/escape", "/escape/etc", "/up/proc", "/escape/made"} {
		j = sh("ls /v")
		j.spec.Mounts = append(j.spec.Mounts, bind(src+s, "/v", "rw"))
		if err := v.run(j); err == nil {
			t.Errorf("%s led out of the volume: %s", s, j.out)
		}
	}
}

func testImageVolume(t *testing.T, v *vm) {
	src := v.volume("data", guestv1.CreateVolumeRequest_IMAGE)
	j := sh("cat /data/file /data/sub/deep; echo more >/data/more")
	j.spec.Mounts = append(j.spec.Mounts, bind(src, "/data", "rw"))
	j.volumes = []*guestv1.ImageVolume{{Volume: "data", ImagePath: "/data"}}
	if got := v.must(j); got != "from the imagedeeper" {
		t.Errorf("got %q", got)
	}
}

func testMemoryVolume(t *testing.T, v *vm) {
	req := &guestv1.CreateVolumeRequest{Id: "mem", Kind: guestv1.CreateVolumeRequest_MEMORY, SizeBytes: 1 << 20, Mode: 0o2770, Gid: 1000}
	if _, err := v.guest.CreateVolume(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	j := sh("ls -ldn /v | cut -d' ' -f1,7-; mount | grep ' /v ' | cut -d' ' -f5; dd if=/dev/zero of=/v/f bs=65536 count=32 2>/dev/null || echo full")
	j.spec.Mounts = append(j.spec.Mounts, bind(channel.VolumesDir+"/mem", "/v", "rw"))
	got := v.must(j)
	if !strings.HasPrefix(got, "drwxrws---") || !strings.HasSuffix(got, "tmpfs\nfull") {
		t.Errorf("got %q", got)
	}
	if !strings.Contains(strings.ReplaceAll(v.mustStats("").String(), " ", ""), `id:"mem"`) {
		t.Error("volume not in stats")
	}
}

func testLimits(t *testing.T, v *vm) {
	limit, shares, quota, period, pids := int64(32<<20), uint64(1024), int64(20000), uint64(100000), int64(10)
	j := sh("cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight pids.max memory.oom.group; ulimit -n; while [ $(cat cpu.weight) = 100 ]; do sleep 0.1; done; cat memory.max cpu.max cpu.weight")
	j.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	j.spec.Linux.Resources.CPU = &specs.LinuxCPU{Shares: &shares, Quota: &quota, Period: &period}
	j.spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &pids}
	j.started = func(id string) {
		time.Sleep(time.Second)
		req := &guestv1.UpdateRequest{ContainerId: id, Resources: []byte(`{"memory":{"limit":67108864},"cpu":{"shares":2048,"quota":30000,"period":100000}}`)}
		if _, err := v.guest.Update(t.Context(), req); err != nil {
			t.Error(err)
		}
	}
	if got := v.must(j); got != "33554432\n20000 100000\n100\n10\n1\n1048576\n67108864\n30000 100000\n174" {
		t.Errorf("got %q", got)
	}
}

func (v *vm) mustStats(id string) *guestv1.StatsResponse {
	v.t.Helper()
	s, err := v.guest.Stats(v.t.Context(), &guestv1.StatsRequest{ContainerId: id})
	if err != nil {
		v.t.Fatal(err)
	}
	return s
}

func testStats(t *testing.T, v *vm) {
	c := v.background(sh("dd if=/dev/zero of=/file bs=65536 count=64 2>/dev/null; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000"))
	deadline := time.Now().Add(20 * time.Second)
	for {
		s := v.mustStats(c)
		if s.CpuUsageNanos > 10e6 && s.MemoryWorkingSetBytes > 0 && s.Pids >= 1 && len(s.CgroupMetrics) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("stats: %v", s)
		}
		time.Sleep(100 * time.Millisecond)
	}
	p := v.mustStats("")
	if p.ScratchCapacityBytes == 0 || len(p.Networks) != 1 || p.MemoryUsageBytes == 0 {
		t.Errorf("pod: %v", p)
	}
}

func testDebugContainer(t *testing.T, v *vm) {
	c := v.background(sh("sleep 1000"))
	pids, err := v.guest.Pids(t.Context(), &guestv1.ProcessRequest{ContainerId: c})
	if err != nil || len(pids.Pids) == 0 {
		t.Fatal(pids, err)
	}
	j := sh("ps -o args | grep -c '[s]leep 1000'; cat /proc/1/root/etc/hostname 2>/dev/null; ls -d /proc/1")
	j.spec.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", pids.Pids[0])
	if got := v.must(j); got != "1\n/proc/1" {
		t.Errorf("got %q", got)
	}
}

func testDial(t *testing.T, v *vm) {
	v.background(sh("while :; do nc -l -p 8080 -e sh -c 'read a; echo answer $a'; done"))
	deadline := time.Now().Add(20 * time.Second)
	for {
		st, err := channel.Dial(v.session, 8080)
		if err == nil {
			_, _ = io.WriteString(st, "question\n")
			got, err := io.ReadAll(st)
			if err != nil || string(got) != "answer question\n" {
				t.Errorf("got %q, %v", got, err)
			}
			_ = st.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if _, err := channel.Dial(v.session, 9); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("closed port: %v", err)
	}
}

func testUnmount(t *testing.T, v *vm) {
	ctx := t.Context()
	mount := &guestv1.MountImageRequest{Id: "second", Serial: "img1"}
	for range 3 {
		if _, err := v.guest.MountImage(ctx, mount); err != nil {
			t.Fatal(err)
		}
		j := sh("true")
		j.lowers = []string{"second"}
		v.must(j)
		if _, err := v.guest.UnmountImage(ctx, &guestv1.UnmountImageRequest{Id: "second"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := v.guest.MountImage(ctx, &guestv1.MountImageRequest{Id: "x", Serial: "nosuch"}); err == nil {
		t.Error("no disk, no error")
	}
}

// A process that outlives an exec holds its pipes; the exec ends all the same.
func testBackground(t *testing.T, v *vm) {
	c := v.background(sh("sleep 1000"))
	j := sh("echo before; sleep 500 &")
	start := time.Now()
	if err := v.exec(c, j); err != nil || string(j.out) != "before\n" {
		t.Errorf("%v %q", err, j.out)
	}
	t.Logf("exec with a left-over process ended after %v", time.Since(start))
}

// TestSharedPID has a pod of its own: the namespace is decided at set-up.
func TestSharedPID(t *testing.T) {
	v := start(t, func(r *guestv1.SetupRequest) { r.SharedPid, r.ScratchSerial = true, "" })
	v.background(sh("sleep 4321"))
	if got := v.must(sh("sh -c '(sleep 0.1; exit) &'; sleep 0.5; ps -o stat | grep -c Z || true")); got != "0" {
		t.Errorf("%s zombies", got)
	}
	if got := v.must(sh("ps -o args | grep -c '[s]leep 4321'; cat /proc/1/comm")); got != "1\npause" {
		t.Errorf("got %q", got)
	}
}

func TestShutdown(t *testing.T) {
	v := start(t, nil)
	v.background(sh("sleep 1000"))
	if _, err := v.guest.Shutdown(t.Context(), &guestv1.Empty{}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-v.exited:
	case <-time.After(30 * time.Second):
		t.Fatal("still running")
	}
}
