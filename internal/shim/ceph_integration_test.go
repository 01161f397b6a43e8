//go:build integration && ceph

package shim_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/datastore/keys"
	"atoll.dev/atoll/internal/storage/datastore/rbd"
	"atoll.dev/atoll/internal/storage/datastore/rbd/cephtest"
)

// cephAgent stands for the agent of a host with a datastore in Ceph. Each pod is a holder of its own.
type cephAgent struct {
	*host
	cluster *cephtest.Cluster
	store   *chain.Store
}

func (h *host) newCephAgent() *cephAgent {
	h.t.Helper()
	c := cephtest.Start(h.t, true)
	store, err := rbd.New(rbd.Config{
		Pool: cephtest.Pool, Conf: c.Conf, User: cephtest.User, Timeout: 10 * time.Second,
		Keys: keys.Wrapper{Source: keys.Static{"gold": {[]byte(strings.Repeat("g", keys.Size))}}},
	})
	if err == nil {
		_, err = store.Init(h.t.Context())
	}
	if err != nil {
		h.t.Fatal(err)
	}
	a := &cephAgent{host: h, cluster: c, store: store}
	l, err := attach.Listen(attach.AgentSocket(h.run))
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.t.Cleanup(cancel)
	go func() {
		_ = attach.Serve(ctx, l, map[string]attach.Handler{attach.MethodOpen: attach.Handle(a.open)})
	}()
	return a
}

func (a *cephAgent) open(ctx context.Context, r attach.OpenRequest) (o attach.Opened, err error) {
	if o.Disk, err = a.store.Attach(ctx, r.Volume, r.Pod, datastore.ReadWrite); err != nil {
		return attach.Opened{}, err
	}
	if o.Keys, err = a.store.Unlock(ctx, o.Disk); err != nil {
		return attach.Opened{}, err
	}
	o.Ceph, err = a.store.Admit(ctx, o.Disk)
	return o, err
}

// ok ends the test on an error.
func (a *cephAgent) ok(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

func (a *cephAgent) create(s datastore.Spec) {
	a.t.Helper()
	s.Size = diskBytes
	_, err := a.store.Create(a.t.Context(), s)
	a.ok(err)
}

// use starts a pod with a container that has a volume at /data and sleeps.
func (a *cephAgent) use(id, volume string) (*pod, *container) {
	a.t.Helper()
	a.waitReady(1)
	p := a.runPod(id, nil)
	s := p.spec("/bin/sleep", "1000")
	s.Mounts = append(s.Mounts, p.publish("pvc", handover.Volume{ID: volume, FSType: "ext4"}, "/data"))
	c := p.mustCreate(id+"-a", s)
	begun := time.Now()
	c.start()
	a.t.Logf("%s has %s after %v", id, volume, time.Since(begun).Round(time.Millisecond))
	return p, c
}

// stop ends a pod and detaches its volumes.
func (a *cephAgent) stop(p *pod, volumes ...string) {
	a.t.Helper()
	p.stop()
	for _, v := range volumes {
		a.ok(a.store.Detach(a.t.Context(), v, p.uid))
	}
}

// Snapshot implements datastore.Live by the shim that has the volume.
func (l cephLive) Snapshot(ctx context.Context, overlay handover.Layer, key *handover.WrappedKey) error {
	r := attach.SnapshotRequest{Volume: l.volume, Overlay: overlay}
	disk := handover.Disk{Volume: l.volume, Layers: []handover.Layer{overlay}, ReadOnly: true}
	var err error
	if r.Ceph, err = l.store.Admit(ctx, disk); err != nil {
		return err
	}
	if key != nil {
		disk.Keys = map[string]handover.WrappedKey{overlay.Key: *key}
		unlocked, err := l.store.Unlock(ctx, disk)
		if err != nil {
			return err
		}
		r.Key = unlocked[overlay.Key]
	}
	return l.call(attach.MethodSnapshot, r)
}

// Resize implements datastore.Live.
func (l cephLive) Resize(_ context.Context, bytes int64) error {
	return l.call(attach.MethodResize, attach.ResizeRequest{Volume: l.volume, Bytes: bytes})
}

type cephLive struct {
	*cephAgent
	volume string
}

func (l cephLive) call(method string, params any) error {
	l.t.Helper()
	records, err := attach.NewRecords(l.run).Find(l.volume)
	if err != nil || len(records) != 1 {
		l.t.Fatalf("records of %s: %v, %v", l.volume, records, err)
	}
	return attach.Call(l.t.Context(), records[0].Socket, method, params, nil)
}

// sound wants nothing wrong with the datastore. What QEMU had allocated when it was killed may leak.
func (a *cephAgent) sound() {
	a.t.Helper()
	report, err := a.store.Check(a.t.Context(), nil)
	a.ok(err)
	for _, p := range report.Problems {
		if p.Kind != datastore.ProblemLeak {
			a.t.Errorf("%+v", p)
		}
	}
}

// TestCephDisks: what pods do with volumes that their QEMUs open in a Ceph cluster with authentication.
func TestCephDisks(t *testing.T) {
	h := newHost(t, 1)
	a := h.newCephAgent()
	for _, test := range []struct {
		name string
		run  func(*cephAgent)
	}{
		{"Life", cephLife},
		{"Live", cephLiveChanges},
		{"Killed", cephKilled},
		{"GivenUp", cephGivenUp},
		{"Outage", cephOutage},
		{"Unreachable", cephUnreachable},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := *a
			b.host = h.in(t)
			test.run(&b)
			if test.name != "Unreachable" {
				b.sound()
			}
		})
	}
}

// cephLife: an encrypted volume is written by one pod and read by the next; the key is nowhere.
func cephLife(a *cephAgent) {
	a.create(datastore.Spec{ID: "life", Encryption: "gold"})
	p, c := a.use("life-1", "life")
	c.sh("echo kept > /data/file; sync")
	pid := fmt.Sprint(p.pid)
	for _, file := range []string{"cmdline", "environ"} {
		data, err := os.ReadFile(filepath.Join("/proc", pid, file))
		a.ok(err)
		if strings.Contains(string(data), a.cluster.Key()) || strings.Contains(string(data), "ceph") {
			a.t.Errorf("%s of QEMU: %q", file, data)
		}
	}
	status, err := os.ReadFile(filepath.Join("/proc", pid, "status"))
	a.ok(err)
	for _, want := range []string{"Seccomp:\t2", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"} {
		if !strings.Contains(string(status), want) {
			a.t.Errorf("QEMU lacks %q", want)
		}
	}
	if strings.Contains(string(status), "Uid:\t0") {
		a.t.Error("QEMU is root")
	}
	links, err := filepath.Glob("/proc/" + pid + "/fd/*")
	a.ok(err)
	for _, l := range links {
		if to, _ := os.Readlink(l); strings.Contains(to, "ceph") {
			a.t.Errorf("QEMU has %s open still", to)
		}
	}
	here, err := os.Readlink("/proc/self/ns/net")
	a.ok(err)
	if its, err := os.Readlink("/proc/" + pid + "/ns/net"); err != nil || its != here {
		a.t.Errorf("QEMU is in the network namespace %s, not %s: %v", its, here, err)
	}
	a.stop(p, "life")
	q, d := a.use("life-2", "life")
	if got := d.sh("cat /data/file"); got != "kept\n" {
		a.t.Errorf("the next pod reads %q", got)
	}
	a.stop(q, "life")
	a.ok(a.store.Delete(a.t.Context(), "life"))
}

// cephLiveChanges: two snapshots, growth and limits while a container writes, in clear and encrypted.
func cephLiveChanges(a *cephAgent) {
	ctx := a.t.Context()
	for class, id := range map[string]string{"": "live", "gold": "live-gold"} {
		a.create(datastore.Spec{ID: id, Encryption: class})
		p, c := a.use(id+"-1", id)
		live := cephLive{a, id}
		for i := range 2 {
			c.sh(fmt.Sprintf("echo %d > /data/%d; sync", i, i))
			_, err := a.store.Snapshot(ctx, fmt.Sprintf("%s-s%d", id, i), id, live)
			a.ok(err)
		}
		c.sh("echo after > /data/after; sync")
		disk, err := a.store.Attach(ctx, id, p.uid, datastore.ReadWrite)
		a.ok(err)
		for i, l := range disk.Layers {
			locked := a.cluster.Run("rbd", "lock", "ls", l.RBD.Pool+"/"+l.RBD.Image) != ""
			if top := i == len(disk.Layers)-1; locked != top {
				a.t.Errorf("layer %d of %d is open for writing: %t", i, len(disk.Layers), locked)
			}
		}
		const larger = 2 * diskBytes
		_, err = a.store.Expand(ctx, id, larger, live)
		a.ok(err)
		a.ok(live.call(attach.MethodGrow, attach.ResizeRequest{Volume: id, Bytes: larger}))
		if got := c.sh("stat -f -c '%b %S' /data"); blocksOf(a, got) < larger*8/10 {
			a.t.Errorf("after growing: %s", got)
		}
		a.ok(live.call(attach.MethodLimit, attach.LimitRequest{Volume: id, Limits: attach.Limits{Bytes: 1 << 20}}))
		start := time.Now()
		c.sh("dd if=/dev/zero of=/data/zero bs=65536 count=64 conv=fsync 2>/dev/null")
		if took := time.Since(start); took < 2*time.Second {
			a.t.Errorf("4 MiB at 1 MiB per second took %v", took)
		}
		// A copy of the first snapshot while the volume is open.
		_, err = a.store.Create(ctx, datastore.Spec{ID: id + "-copy", Source: &datastore.Source{Snapshot: id + "-s0"}, Encryption: class})
		a.ok(err)
		q, d := a.use(id+"-2", id+"-copy")
		if got := d.sh("cat /data/0; test -e /data/1 || echo missing"); got != "0\nmissing\n" {
			a.t.Errorf("a copy of the first snapshot: %q", got)
		}
		if got := c.sh("cat /data/0 /data/1 /data/after"); got != "0\n1\nafter\n" {
			a.t.Errorf("the volume: %q", got)
		}
		a.stop(q, id+"-copy")
		a.stop(p, id)
		q, d = a.use(id+"-3", id)
		if got := d.sh("cat /data/0 /data/1 /data/after"); got != "0\n1\nafter\n" {
			a.t.Errorf("the volume in the next pod: %q", got)
		}
		a.stop(q, id)
		for i := range 2 {
			a.ok(a.store.DeleteSnapshot(ctx, fmt.Sprintf("%s-s%d", id, i)))
		}
		a.ok(a.store.Delete(ctx, id+"-copy"))
		a.ok(a.store.Delete(ctx, id))
	}
}

// blocksOf is what stat -f says, in bytes.
func blocksOf(a *cephAgent, text string) int64 {
	var blocks, size int64
	_, err := fmt.Sscan(text, &blocks, &size)
	a.ok(err)
	return blocks * size
}

// cephKilled: when QEMU is killed while it writes, the next pod has all that was acknowledged, at once.
func cephKilled(a *cephAgent) {
	a.create(datastore.Spec{ID: "killed"})
	a.waitReady(1)
	p := a.runPod("killed-1", nil)
	mount := p.publish("pvc", handover.Volume{ID: "killed", FSType: "ext4"}, "/data")
	c := p.writer("killed-1-a", mount, 1)
	eventually(a.t, "something is written", func() bool { return len(c.sh("ls /data")) > 40 })
	a.ok(unix.Kill(int(p.pid), unix.SIGKILL))
	eventually(a.t, "QEMU ends", func() bool { return !alive(int(p.pid)) })
	c.ended()
	acknowledged := last(a.t, c.stdout.String(), 0)
	a.stop(p, "killed")
	begun := time.Now()
	q, d := a.use("killed-2", "killed")
	// Ceph notices by itself after 30 s.
	if took := time.Since(begun); took > 25*time.Second {
		a.t.Errorf("the next pod had to wait for %v", took)
	}
	script := fmt.Sprintf("for i in $(seq 1 %d); do test \"$(cat /data/$i)\" = $i || echo $i is missing; done", acknowledged)
	if got := d.sh(script); got != "" || acknowledged < 5 {
		a.t.Errorf("of %d: %s", acknowledged, got)
	}
	a.t.Logf("%d acknowledged writes", acknowledged)
	// And when it is deleted just after that.
	a.ok(unix.Kill(int(q.pid), unix.SIGKILL))
	eventually(a.t, "QEMU ends", func() bool { return !alive(int(q.pid)) })
	a.stop(q, "killed")
	a.ok(a.store.Delete(a.t.Context(), "killed"))
}

// cephGivenUp: the volume of a host that was given up, but lives, goes to another pod: the first can write no more.
func cephGivenUp(a *cephAgent) {
	ctx := a.t.Context()
	a.create(datastore.Spec{ID: "given"})
	p, c := a.use("given-1", "given")
	c.sh("echo first > /data/file; sync")
	a.waitReady(1)
	q := a.runPod("given-2", nil)
	s := q.spec("/bin/sleep", "1000")
	s.Mounts = append(s.Mounts, q.publish("pvc", handover.Volume{ID: "given", FSType: "ext4"}, "/data"))
	if err := q.refusal("given-2-a", s); err == nil || !strings.Contains(err.Error(), "is attached") {
		a.t.Errorf("a second pod: %v", err)
	}
	a.ok(a.store.Detach(ctx, "given", p.uid))
	d := q.mustCreate("given-2-b", s)
	d.start()
	if got := d.sh("cat /data/file; echo second > /data/file; sync; cat /data/file"); got != "first\nsecond\n" {
		a.t.Errorf("the second pod: %q", got)
	}
	if got := c.sh("dd if=/dev/zero of=/data/late bs=4096 count=1 conv=fsync 2>/dev/null || echo cut off"); got != "cut off\n" {
		a.t.Errorf("the first pod writes: %q", got)
	}
	if got := d.sh("test -e /data/late || cat /data/file"); got != "second\n" {
		a.t.Errorf("the second pod afterwards: %q", got)
	}
	a.stop(q, "given")
	p.stop()
	a.ok(a.store.Delete(ctx, "given"))
}

// cephOutage: a guest waits for its disk while the cluster does not answer, and goes on.
func cephOutage(a *cephAgent) {
	a.create(datastore.Spec{ID: "outage"})
	p, c := a.use("outage-1", "outage")
	c.sh("echo before > /data/before; sync")
	a.cluster.Kill("osd")
	written := make(chan string, 1)
	go func() {
		written <- c.sh("dd if=/dev/zero of=/data/during bs=65536 count=16 conv=fsync 2>/dev/null && cat /data/before")
	}()
	select {
	case got := <-written:
		a.t.Errorf("written without a cluster: %q", got)
	case <-time.After(3 * time.Second): // nothing to wait for: it must not happen
	}
	if got := c.sh("echo alive"); got != "alive\n" {
		a.t.Errorf("the guest meanwhile: %q", got)
	}
	a.cluster.Resume("osd")
	select {
	case got := <-written:
		if got != "before\n" {
			a.t.Errorf("after the outage: %q", got)
		}
	case <-time.After(2 * time.Minute):
		a.t.Fatal("the guest did not go on")
	}
	a.stop(p, "outage")
	a.ok(a.store.Delete(a.t.Context(), "outage"))
}

// cephUnreachable: without a monitor a pod is refused in time, and a volume on a directory works.
func cephUnreachable(a *cephAgent) {
	a.create(datastore.Spec{ID: "gone"})
	a.cluster.Kill("mon")
	a.waitReady(1)
	p := a.runPod("gone-1", nil)
	s := p.spec("/bin/sh", "-c", "echo fine")
	with := *s
	with.Mounts = append([]specs.Mount{p.publish("pvc", handover.Volume{ID: "gone", FSType: "ext4"}, "/data")}, s.Mounts...)
	begun := time.Now()
	err := p.refusal("gone-1-a", &with)
	if took := time.Since(begun); err == nil || !strings.Contains(err.Error(), "not available") || took > 40*time.Second {
		a.t.Errorf("after %v: %v", took, err)
	}
	if got := p.run("gone-1-b", s).stdout.String(); got != "fine\n" {
		a.t.Errorf("another container: %q", got)
	}
	p.stop()
}
