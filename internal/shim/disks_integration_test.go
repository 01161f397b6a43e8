//go:build integration

package shim_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
)

// agent stands for the agent of a host: it knows how volumes are opened.
type agent struct {
	*host
	mu    sync.Mutex
	disks map[string]*attach.Opened
}

const diskBytes = 1 << 30

func (h *host) newAgent() *agent {
	h.t.Helper()
	a := &agent{host: h, disks: map[string]*attach.Opened{}}
	l, err := attach.Listen(attach.AgentSocket(h.run))
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.t.Cleanup(cancel)
	go func() {
		_ = attach.Serve(ctx, l, map[string]attach.Handler{
			attach.MethodOpen: attach.Handle(func(_ context.Context, r attach.OpenRequest) (attach.Opened, error) {
				a.mu.Lock()
				defer a.mu.Unlock()
				if d := a.disks[r.Volume]; d != nil {
					return *d, nil
				}
				return attach.Opened{}, errors.New("no such volume")
			}),
		})
	}()
	return a
}

// layer makes an empty layer over others.
func (a *agent) layer(id, backing string) handover.Layer {
	a.t.Helper()
	file := filepath.Join(a.dir, id+".qcow2")
	args := []string{"create", "-q", "-f", "qcow2", file, strconv.Itoa(diskBytes)}
	if backing != "" {
		args = append(args, "-b", backing, "-F", "qcow2")
	}
	command(a.t, "qemu-img", args...)
	return handover.Layer{ID: id, File: file, Format: handover.FormatQCOW2, Size: diskBytes}
}

// volume makes a blank volume of two layers.
func (a *agent) volume(id string) *attach.Opened {
	a.t.Helper()
	base := a.layer(id+"-base", "")
	a.mu.Lock()
	defer a.mu.Unlock()
	a.disks[id] = &attach.Opened{Disk: handover.Disk{Volume: id, Size: diskBytes, Layers: []handover.Layer{base, a.layer(id+"-top", base.File)}}}
	return a.disks[id]
}

// publish does what the CSI node service does for a pod, and returns the mount.
func (p *pod) publish(name string, v handover.Volume, dest string) specs.Mount {
	p.t.Helper()
	dir := filepath.Join(p.volume("csi", name), "mount")
	if err := errors.Join(os.MkdirAll(dir, 0o750), v.Write(handover.PublishedVolume(p.kubelet, p.uid, name))); err != nil {
		p.t.Fatal(err)
	}
	return specs.Mount{Destination: dest, Type: "bind", Source: dir, Options: []string{"rbind", "rprivate", "rw"}}
}

// shimCall asks the shim that has a volume.
func (a *agent) shimCall(volume, method string, params, result any) error {
	a.t.Helper()
	records, err := attach.NewRecords(a.run).Find(volume)
	if err != nil || len(records) != 1 {
		a.t.Fatalf("records of %s: %v, %v", volume, records, err)
	}
	return attach.Call(a.t.Context(), records[0].Socket, method, params, result)
}

// free fails when an image is still locked or not in order.
func (a *agent) free(files ...string) {
	a.t.Helper()
	for _, f := range files {
		command(a.t, "qemu-io", "-f", "qcow2", "-c", "read 0 512", f) // takes the lock for writing
		command(a.t, "qemu-img", "check", "-q", f)
	}
}

// survived is free for an image whose QEMU was killed: clusters may be allocated that nothing refers to, which
// qemu-img reports with status 3 and which costs room only.
func (a *agent) survived(file string) {
	a.t.Helper()
	command(a.t, "qemu-io", "-f", "qcow2", "-c", "read 0 512", file)
	out, err := exec.Command("qemu-img", "check", "-q", file).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 3) {
		a.t.Errorf("qemu-img check: %v\n%s", err, out)
	}
}

// TestDisks goes through what pods do with persistent volumes.
func TestDisks(t *testing.T) {
	h := newHost(t, 1)
	a := h.newAgent()
	for _, test := range []struct {
		name string
		run  func(*testing.T, *agent)
	}{
		{"Life", testDiskLife},
		{"Live", testDiskLive},
		{"Block", testDiskBlock},
		{"ReadOnly", testDiskReadOnly},
		{"Refused", testDiskRefused},
		{"QEMUKilled", testDiskQEMUKilled},
		{"ShimKilled", testDiskShimKilled},
	} {
		t.Run(test.name, func(t *testing.T) {
			h.waitReady(1)
			test.run(t, &agent{host: h.in(t), disks: a.disks})
		})
	}
}

// testDiskLife: a pod writes, with two containers, a group and sub paths; the next one reads.
func testDiskLife(t *testing.T, a *agent) {
	d := a.volume("life")
	group := uint32(3000)
	v := handover.Volume{ID: "life", FSType: "ext4", MountOptions: []string{"noatime"}, FSGroup: &group}
	p := a.runPod("disk-1", nil)
	mount := p.publish("pvc-life", v, "/data")
	s := p.spec("/bin/sleep", "1000")
	s.Mounts = append(s.Mounts, mount)
	start := time.Now()
	c := p.mustCreate("disk-1-a", s)
	c.start()
	t.Logf("first container with formatting after %v", time.Since(start))
	sub := p.spec("/bin/sleep", "1000")
	below := mount
	below.Source, below.Destination = mount.Source+"/deep/er", "/sub"
	ro := mount
	ro.Destination, ro.Options = "/ro", []string{"rbind", "rprivate", "ro"}
	sub.Mounts = append(sub.Mounts, below, ro)
	sub.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{group}}
	c2 := p.mustCreate("disk-1-b", sub)
	c2.start()
	if got := c.sh("stat -c '%a %g' /data; echo kept > /data/file; grep ' /data ' /proc/mounts | wc -l"); got != "2775 3000\n1\n" {
		t.Errorf("got %q", got)
	}
	if got := c2.sh("echo mine > /sub/mine; cat /ro/file; stat -c '%g' /sub/mine; echo x > /ro/x || echo refused"); got != "kept\n3000\nrefused\n" {
		t.Errorf("got %q", got)
	}
	var st attach.Stats
	if err := a.shimCall("life", attach.MethodStats, attach.VolumeRequest{Volume: "life"}, &st); err != nil || st.Capacity < diskBytes*8/10 || st.Inodes == 0 {
		t.Errorf("stats: %+v, %v", st, err)
	}
	p.stop()
	if records, err := attach.NewRecords(a.run).Find("life"); err != nil || len(records) != 0 {
		t.Errorf("records after the end: %v, %v", records, err)
	}
	a.free(d.Disk.Layers[1].File)
	a.waitReady(1)
	q := a.runPod("disk-2", nil)
	s = q.spec("/bin/sh", "-c", "cat /data/file /data/deep/er/mine")
	s.Mounts = append(s.Mounts, q.publish("pvc-life", v, "/data"))
	start = time.Now()
	if got := q.run("disk-2-a", s).stdout.String(); got != "kept\nmine\n" {
		t.Errorf("the next pod reads %q", got)
	}
	t.Logf("run with a volume that has a file system: %v", time.Since(start))
	q.stop()
}

// testDiskLive: snapshot, growth and limits while a container writes.
func testDiskLive(t *testing.T, a *agent) {
	for _, fsType := range []string{"ext4", "xfs"} {
		id := "live-" + fsType
		d := a.volume(id)
		p := a.runPod(id, nil)
		s := p.spec("/bin/sleep", "1000")
		s.Mounts = append(s.Mounts, p.publish("pvc", handover.Volume{ID: id, FSType: fsType}, "/data"))
		c := p.mustCreate(id+"-a", s)
		c.start()
		c.sh("echo one > /data/one; sync")
		top := d.Disk.Layers[1]
		overlay := a.layer(id+"-overlay", top.File)
		for range 2 { // the second time it is there already
			if err := a.shimCall(id, attach.MethodSnapshot, attach.SnapshotRequest{Volume: id, Overlay: overlay}, nil); err != nil {
				t.Fatal(err)
			}
		}
		c.sh("echo two > /data/two; sync")
		var status attach.Status
		if err := a.shimCall(id, attach.MethodStatus, attach.VolumeRequest{Volume: id}, &status); err != nil || len(status.Layers) != 3 || status.Layers[2] != overlay.ID {
			t.Errorf("status: %+v, %v", status, err)
		}
		const larger = 3 * diskBytes
		for _, method := range []string{attach.MethodResize, attach.MethodGrow, attach.MethodResize, attach.MethodGrow} {
			if err := a.shimCall(id, method, attach.ResizeRequest{Volume: id, Bytes: larger}, nil); err != nil {
				t.Fatalf("%s: %s: %v", fsType, method, err)
			}
		}
		if err := a.shimCall(id, attach.MethodResize, attach.ResizeRequest{Volume: id, Bytes: diskBytes}, nil); err == nil {
			t.Error("the volume shrank")
		}
		var st attach.Stats
		if err := a.shimCall(id, attach.MethodStats, attach.VolumeRequest{Volume: id}, &st); err != nil || st.Capacity < larger*8/10 {
			t.Errorf("%s: stats after growth: %+v, %v", fsType, st, err)
		}
		if err := a.shimCall(id, attach.MethodLimit, attach.LimitRequest{Volume: id, Limits: attach.Limits{Bytes: 1 << 20}}, nil); err != nil {
			t.Error(err)
		}
		start := time.Now()
		c.sh("dd if=/dev/zero of=/data/zero bs=65536 count=64 conv=fsync 2>/dev/null")
		if took := time.Since(start); took < 2*time.Second {
			t.Errorf("4 MiB at 1 MiB per second took %v", took)
		}
		if err := a.shimCall(id, attach.MethodStats, attach.VolumeRequest{Volume: "x"}, nil); !errors.Is(err, attach.ErrNotFound) {
			t.Errorf("stats of a volume that is not there: %v", err)
		}
		p.stop()
		d.Disk.Layers, d.Disk.Size = append(d.Disk.Layers, overlay), larger
		a.free(overlay.File)
		a.waitReady(1)
		// A copy of the snapshot has what was synchronized before it; the volume has all.
		a.disks[id+"-copy"] = &attach.Opened{Disk: handover.Disk{
			Volume: id + "-copy", Size: diskBytes, Layers: []handover.Layer{d.Disk.Layers[0], top, a.layer(id+"-copy", top.File)},
		}}
		q := a.runPod(id+"-2", nil)
		s = q.spec("/bin/sh", "-c", "cat /data/one /data/two /copy/one; test -e /copy/two || echo missing")
		s.Mounts = append(s.Mounts, q.publish("pvc", handover.Volume{ID: id, FSType: fsType}, "/data"),
			q.publish("pvc-copy", handover.Volume{ID: id + "-copy", FSType: fsType}, "/copy"))
		if got := q.run(id+"-2-a", s).stdout.String(); got != "one\ntwo\none\nmissing\n" {
			t.Errorf("%s: volume and copy of the snapshot: %q", fsType, got)
		}
		q.stop()
		a.waitReady(1)
	}
}

// testDiskBlock: a volume as a device.
func testDiskBlock(t *testing.T, a *agent) {
	d := a.volume("block")
	p := a.runPod("block", nil)
	stand := handover.Device{Major: 7, Minor: 4711}
	p.publish("pvc-block", handover.Volume{ID: "block", Block: &stand}, "")
	s := p.spec("/bin/sh", "-c", "printf atoll > /dev/volume; head -c 5 /dev/volume; mount -t ext4 /dev/volume /tmp || echo no")
	mode := os.FileMode(0o660)
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/volume", Type: "b", Major: stand.Major, Minor: stand.Minor, FileMode: &mode}}
	if got := p.run("block-a", s).stdout.String(); got != "atollno\n" {
		t.Errorf("got %q", got)
	}
	s = p.spec("/bin/true")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/volume", Type: "b", Major: stand.Major, Minor: stand.Minor + 1}}
	if err := p.refusal("block-b", s); err == nil || !strings.Contains(err.Error(), "not possible in a micro-VM") {
		t.Errorf("a device of the host: %v", err)
	}
	p.stop()
	a.free(d.Disk.Layers[1].File)
	raw := filepath.Join(a.dir, "block.raw")
	command(t, "qemu-img", "convert", "-O", "raw", d.Disk.Layers[1].File, raw)
	if data, err := os.ReadFile(raw); err != nil || string(data[:5]) != "atoll" {
		t.Errorf("on the volume: %q, %v", data[:5], err)
	}
}

// testDiskReadOnly: many pods may read one volume, nobody can write to it.
func testDiskReadOnly(t *testing.T, a *agent) {
	d := a.volume("ro")
	p := a.runPod("ro-1", nil)
	s := p.spec("/bin/sh", "-c", "echo shared > /data/file")
	s.Mounts = append(s.Mounts, p.publish("pvc", handover.Volume{ID: "ro", FSType: "ext4"}, "/data"))
	p.run("ro-1-a", s)
	p.stop()
	d.Disk.ReadOnly = true
	var pods []*pod
	for i := range 2 {
		a.waitReady(1)
		q := a.runPod(fmt.Sprintf("ro-r%d", i), nil)
		s := q.spec("/bin/sh", "-c", "cat /data/file; echo x > /data/x || echo refused")
		s.Mounts = append(s.Mounts, q.publish("pvc", handover.Volume{ID: "ro", FSType: "ext4"}, "/data"))
		if got := q.run(fmt.Sprintf("ro-r%d-a", i), s).stdout.String(); got != "shared\nrefused\n" {
			t.Errorf("got %q", got)
		}
		pods = append(pods, q)
	}
	for _, q := range pods {
		q.stop()
	}
}

// testDiskRefused: volumes that cannot be had, and a second writer.
func testDiskRefused(t *testing.T, a *agent) {
	a.volume("twice")
	p := a.runPod("refused-1", nil)
	s := p.spec("/bin/sleep", "1000")
	s.Mounts = append(s.Mounts, p.publish("pvc", handover.Volume{ID: "twice", FSType: "ext4"}, "/data"))
	p.mustCreate("refused-1-a", s).start()
	a.waitReady(1)
	q := a.runPod("refused-2", nil)
	foreign := q.publish("pvc-foreign", handover.Volume{ID: "x"}, "/data")
	if err := os.Remove(handover.PublishedVolume(q.kubelet, q.uid, "pvc-foreign")); err != nil {
		t.Fatal(err)
	}
	other := a.volume("other")
	other.Disk.Layers = []handover.Layer{{ID: "etc", File: "/etc/passwd", Format: handover.FormatQCOW2}}
	for what, test := range map[string]struct {
		mount specs.Mount
		want  string
	}{
		"second writer":     {q.publish("pvc-twice", handover.Volume{ID: "twice", FSType: "ext4"}, "/data"), "in use by another process"},
		"unknown volume":    {q.publish("pvc-none", handover.Volume{ID: "none", FSType: "ext4"}, "/data"), "no such volume"},
		"another driver":    {foreign, "another CSI driver"},
		"no image":          {q.publish("pvc-other", handover.Volume{ID: "other", FSType: "ext4"}, "/data"), "not a qcow2 image"},
		"unknown file type": {q.publish("pvc-type", handover.Volume{ID: a.volume("type").Disk.Volume, FSType: "btrfs"}, "/data"), "use ext4 or xfs"},
		"mount option":      {q.publish("pvc-option", handover.Volume{ID: a.volume("option").Disk.Volume, FSType: "ext4", MountOptions: []string{"nonsense"}}, "/data"), "nonsense"},
	} {
		s := q.spec("/bin/true")
		s.Mounts = append(s.Mounts, test.mount)
		if err := q.refusal("refused-"+strings.ReplaceAll(what, " ", "-"), s); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	q.stop()
	p.stop()
	for _, v := range []string{"twice", "type", "option"} {
		a.free(a.disks[v].Disk.Layers[1].File)
	}
}

// writer is a container that writes numbers, each into a file of its own that it synchronizes before it says so.
func (p *pod) writer(id string, mount specs.Mount, from int) *container {
	p.t.Helper()
	script := fmt.Sprintf(`i=%d; while true; do echo $i | dd of=/data/$i conv=fsync 2>/dev/null && echo $i; i=$((i+1)); done`, from)
	s := p.spec("/bin/sh", "-c", script)
	s.Mounts = append(s.Mounts, mount)
	c := p.mustCreate(id, s)
	c.start()
	return c
}

// last is the last number that a writer has acknowledged.
func last(t testing.TB, out string, before int) int {
	t.Helper()
	for line := range strings.Lines(out) {
		text, whole := strings.CutSuffix(line, "\n")
		if n, err := strconv.Atoi(text); err == nil && whole {
			before = n
		}
	}
	return before
}

// killed kills something while a container writes, several times: no acknowledged number is missing, and the
// volume can be opened at once. What is killed is the shim, or something that a shim outlives.
func killed(t *testing.T, a *agent, id string, shim bool, kill func(*pod)) {
	d := a.volume(id)
	acknowledged := 0
	for round := range 4 {
		a.waitReady(1)
		p := a.runPod(fmt.Sprintf("%s-%d", id, round), nil)
		mount := p.publish("pvc", handover.Volume{ID: id, FSType: "ext4"}, "/data")
		if round > 0 {
			s := p.spec("/bin/sh", "-c", fmt.Sprintf("for i in $(seq 1 %d); do test \"$(cat /data/$i)\" = $i || echo $i is missing; done", acknowledged))
			s.Mounts = append(s.Mounts, mount)
			if got := p.run(fmt.Sprintf("%s-%d-check", id, round), s).stdout.String(); got != "" {
				t.Fatalf("round %d, of %d: %s", round, acknowledged, got)
			}
		}
		c := p.writer(fmt.Sprintf("%s-%d-write", id, round), mount, acknowledged+1)
		eventually(t, "two writes are acknowledged", func() bool {
			return last(t, c.stdout.String(), acknowledged) >= acknowledged+2
		})
		time.Sleep(time.Duration(300+200*round) * time.Millisecond) // somewhere in the middle
		kill(p)
		eventually(t, "QEMU ends", func() bool { return !alive(int(p.pid)) })
		c.ended()
		acknowledged = last(t, c.stdout.String(), acknowledged)
		a.survived(d.Disk.Layers[1].File)
		if shim {
			a.shimDelete(p.id)
		} else {
			p.stop()
		}
	}
	if acknowledged < 5 {
		t.Errorf("only %d writes were acknowledged", acknowledged)
	}
	t.Logf("%d acknowledged writes", acknowledged)
}

func testDiskQEMUKilled(t *testing.T, a *agent) {
	killed(t, a, "qemu-kill", false, func(p *pod) { _ = unix.Kill(int(p.pid), unix.SIGKILL) })
}

func testDiskShimKilled(t *testing.T, a *agent) {
	killed(t, a, "shim-kill", true, func(p *pod) { _ = unix.Kill(p.shimPID(), unix.SIGKILL) })
}

// TestDiskLatency measures what a volume adds to the start of a pod: a tenth of a second on a quiet machine.
func TestDiskLatency(t *testing.T) {
	h := newHost(t, 1)
	a := h.newAgent()
	a.volume("latency")
	measure := func(name string, volume bool) time.Duration {
		h.waitReady(1)
		p := h.runPod(name, nil)
		defer p.stop()
		s := p.spec("/bin/true")
		if volume {
			s.Mounts = append(s.Mounts, p.publish("pvc", handover.Volume{ID: "latency", FSType: "ext4"}, "/data"))
		}
		start := time.Now()
		c := p.mustCreate(name+"-a", s)
		c.start()
		took := time.Since(start)
		c.wait()
		c.delete()
		return took
	}
	first := measure("latency-format", true)
	var with, without time.Duration
	const rounds = 4
	for i := range rounds {
		with += measure(fmt.Sprintf("latency-with-%d", i), true)
		without += measure(fmt.Sprintf("latency-without-%d", i), false)
	}
	t.Logf("create and start: %v without, %v with a volume, %v with one that is formatted", without/rounds, with/rounds, first)
}
