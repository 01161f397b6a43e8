//go:build integration

package shim_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/shim/cripb"
	"atoll.dev/atoll/internal/shim/machine/config"
)

// bootTimeout is how long an emulated guest may take to come up on a machine that is busy.
const bootTimeout = 3 * time.Minute

// machineHost is a host that can run virtual machines.
type machineHost struct {
	*agent
	tiny string // image with a guest
}

func newMachineHost(t *testing.T) *machineHost {
	t.Helper()
	h := newHost(t, 0)
	tiny, err := filepath.Abs("../../build/vm/tiny.qcow2")
	if err == nil {
		_, err = os.Stat(tiny)
	}
	if err != nil {
		t.Fatalf("%v; make images", err)
	}
	h.shim = filepath.Join(h.dir, "containerd-shim-atoll-vm-v1")
	if err := os.Link(filepath.Join(h.dir, "atoll-pod"), h.shim); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(h.dir, "machines")
	text, err := json.Marshal(config.Config{
		RunDir: h.run, DataDir: data, Binary: filepath.Join(h.dir, "atoll-pod"), Kubelet: h.kubelet, Accelerator: "tcg",
	})
	if err == nil {
		err = errors.Join(os.Mkdir(data, 0o711), os.WriteFile(config.File(h.run), text, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	return &machineHost{agent: h.newAgent(), tiny: tiny}
}

// boot makes the volume "s/boot" over the tiny image.
func (h *machineHost) boot() string {
	h.t.Helper()
	top := filepath.Join(h.dir, "boot.qcow2")
	command(h.t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", h.tiny, "-F", "qcow2", top)
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	out, err := exec.Command("qemu-img", "info", "--output=json", h.tiny).Output()
	if err == nil {
		err = json.Unmarshal(out, &info)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.disks["s/boot"] = &attach.Opened{Disk: handover.Disk{Volume: "boot", Size: info.Size, Layers: []handover.Layer{
		{ID: "tiny", File: h.tiny, Format: handover.FormatQCOW2, ReadOnly: true}, {ID: "boot", File: top, Format: handover.FormatQCOW2},
	}}}
	return top
}

func tinyMachine() machinev1.Machine {
	return machinev1.Machine{
		Name: "db", Namespace: "default", UID: "u1", Revision: 1, BIOSUUID: "4c4c4544-0051-3010-8052-b4c04f4e3132",
		CPU: machinev1.CPU{Count: 1, Max: 2}, Memory: machinev1.Memory{Bytes: 256 << 20, Max: 1 << 30},
		Firmware: machinev1.Firmware{Type: machinev1.BIOS}, Stop: machinev1.Stop{Mode: machinev1.TrySoft, TimeoutSeconds: 120},
		Disks: []machinev1.Disk{{Name: "boot", Volume: "s/boot", Bus: machinev1.SCSI, UUID: "00000000-0000-4000-8000-000000000001"}},
	}
}

// virtual is a running virtual machine.
type virtual struct {
	*container
	m machinev1.Machine
}

// run starts a machine and waits for its guest agent.
func (h *machineHost) machine(id string, m machinev1.Machine) *virtual {
	h.t.Helper()
	text, err := json.Marshal(m)
	if err != nil {
		h.t.Fatal(err)
	}
	p := h.runPod(id, func(c *cripb.PodSandboxConfig, _ *sandboxapi.CreateSandboxRequest) {
		c.Annotations = map[string]string{machinev1.Annotation: string(text)}
	})
	v := &virtual{container: p.mustCreate("vm-"+id, p.spec("/vm")), m: m}
	v.start()
	v.until("the guest agent answers", func(st machinev1.State) bool { return st.Guest != nil && st.Guest.Agent })
	return v
}

// call calls the shim as the agent does.
func (v *virtual) call(method string, params, result any) {
	v.t.Helper()
	found, err := attach.NewRecords(v.host.run).Find(attach.Machine(v.uid))
	if err == nil && len(found) != 1 {
		err = errors.New("the shim is not on record")
	}
	if err == nil {
		err = attach.Call(v.t.Context(), found[0].Socket, method, params, result)
	}
	if err != nil {
		v.t.Fatal(err)
	}
}

// until waits until the state is as wanted.
func (v *virtual) until(what string, ok func(machinev1.State) bool) {
	v.t.Helper()
	var st machinev1.State
	for end := time.Now().Add(bootTimeout); ; {
		v.call(machinev1.MethodState, machinev1.StateRequest{Seen: st.Revision, WaitMillis: 1000}, &st)
		switch {
		case ok(st):
			return
		case time.Now().After(end), st.Phase == machinev1.Ended:
			v.t.Fatalf("waiting until %s: %+v", what, st)
		}
	}
}

func (v *virtual) apply(change func(*machinev1.Machine)) {
	v.t.Helper()
	v.m.Revision++
	v.m.Disks = slices.Clone(v.m.Disks)
	change(&v.m)
	v.call(machinev1.MethodApply, v.m, nil)
	v.until("it is applied", func(st machinev1.State) bool { return st.Applied == v.m.Revision })
}

// TestMachine goes through the life of a virtual machine.
func TestMachine(t *testing.T) {
	h := newMachineHost(t)
	top := h.boot()
	v := h.machine("life", tinyMachine())
	if got := v.sh("echo $((6*7))"); got != "42\n" {
		t.Errorf("a command in the guest printed %q", got)
	}
	cat := v.newExec("cat", true, "cat")
	cat.start()
	in, err := os.OpenFile(cat.stdin, os.O_WRONLY, 0)
	if err == nil {
		_, err = in.WriteString("to the guest and back")
	}
	if err := errors.Join(err, in.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := v.task.CloseIO(t.Context(), &taskapi.CloseIORequest{ID: v.id, ExecID: "cat", Stdin: true}); err != nil {
		t.Fatal(err)
	}
	if status := cat.wait(); status != 0 || cat.stdout.String() != "to the guest and back" {
		t.Errorf("status %d, %q, %q", status, cat.stdout.String(), cat.stderr.String())
	}
	if usage := v.metrics(); usage.GetMemory().GetUsage() < 32<<20 || usage.GetCPU().GetUsageUsec() == 0 {
		t.Errorf("usage %v", usage)
	}
	v.change(h)
	v.kill(uint32(unix.SIGTERM))
	if status := v.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
	var st machinev1.State
	v.call(machinev1.MethodState, machinev1.StateRequest{}, &st)
	if st.End.Reason != machinev1.EndStopped {
		t.Errorf("in the end %+v", st)
	}
	if console := v.stdout.String(); !strings.Contains(console, "tinyvm") {
		t.Errorf("console %.300q", console)
	}
	h.free(top)
	v.delete()
	v.stop()
}

// change adds a disk, works with it and takes it away.
func (v *virtual) change(h *machineHost) {
	v.t.Helper()
	h.volume("data")
	disk := machinev1.Disk{Name: "data", Volume: "data", Bus: machinev1.SCSI, Unit: 1, UUID: "00000000-0000-4000-8000-000000000002"}
	v.apply(func(m *machinev1.Machine) { m.Disks = append(m.Disks, disk) })
	eventually(v.t, "the guest has the disk", func() bool { return strings.Contains(v.sh("cat /proc/partitions"), "sdb") })
	v.sh("echo written > /dev/sdb && sync")
	overlay := h.layer("data-next", filepath.Join(h.dir, "data-top.qcow2"))
	if err := h.shimCall("data", attach.MethodSnapshot, attach.SnapshotRequest{Volume: "data", Overlay: overlay}, nil); err != nil {
		v.t.Error(err)
	}
	if err := h.shimCall("data", attach.MethodResize, attach.ResizeRequest{Volume: "data", Bytes: 2 * diskBytes}, nil); err != nil {
		v.t.Error(err)
	}
	var st attach.Status
	if err := h.shimCall("data", attach.MethodStatus, attach.VolumeRequest{Volume: "data"}, &st); err != nil || len(st.Layers) != 3 || st.Size != 2*diskBytes {
		v.t.Errorf("%+v, %v", st, err)
	}
	if got := v.sh("head -c 7 /dev/sdb"); got != "written" {
		v.t.Errorf("on the disk is %q", got)
	}
	v.apply(func(m *machinev1.Machine) { m.Disks = m.Disks[:1] })
	eventually(v.t, "the guest has lost the disk", func() bool { return !strings.Contains(v.sh("cat /proc/partitions"), "sdb") })
	h.free(overlay.File)
	v.apply(func(m *machinev1.Machine) {
		m.Operations = []machinev1.Operation{{ID: "r1", Kind: machinev1.Reset, Mode: machinev1.Hard}}
	})
	v.until("it was reset", func(st machinev1.State) bool { return st.Resets == 1 })
	v.until("the guest agent answers again", func(machinev1.State) bool {
		c := v.newExec("again", false, machinev1.CommandHeartbeat)
		c.start()
		defer c.delete()
		return c.wait() == 0
	})
}

// TestMachineKilled: whatever kills QEMU or the shim, the pod ends, and nothing is locked or left.
func TestMachineKilled(t *testing.T) {
	h := newMachineHost(t)
	top := h.boot()
	v := h.machine("qemu", tinyMachine())
	e, ok, err := registry.New(h.run).Find(v.pod.id)
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := unix.Kill(e.QEMU, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if status := v.wait(); status != 137 {
		t.Errorf("exit status %d", status)
	}
	var st machinev1.State
	v.call(machinev1.MethodState, machinev1.StateRequest{}, &st)
	if st.End.Reason != machinev1.EndCrashed || !strings.Contains(st.End.Message, "killed") {
		t.Errorf("in the end %+v", st.End)
	}
	h.survived(top)
	v.delete()
	v.stop()

	v = h.machine("shim", tinyMachine())
	if e, ok, err = registry.New(h.run).Find(v.pod.id); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := unix.Kill(e.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "QEMU ends with its shim", func() bool { return !alive(e.QEMU) })
	h.survived(top)
	if found, err := attach.NewRecords(h.run).Find("s/boot"); len(found) > 0 || err != nil {
		t.Errorf("records %v, %v", found, err)
	}
	h.shimDelete(v.pod.id)
	if _, ok, err := registry.New(h.run).Find(v.pod.id); ok || err != nil {
		t.Errorf("the record is left: %v, %v", ok, err)
	}
}
