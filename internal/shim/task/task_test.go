package task

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	apievents "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/handover"
)

func TestLife(t *testing.T) {
	p := newPod(t)
	ctx := t.Context()
	score := 960
	created := p.create("c", func(s *specs.Spec) { s.Process.OOMScoreAdj = &score })
	if len(p.scores) != 1 || p.scores[0] != score {
		t.Errorf("scores %v", p.scores)
	}
	if e := next[*apievents.TaskCreate](t, p.events); e.Pid != created.Pid || e.Pid <= pidBase {
		t.Errorf("event %v", e)
	}
	if got := p.status("c", ""); got != "CREATED" {
		t.Errorf("status %s", got)
	}
	p.start("c", "")
	if e := next[*apievents.TaskStart](t, p.events); e.Pid != created.Pid {
		t.Errorf("event %v", e)
	}
	if _, err := p.Start(ctx, &api.StartRequest{ID: "c"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("second start: %v", err)
	}
	if _, err := p.Service.Delete(ctx, &api.DeleteRequest{ID: "c"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("delete while running: %v", err)
	}
	waited := make(chan *api.WaitResponse)
	go func() {
		resp, _ := p.Wait(ctx, &api.WaitRequest{ID: "c"})
		waited <- resp
	}()
	before := time.Now()
	p.guest.exit("c", "", 300, false) // the guest may say anything
	resp := <-waited
	if resp.ExitStatus != 300&0xff || resp.ExitedAt.AsTime().Before(before) {
		t.Errorf("wait %v", resp)
	}
	if e := next[*apievents.TaskExit](t, p.events); e.ContainerID != "c" || e.ID != "c" || e.ExitStatus != 300&0xff {
		t.Errorf("event %v", e)
	}
	if got := p.status("c", ""); got != "STOPPED" {
		t.Errorf("status %s", got)
	}
	if d, err := p.Service.Delete(ctx, &api.DeleteRequest{ID: "c"}); err != nil || d.ExitStatus != 300&0xff || d.Pid != created.Pid {
		t.Errorf("delete %v, %v", d, err)
	}
	next[*apievents.TaskDelete](t, p.events)
	if _, err := p.State(ctx, &api.StateRequest{ID: "c"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("state after delete: %v", err)
	}
	if p.guest.images != 0 {
		t.Errorf("%d images are left", p.guest.images)
	}
}

func TestCreateUnwinds(t *testing.T) {
	p := newPod(t)
	boom := errors.New("no space on scratch disk")
	p.guest.failNext = boom
	p.refused("c", boom.Error(), nil)
	if p.guest.images != 0 || len(p.containers) != 0 || len(p.events) != 0 {
		t.Errorf("left: %d images, %d containers, %d events", p.guest.images, len(p.containers), len(p.events))
	}
	p.guest.failNext = nil
	p.create("c", nil)
	if _, err := p.Create(t.Context(), p.request("c", nil)); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		t.Errorf("twice: %v", err)
	}
	for name, edit := range map[string]func(*api.CreateTaskRequest){
		"id": func(r *api.CreateTaskRequest) { r.ID = "../x" }, "bundle": func(r *api.CreateTaskRequest) { r.Bundle = "/none" },
		"image": func(r *api.CreateTaskRequest) { r.Rootfs = nil }, "stdout": func(r *api.CreateTaskRequest) { r.Stdout = "/none" },
		"checkpoint": func(r *api.CreateTaskRequest) { r.Checkpoint = "/x" },
	} {
		r := p.request("d", nil)
		edit(r)
		if _, err := p.Create(t.Context(), r); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	next[*apievents.TaskCreate](t, p.events) // of c
	p.refused("d", "more than there is", func(s *specs.Spec) {
		limit := int64(1 << 41)
		s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	})
	if len(p.containers) != 1 || p.guest.images != 1 {
		t.Errorf("left: %d containers, %d images", len(p.containers), p.guest.images)
	}
}

// TestKillWhilePreparing: a container whose guest is not ready can be given up, whether or not somebody waits
// to start it.
func TestKillWhilePreparing(t *testing.T) {
	p := newPod(t)
	p.ready = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	for _, id := range []string{"waited", "alone"} {
		if _, err := p.Create(t.Context(), p.request(id, nil)); err != nil {
			t.Fatal(err)
		}
		next[*apievents.TaskCreate](t, p.events)
	}
	started := make(chan error, 1)
	go func() {
		_, err := p.Start(t.Context(), &api.StartRequest{ID: "waited"})
		started <- err
	}()
	_, process, err := p.process("waited", "")
	if err != nil {
		t.Fatal(err)
	}
	waits := func() bool {
		process.mu.Lock()
		defer process.mu.Unlock()
		return process.starting
	}
	late := time.After(5 * time.Minute)
	for !waits() {
		select {
		case err := <-started:
			t.Fatalf("the start does not wait: %v", err)
		case <-late:
			t.Fatal("it is not started")
		case <-time.After(time.Millisecond):
		}
	}
	// Statistics do not wait.
	if _, err := p.Pids(t.Context(), &api.PidsRequest{ID: "waited"}); err != nil {
		t.Error(err)
	}
	if _, err := p.Kill(t.Context(), &api.KillRequest{ID: "waited", Signal: 9}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("kill: %v", err)
	}
	if err := <-started; err == nil {
		t.Error("started")
	}
	next[*apievents.TaskExit](t, p.events)
	for _, id := range []string{"waited", "alone"} {
		if _, err := p.Service.Delete(t.Context(), &api.DeleteRequest{ID: id}); err != nil {
			t.Errorf("deleting %s: %v", id, err)
		}
	}
	if len(p.containers) != 0 || p.guest.images != 0 {
		t.Errorf("left: %d containers, %d images", len(p.containers), p.guest.images)
	}
}

func TestStartFails(t *testing.T) {
	p := newPod(t)
	p.create("c", nil)
	next[*apievents.TaskCreate](t, p.events)
	p.guest.failStart = errors.New(`exec: "/bin/x": no such file`)
	if _, err := p.Start(t.Context(), &api.StartRequest{ID: "c"}); err == nil {
		t.Fatal("started")
	}
	if e := next[*apievents.TaskExit](t, p.events); e.ExitStatus != 128 {
		t.Errorf("event %v", e)
	}
	if _, err := p.Service.Delete(t.Context(), &api.DeleteRequest{ID: "c"}); err != nil {
		t.Error(err)
	}
}

func TestKillBeforeStart(t *testing.T) {
	p := newPod(t)
	p.create("c", nil)
	next[*apievents.TaskCreate](t, p.events)
	if _, err := p.Kill(t.Context(), &api.KillRequest{ID: "c", Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	if e := next[*apievents.TaskExit](t, p.events); e.ExitStatus != 137 {
		t.Errorf("event %v", e)
	}
	if _, err := p.Start(t.Context(), &api.StartRequest{ID: "c"}); err == nil {
		t.Error("started after it was killed")
	}
	if _, err := p.Kill(t.Context(), &api.KillRequest{ID: "c", Signal: 9}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("killed twice: %v", err)
	}
}

func TestExec(t *testing.T) {
	p := newPod(t)
	p.create("c", nil)
	p.start("c", "")
	value, err := json.Marshal(&specs.Process{Args: []string{"ls"}})
	if err != nil {
		t.Fatal(err)
	}
	r := &api.ExecProcessRequest{ID: "c", ExecID: "e", Spec: &anypb.Any{Value: value}}
	if _, err := p.Exec(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Exec(t.Context(), r); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		t.Errorf("twice: %v", err)
	}
	p.start("c", "e")
	p.guest.exit("c", "e", 3, false)
	if resp, err := p.Wait(t.Context(), &api.WaitRequest{ID: "c", ExecID: "e"}); err != nil || resp.ExitStatus != 3 {
		t.Errorf("wait %v, %v", resp, err)
	}
	next[*apievents.TaskCreate](t, p.events)
	next[*apievents.TaskStart](t, p.events)
	next[*apievents.TaskExecAdded](t, p.events)
	next[*apievents.TaskExecStarted](t, p.events)
	if e := next[*apievents.TaskExit](t, p.events); e.ID != "e" || e.ContainerID != "c" {
		t.Errorf("event %v", e)
	}
	if _, err := p.Service.Delete(t.Context(), &api.DeleteRequest{ID: "c", ExecID: "e"}); err != nil {
		t.Error(err)
	}
	if len(p.events) != 0 {
		t.Error("the end of an exec is reported as that of a task")
	}
	for name, bad := range map[string]*api.ExecProcessRequest{
		"no container": {ID: "x", ExecID: "e", Spec: r.Spec}, "id": {ID: "c", ExecID: "a b", Spec: r.Spec},
		"spec": {ID: "c", ExecID: "f", Spec: &anypb.Any{Value: []byte("{")}}, "no command": {ID: "c", ExecID: "f", Spec: &anypb.Any{Value: []byte("{}")}},
	} {
		if _, err := p.Exec(t.Context(), bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestGone: when the micro-VM ends, everything has ended with 137, execs first.
func TestGone(t *testing.T) {
	p := newPod(t)
	p.create("a", nil)
	p.start("a", "")
	value, _ := json.Marshal(&specs.Process{Args: []string{"sh"}})
	if _, err := p.Exec(t.Context(), &api.ExecProcessRequest{ID: "a", ExecID: "e", Spec: &anypb.Any{Value: value}}); err != nil {
		t.Fatal(err)
	}
	p.start("a", "e")
	for len(p.events) > 0 {
		<-p.events
	}
	at := time.Now()
	close(p.guest.gone)
	p.Gone(at)
	if e := next[*apievents.TaskExit](t, p.events); e.ID != "e" || e.ExitStatus != 137 {
		t.Errorf("event %v", e)
	}
	if e := next[*apievents.TaskExit](t, p.events); e.ID != "a" || e.ExitStatus != 137 || !e.ExitedAt.AsTime().Equal(at) {
		t.Errorf("event %v", e)
	}
	if _, err := p.Create(t.Context(), p.request("late", nil)); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("create: %v", err)
	}
	if _, err := p.Stats(t.Context(), &api.StatsRequest{ID: "a"}); err != nil {
		t.Errorf("stats: %v", err)
	}
	if _, err := p.Service.Delete(t.Context(), &api.DeleteRequest{ID: "a"}); err != nil {
		t.Errorf("delete: %v", err)
	}
}

func TestOOM(t *testing.T) {
	p := newPod(t)
	p.create("c", nil)
	p.start("c", "")
	next[*apievents.TaskCreate](t, p.events)
	next[*apievents.TaskStart](t, p.events)
	p.guest.exit("c", "", 137, true)
	if e := next[*apievents.TaskOOM](t, p.events); e.ContainerID != "c" {
		t.Errorf("event %v", e)
	}
	next[*apievents.TaskExit](t, p.events)
	resp, err := p.Stats(t.Context(), &api.StatsRequest{ID: "c"})
	if err != nil {
		t.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(resp.Stats)
	if err != nil {
		t.Fatal(err)
	}
	m := v.(*stats.Metrics)
	if m.GetMemoryEvents().GetOomKill() != 1 || m.GetCPU().GetUsageUsec() != 42 || len(m.GetIo().GetUsage()) != maxDevices {
		t.Errorf("metrics %v", m)
	}
	p.OOM("c")
	p.OOM("unknown")
	next[*apievents.TaskOOM](t, p.events)
}

// TestUsage: what the writable layer takes is written down; a report that fails does not harm the
// statistics.
func TestUsage(t *testing.T) {
	p := newPod(t)
	r := p.request("c", nil)
	if _, err := p.Create(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	p.start("c", "")
	file := handover.LayerUsage(r.Rootfs[0].Source)
	for range 2 {
		if _, err := p.Stats(t.Context(), &api.StatsRequest{ID: "c"}); err != nil {
			t.Fatal(err)
		}
		if u, _, err := handover.ReadUsage(file); err != nil || u.Bytes != 12345 || u.Inodes != 6 {
			t.Errorf("usage %+v, %v", u, err)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(file, "in", "the", "way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Stats(t.Context(), &api.StatsRequest{ID: "c"}); err != nil {
		t.Errorf("with a directory in the way: %v", err)
	}
	p.guest.exit("c", "", 0, false)
	next[*apievents.TaskCreate](t, p.events)
	next[*apievents.TaskStart](t, p.events)
	next[*apievents.TaskExit](t, p.events) // nothing is written down any more
}

func TestUpdate(t *testing.T) {
	p := newPod(t)
	limit := int64(100)
	p.create("a", func(s *specs.Spec) {
		s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	})
	p.create("b", func(s *specs.Spec) {
		s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	})
	limit = 250
	quota, period := int64(150000), uint64(100000)
	value, err := json.Marshal(&specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Quota: &quota, Period: &period, Cpus: "0-3"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Update(t.Context(), &api.UpdateTaskRequest{ID: "b", Resources: &anypb.Any{Value: value}}); err != nil {
		t.Fatal(err)
	}
	if p.kept != 1 {
		t.Errorf("CPU limit of the pod looked at %d times", p.kept)
	}
	want := []Resources{{Memory: 100}, {Memory: 200}, {Memory: 350, CPUs: 1.5}}
	for i, g := range p.grown {
		if i >= len(want) || g != want[i] {
			t.Fatalf("grown %v, want %v", p.grown, want)
		}
	}
	if len(p.guest.updates) != 1 || strings.Contains(string(p.guest.updates[0]), "0-3") {
		t.Errorf("updates %s", p.guest.updates)
	}
	limit = 1 << 41
	value, _ = json.Marshal(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})
	if _, err := p.Update(t.Context(), &api.UpdateTaskRequest{ID: "b", Resources: &anypb.Any{Value: value}}); err == nil {
		t.Error("an update that does not fit was accepted")
	}
	if p.containers["b"].limits.Memory != 250 {
		t.Errorf("limits %v", p.containers["b"].limits)
	}
}

// TestRestart: what containerd asks when it comes back.
func TestRestart(t *testing.T) {
	p := newPod(t)
	created := p.create("c", nil)
	if r, err := p.Connect(t.Context(), &api.ConnectRequest{ID: "sandbox"}); err != nil || r.TaskPid != 4711 || r.ShimPid == 0 {
		t.Errorf("sandbox: %v, %v", r, err)
	}
	if r, err := p.Connect(t.Context(), &api.ConnectRequest{ID: "c"}); err != nil || r.TaskPid != created.Pid {
		t.Errorf("container: %v, %v", r, err)
	}
	if _, err := p.Connect(t.Context(), &api.ConnectRequest{ID: "x"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("unknown: %v", err)
	}
	for _, id := range []string{"sandbox", "c"} {
		if r, err := p.Pids(t.Context(), &api.PidsRequest{ID: id}); err != nil || len(r.Processes) != 1 {
			t.Errorf("pids of %s: %v, %v", id, r, err)
		}
	}
	for _, id := range []string{"c", "sandbox"} {
		if _, err := p.Shutdown(t.Context(), &api.ShutdownRequest{ID: id}); err != nil || p.shutdown != 0 {
			t.Errorf("shutdown of %s: %v, %d", id, err, p.shutdown)
		}
	}
	if _, err := p.Service.Delete(t.Context(), &api.DeleteRequest{ID: "c"}); err != nil {
		t.Error(err)
	}
	if _, err := p.Shutdown(t.Context(), &api.ShutdownRequest{ID: "sandbox"}); err != nil || p.shutdown != 1 {
		t.Errorf("shutdown: %v, %d", err, p.shutdown)
	}
}

func TestTargetPID(t *testing.T) {
	p := newPod(t)
	a := p.create("a", nil)
	if p.guestPID(a.Pid) != 0 {
		t.Error("a container that was not started has a pid in the guest")
	}
	p.start("a", "")
	if p.guestPID(a.Pid) != 1 || p.guestPID(7) != 0 {
		t.Errorf("pid in the guest %d", p.guestPID(a.Pid))
	}
}

func TestWithoutPod(t *testing.T) {
	s := New(Config{SandboxID: func() string { return "" }})
	if _, err := s.Create(t.Context(), &api.CreateTaskRequest{ID: "c"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("create: %v", err)
	}
	for _, f := range []func() error{
		func() error { _, err := s.Pause(t.Context(), nil); return err },
		func() error { _, err := s.Resume(t.Context(), nil); return err },
		func() error { _, err := s.Checkpoint(t.Context(), nil); return err },
	} {
		if err := f(); !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
			t.Errorf("got %v", err)
		}
	}
	s.Gone(time.Now())
}

// FuzzMetrics reads what a guest may send as statistics.
func FuzzMetrics(f *testing.F) {
	raw, err := proto.Marshal(&stats.Metrics{CPU: &stats.CPUStat{UsageUsec: 1}, Hugetlb: []*stats.HugeTlbStat{{Pagesize: "2MB"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte{0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Metrics(&guestv1.StatsResponse{CgroupMetrics: b})
		if err != nil {
			return
		}
		if len(m.GetIo().GetUsage()) > maxDevices || len(m.GetHugetlb()) > 0 {
			t.Fatal("not bounded")
		}
		if _, err := Any(m); err != nil {
			t.Fatal(err)
		}
	})
}
