//go:build integration

package guest_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/flatspec"
)

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
		while [ "$(cat /c/a)" = one ]; do sleep 0.05; done; cat /c/a /c/b
		while [ -e /c/..1 ] || [ -L /c/gone ]; do sleep 0.05; done; ls -a /c | tr '\n' ' '`)
	sync := v.volume("sync", guestv1.CreateVolumeRequest_SCRATCH)
	j.spec.Mounts = append(j.spec.Mounts, bind(src, "/c", "ro"), bind(sync, "/s", "rw"))
	j.until = "-rw-r-----"
	j.started = func(string) {
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
	j := sh(`cat /etc/hosts; echo; until [ "$(cat /etc/hosts)" = "new content" ]; do sleep 0.05; done; cat /etc/hosts; echo the end >/dev/message`)
	j.spec.Mounts = append(j.spec.Mounts, bind(src+"/hosts", "/etc/hosts", "rw"), bind(src+"/message", "/dev/message", "rw"))
	j.until = "old\n" // the first cat has ended
	j.started = func(string) {
		v.put("hosts", false, file("hosts", "new content"))
	}
	if got := v.must(j); got != "old\nnew content" {
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
	j.until = "1048576\n"
	j.started = func(id string) {
		limit, shares, quota := int64(64<<20), uint64(2048), int64(30000)
		req := &guestv1.UpdateRequest{ContainerId: id, Resources: flatspec.Resources(&specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Shares: &shares, Quota: &quota, Period: &period},
		})}
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
	deadline := time.Now().Add(patience)
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
	deadline := time.Now().Add(patience)
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
	if got := v.must(sh(`orphan=$(sh -c '(sleep 0.1; exit) >/dev/null & echo $!'); n=0
		while [ -e /proc/$orphan ] && [ $n -lt 600 ]; do n=$((n+1)); sleep 0.1; done
		ps -o stat | grep -c Z || true`)); got != "0" {
		t.Errorf("%s zombies", got)
	}
	if got := v.must(sh("ps -o args | grep -c '[s]leep 4321'; cat /proc/1/comm")); got != "1\npause" {
		t.Errorf("got %q", got)
	}
}

func TestShutdown(t *testing.T) {
	v := start(t, nil)
	j := sh("sleep 1000")
	if err := v.create(j); err != nil {
		t.Fatal(err)
	}
	if _, err := v.guest.Start(t.Context(), &guestv1.ProcessRequest{ContainerId: j.id}); err != nil {
		t.Fatal(err)
	}
	_, err := v.guest.Shutdown(t.Context(), &guestv1.Empty{}) // a guest that starves ends before its answer leaves
	select {
	case <-v.exited:
	case <-time.After(patience):
		t.Fatalf("still running: %v", err)
	}
}

// The scratch file system has project quota: usage is exact and a volume's size is a limit.
func testQuota(t *testing.T, v *vm) {
	req := &guestv1.CreateVolumeRequest{Id: "small", Kind: guestv1.CreateVolumeRequest_SCRATCH, SizeBytes: 1 << 20, Mode: 0o777}
	if _, err := v.guest.CreateVolume(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	j := sh("dd if=/dev/zero of=/v/f bs=65536 count=32 2>/dev/null || echo full; rm /v/f; dd if=/dev/zero of=/v/f bs=65536 count=8 2>/dev/null && echo fits")
	j.spec.Mounts = append(j.spec.Mounts, bind(channel.VolumesDir+"/small", "/v", "rw"))
	if got := v.must(j); got != "full\nfits" {
		t.Errorf("got %q", got)
	}
	c := v.background(sh("dd if=/dev/zero of=/file bs=65536 count=64 2>/dev/null; touch /done; sleep 1000"))
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		var small uint64
		for _, u := range v.mustStats("").Volumes {
			if u.Id == "small" {
				small = u.UsedBytes
			}
		}
		if s := v.mustStats(c); s.RootfsUsedBytes >= 4<<20 && s.RootfsUsedInodes > 0 && small >= 512<<10 && small < 700<<10 {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("layer %d bytes, volume %d", s.RootfsUsedBytes, small)
		}
	}
}
