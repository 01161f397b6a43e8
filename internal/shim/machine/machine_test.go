package machine

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/shim/machine/guest"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/hardware"
)

func TestLife(t *testing.T) {
	w := newWorld(t)
	p := w.start(sample())
	p.running()
	st := p.until("its network is known", func(st machinev1.State) bool { return len(st.NICs) == 1 })
	if st.NICs[0].Addresses[0] != "10.244.0.7/32" || st.NICs[0].Gateway4 != "10.244.0.1" || !st.Disks[0].Attached || st.Disks[0].Bytes != 1<<30 {
		t.Errorf("state %+v", st)
	}
	out, err := os.OpenFile(p.stdout, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.WriteString(w.line, "login: "); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 7)
	if _, err := io.ReadFull(out, buf); err != nil || string(buf) != "login: " {
		t.Errorf("console %q, %v", buf, err)
	}
	var vs attach.Status
	if err := attach.Call(t.Context(), w.dir+"/s", attach.MethodStatus, attach.VolumeRequest{Volume: "s/boot"}, &vs); err != nil || vs.Size != 1<<30 {
		t.Errorf("volume %+v, %v", vs, err)
	}
	if _, err := p.tasks.Kill(t.Context(), &api.KillRequest{ID: "vm", Signal: uint32(unix.SIGTERM)}); err != nil {
		t.Fatal(err)
	}
	if status := p.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if st := p.s.board.Get(); st.Phase != machinev1.Ended || st.End.Reason != machinev1.EndStopped || st.Disks[0].Attached {
		t.Errorf("in the end %+v", st)
	}
	if found, err := attach.NewRecords(w.dir).Find("s/boot"); len(found) > 0 || err != nil {
		t.Errorf("records %v, %v", found, err)
	}
	if w.called("close s/boot") == 0 || w.called("dhcp 10.244.0.7/32 db") != 1 || w.called("forward 10.244.0.7") != 1 {
		t.Errorf("calls %s", w.calls)
	}
	// The agent learns of the end as long as the sandbox is there.
	var last machinev1.State
	if err := attach.Call(t.Context(), w.dir+"/s", machinev1.MethodState, machinev1.StateRequest{}, &last); err != nil || last.Phase != machinev1.Ended {
		t.Errorf("after the end: %+v, %v", last, err)
	}
	if _, err := p.tasks.Delete(t.Context(), &api.DeleteRequest{ID: "vm"}); err != nil {
		t.Error(err)
	}
}

func TestEnds(t *testing.T) {
	for name, c := range map[string]struct {
		how     func(*machinePod)
		status  uint32
		reason  machinev1.EndReason
		message string
	}{
		"the guest powers off": {func(p *machinePod) { p.end(vm.ExitShutdown) }, 0, machinev1.EndShutdown, ""},
		"QEMU fails":           {func(p *machinePod) { p.end(vm.ExitFailed) }, 137, machinev1.EndCrashed, "qemu has ended"},
		"the guest crashes thrice": {func(p *machinePod) {
			for range 3 {
				p.s.life.event(hardware.Event{Kind: hardware.EventPanic})
			}
		}, 137, machinev1.EndPanicked, "kernel of the guest"},
		"the guest crashes thrice, and is kept no longer": {func(p *machinePod) {
			kept := sample()
			kept.Revision, kept.KeepCrashed = 100, true
			_, _ = p.s.Apply(context.Background(), *kept)
			for range 3 {
				p.s.life.event(hardware.Event{Kind: hardware.EventPanic})
			}
			time.Sleep(100 * time.Millisecond) // the crash is noticed; if it is not yet, the machine ends all the same
			kept.Revision, kept.KeepCrashed = 101, false
			_, _ = p.s.Apply(context.Background(), *kept)
		}, 137, machinev1.EndPanicked, "kernel of the guest"},
		"memory runs out": {func(p *machinePod) {
			p.mu.Lock()
			p.oom = true
			p.mu.Unlock()
			p.end(vm.ExitFailed)
		}, 137, machinev1.EndCrashed, "memory ran out"},
		"SIGKILL": {func(p *machinePod) {
			_, _ = p.tasks.Kill(context.Background(), &api.KillRequest{ID: "vm", Signal: uint32(unix.SIGKILL)})
		}, 0, machinev1.EndStopped, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newWorld(t).start(sample())
			p.running()
			c.how(p)
			if status := p.wait(); status != c.status {
				t.Errorf("exit status %d", status)
			}
			end := p.s.board.Get().End
			if end.Reason != c.reason || !strings.Contains(end.Message, c.message) {
				t.Errorf("%+v", end)
			}
			words, _ := os.ReadFile(p.last)
			if string(words) != end.Message {
				t.Errorf("termination message %q", words)
			}
		})
	}
}

// TestCutOff: a guest that does not hear is asked again and again, and powered off when its time is over.
func TestCutOff(t *testing.T) {
	// On a host that stands still its time may be over when it was asked once; then it gets more.
	for seconds := 5; cutOff(t, seconds) < 2; seconds *= 5 {
		if seconds > 100 {
			t.Fatal("it is not asked again")
		}
	}
}

// cutOff powers a guest off after a while and tells how often its power button was pressed before.
func cutOff(t *testing.T, seconds int) (pressed int) {
	t.Helper()
	w := newWorld(t)
	m := sample()
	m.Stop = machinev1.Stop{Mode: machinev1.TrySoft, TimeoutSeconds: seconds}
	p := w.start(m)
	p.running()
	p.s.life.askAgain = time.Millisecond
	if _, err := p.tasks.Kill(t.Context(), &api.KillRequest{ID: "vm", Signal: uint32(unix.SIGTERM)}); err != nil {
		t.Fatal(err)
	}
	if status := p.wait(); status != 0 || p.s.board.Get().End.Reason != machinev1.EndStopped {
		t.Errorf("exit status %d, %+v", status, p.s.board.Get().End)
	}
	if w.called("poweroff") != 1 {
		t.Errorf("calls %s", w.calls)
	}
	return w.called("powerdown")
}

// TestHostOutOfMemory: a machine that is far larger than what is free is not started.
func TestHostOutOfMemory(t *testing.T) {
	w := newWorld(t)
	m := sample()
	m.Memory.Bytes, m.Memory.Max = 8<<40, 8<<40
	p := w.start(m)
	if status := p.wait(); status != statusFailed {
		t.Errorf("exit status %d", status)
	}
	if end := p.s.board.Get().End; end.Reason != machinev1.EndFailed || !strings.Contains(end.Message, "the host is out of memory") || w.called("start") != 0 {
		t.Errorf("%+v, %s", end, w.calls)
	}
}

func TestNotStarted(t *testing.T) {
	bad := errors.New("another process has it")
	for call, want := range map[string]string{"open s/boot": "opening disks: disk boot: another", "start": "starting machine: another"} {
		w := newWorld(t)
		w.failing(call, bad)
		p := w.start(sample())
		if status := p.wait(); status != statusFailed {
			t.Errorf("%s: exit status %d", call, status)
		}
		if end := p.s.board.Get().End; end.Reason != machinev1.EndFailed || !strings.Contains(end.Message, want) {
			t.Errorf("%s: %+v", call, end)
		}
		if found, err := attach.NewRecords(w.dir).Find("s/boot"); len(found) > 0 || err != nil {
			t.Errorf("%s: records %v, %v", call, found, err)
		}
	}
	m := sample()
	m.CPU.Count = 0
	if _, err := newWorld(t).sandbox(m); err == nil || !strings.Contains(err.Error(), "cpu.count") {
		t.Errorf("a machine without processors: %v", err)
	}
}

// TestAskedAgain: a guest that does not hear the power button, since it is still booting, is asked again until it ends.
func TestAskedAgain(t *testing.T) {
	for _, mode := range []machinev1.StopMode{machinev1.Soft, machinev1.TrySoft} {
		m := sample()
		m.Stop = machinev1.Stop{Mode: mode}
		p := newWorld(t).start(m)
		p.running()
		p.s.life.askAgain = 20 * time.Millisecond
		if _, err := p.tasks.Kill(t.Context(), &api.KillRequest{ID: "vm", Signal: uint32(unix.SIGTERM)}); err != nil {
			t.Fatal(err)
		}
		for p.called("powerdown") < 3 {
			if t.Context().Err() != nil {
				t.Fatal("it is not asked again")
			}
			time.Sleep(time.Millisecond)
		}
		p.end(vm.ExitShutdown)
		if status := p.wait(); status != 0 || p.called("poweroff") > 0 || p.s.board.Get().End.Reason != machinev1.EndStopped {
			t.Errorf("%s: %d, %+v, calls %s", mode, status, p.s.board.Get().End, p.calls)
		}
	}
}

// TestAwaiting: a machine is not started before its disks are there, and can be stopped before.
func TestAwaiting(t *testing.T) {
	m := sample()
	m.Awaiting = []string{"data"}
	p := newWorld(t).start(m)
	p.until("it waits", func(st machinev1.State) bool { return st.Reason == "AwaitingDisks" })
	if p.called("start") != 0 {
		t.Error("it was started")
	}
	p.apply(*m, func(m *machinev1.Machine) { m.Awaiting = nil })
	p.running()

	p = newWorld(t).start(m)
	p.until("it waits", func(st machinev1.State) bool { return st.Reason == "AwaitingDisks" })
	if _, err := p.tasks.Kill(t.Context(), &api.KillRequest{ID: "vm", Signal: uint32(unix.SIGTERM)}); err != nil {
		t.Fatal(err)
	}
	if status := p.wait(); status != 0 || p.s.board.Get().End.Reason != machinev1.EndStopped {
		t.Errorf("stopped while it waits: %d, %+v", status, p.s.board.Get())
	}
}

func TestApply(t *testing.T) {
	m := *sample()
	m.Disks = append(m.Disks, machinev1.Disk{Name: "cd", Volume: "s/iso", Bus: machinev1.SATA, CDROM: true, UUID: "00000000-0000-4000-8000-000000000002"})
	w := newWorld(t)
	p := w.start(&m)
	p.running()
	data := machinev1.Disk{Name: "data", Volume: "s/data", Bus: machinev1.SCSI, Unit: 1, UUID: "00000000-0000-4000-8000-000000000003"}
	m = p.apply(m, func(m *machinev1.Machine) {
		m.CPU.Count, m.Memory.Bytes = 2, 192<<20
		m.Disks[1].Volume = ""
		m.Disks = append(m.Disks, data)
		m.NICs = append(m.NICs, machinev1.NIC{Name: "eth1", Model: "virtio-net-pci", MAC: "52:54:00:00:00:02", Bridge: "br0"})
	})
	has := func(st machinev1.State, name string) bool {
		return slices.ContainsFunc(st.Disks, func(d machinev1.DiskState) bool { return d.Name == name && d.Attached && d.Error == "" })
	}
	st := p.until("all is applied", func(st machinev1.State) bool { return st.Applied == m.Revision && has(st, "data") && len(st.NICs) == 2 })
	if st.CPUs != 2 || st.Memory != 192<<20 || len(st.Pending) != 0 || has(st, "cd") || w.called("eject cd") != 1 {
		t.Errorf("%+v; calls %s", st, w.calls)
	}
	m = p.apply(m, func(m *machinev1.Machine) {
		m.CPU.Count, m.Firmware.SecureBoot, m.Firmware.Type = 1, true, machinev1.EFI
		m.Disks, m.NICs = m.Disks[:2], m.NICs[:1]
	})
	st = p.until("it is taken away", func(st machinev1.State) bool {
		return st.Applied == m.Revision && len(st.Disks) == 2 && len(st.NICs) == 1
	})
	if text := strings.Join(st.Pending, "; "); !strings.Contains(text, "processors goes down") || !strings.Contains(text, "firmware") || w.called("close s/data") == 0 {
		t.Errorf("pending %q; calls %s", text, w.calls)
	}
	// A guest that does not let go keeps its disk, and the state says so.
	w.failing("remove data", hardware.ErrUnplug)
	m = p.apply(m, func(m *machinev1.Machine) { m.Disks = append(m.Disks, data) })
	p.until("it is back", func(st machinev1.State) bool { return st.Applied == m.Revision && has(st, "data") })
	m = p.apply(m, func(m *machinev1.Machine) { m.Disks = m.Disks[:2] })
	p.until("it is refused", func(st machinev1.State) bool {
		return slices.ContainsFunc(st.Disks, func(d machinev1.DiskState) bool { return d.Name == "data" && d.Error != "" })
	})
	w.failing("remove data", nil)
	p.until("it is let go of", func(st machinev1.State) bool { return len(st.Disks) == 2 })
	old := m
	old.Revision, old.CPU.Count = 1, 4
	if _, err := p.s.Apply(t.Context(), old); err != nil || p.s.board.Get().CPUs == 4 {
		t.Errorf("an old machine was applied: %v", err)
	}
	old.UID = "other"
	if _, err := p.s.Apply(t.Context(), old); err == nil {
		t.Error("another machine was applied")
	}
}

func TestOperations(t *testing.T) {
	m := *sample()
	w := newWorld(t)
	p := w.start(&m)
	p.running()
	reset := machinev1.Operation{ID: "op1", Kind: machinev1.Reset, Mode: machinev1.Hard}
	snapshot := machinev1.Operation{ID: "op2", Kind: machinev1.Snapshot, Memory: &machinev1.MemoryState{Volume: "s/mem"}, Snapshots: map[string]string{"boot": "s1"}}
	done := func(id string) func(machinev1.State) bool {
		return func(st machinev1.State) bool {
			return slices.ContainsFunc(st.Operations, func(o machinev1.OperationState) bool { return o.ID == id && o.Done })
		}
	}
	m = p.apply(m, func(m *machinev1.Machine) { m.Operations = []machinev1.Operation{reset, snapshot} })
	st := p.until("both are done", func(st machinev1.State) bool { return done("op1")(st) && done("op2")(st) })
	if st.Operations[0].Error+st.Operations[1].Error != "" || st.Operations[1].Bytes != 6 || w.called("snapshots s/boot") != 1 {
		t.Errorf("%+v; calls %s", st.Operations, w.calls)
	}
	m = p.apply(m, func(*machinev1.Machine) {})
	p.until("it is applied again", func(st machinev1.State) bool { return st.Applied == m.Revision })
	m = p.apply(m, func(m *machinev1.Machine) {
		m.Operations = []machinev1.Operation{{ID: "op3", Kind: machinev1.Snapshot, Snapshots: map[string]string{"boot": "s2"}}}
	})
	st = p.until("the next is done", done("op3"))
	if len(st.Operations) != 1 || w.called("reset") != 1 || w.called("pause") != 1 || w.called("resume") != 1 {
		t.Errorf("%+v; calls %s", st.Operations, w.calls)
	}
	w.failing("save", hardware.ErrUnmigratable)
	suspend := machinev1.Operation{ID: "op4", Kind: machinev1.Suspend, Memory: &machinev1.MemoryState{Volume: "s/mem"}}
	m = p.apply(m, func(m *machinev1.Machine) { m.Operations = []machinev1.Operation{suspend} })
	if st := p.until("it has failed", done("op4")); st.Operations[0].Error == "" || st.Phase == machinev1.Ended {
		t.Errorf("%+v", st)
	}
	w.failing("save", nil)
	suspend.ID = "op5"
	p.apply(m, func(m *machinev1.Machine) { m.Operations = []machinev1.Operation{suspend} })
	if status := p.wait(); status != 0 || p.s.board.Get().End.Reason != machinev1.EndSuspended || !done("op5")(p.s.board.Get()) {
		t.Errorf("%d, %+v", status, p.s.board.Get())
	}
}

// TestExecWithoutAgent: whoever runs a command learns what is missing.
func TestExecWithoutAgent(t *testing.T) {
	p := newWorld(t).start(sample())
	p.running()
	exec := func(terminal bool, args ...string) error {
		process, err := json.Marshal(specs.Process{Args: args})
		if err != nil {
			t.Fatal(err)
		}
		_, err = p.tasks.Exec(t.Context(), &api.ExecProcessRequest{ID: "vm", ExecID: "e" + args[0], Terminal: terminal, Spec: &anypb.Any{Value: process}})
		return err
	}
	if err := errgrpc.ToNative(exec(false, "ls")); !errdefs.IsUnavailable(err) || err.Error() != guest.ErrNoAgent.Error() {
		t.Errorf("without an agent: %v", err)
	}
	if err := exec(true, "sh"); err == nil || !strings.Contains(err.Error(), "kubectl attach") {
		t.Errorf("with a terminal: %v", err)
	}
	if err := exec(false, machinev1.CommandStream, "film"); err == nil || !strings.Contains(err.Error(), "serial") {
		t.Errorf("an unknown stream: %v", err)
	}
	if err := exec(false, machinev1.CommandHeartbeat); err != nil {
		t.Fatal(err)
	}
	if _, err := p.tasks.Start(t.Context(), &api.StartRequest{ID: "vm", ExecID: "e" + machinev1.CommandHeartbeat}); err != nil {
		t.Fatal(err)
	}
	r, err := p.tasks.Wait(t.Context(), &api.WaitRequest{ID: "vm", ExecID: "e" + machinev1.CommandHeartbeat})
	if err != nil || r.ExitStatus != 1 {
		t.Errorf("heartbeat: %v, %v", r, err)
	}
}
