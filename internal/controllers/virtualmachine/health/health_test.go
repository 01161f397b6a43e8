package health

import (
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
)

const at = "2026-11-28T12:00:00Z"

// look is one look at a machine.
func look(vm *vmopv1.VirtualMachine, s machinev1.State, after time.Duration, change func(*Inputs)) (again time.Duration, said string) {
	start, _ := time.Parse(time.RFC3339, at)
	in := Inputs{VM: vm, Pod: &corev1.Pod{}, State: s, Now: start.Add(after), Machine: machinev1.Machine{Disks: []machinev1.Disk{{Name: "data", Volume: "fast/pvc-1"}}}}
	if change != nil {
		change(&in)
	}
	again = Set(in)
	if c := condition.Get(vm.Status.Conditions, Condition); c != nil {
		said = string(c.Status) + " " + c.Reason + ": " + c.Message
	}
	return again, said
}

func TestTrouble(t *testing.T) {
	vm := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Name: "box"}}
	for _, c := range []struct {
		name    string
		trouble *machinev1.Trouble
		change  func(*Inputs)
		says    []string
	}{
		{"none", nil, nil, nil},
		{"full", &machinev1.Trouble{Reason: machinev1.DatastoreFull, Disk: "data", At: at}, nil, []string{"False DatastoreFull", "disk data (volume pvc-1 on datastore fast)", at, "when there is room"}},
		{"room", nil, nil, nil},
		{"error", &machinev1.Trouble{Reason: machinev1.DiskError, Disk: "gone\x1b", At: at}, nil, []string{"False DiskError", "disk gone : requests have failed"}},
		{"crash", &machinev1.Trouble{Reason: machinev1.GuestPanicked, At: at}, nil, []string{"False GuestPanicked", "crashed at " + at, "kubectl logs box", "restarted unless"}},
		{"kept", &machinev1.Trouble{Reason: machinev1.GuestPanicked, At: at}, func(in *Inputs) { in.Machine.KeepCrashed = true }, []string{"left as it is", "atoll.dev/guest-crash", "atoll vm restart box --hard"}},
	} {
		again, said := look(vm, machinev1.State{Phase: machinev1.Running, Started: at, Trouble: c.trouble}, time.Minute, c.change)
		for _, want := range c.says {
			if !strings.Contains(said, want) {
				t.Errorf("%s: %q is not in %q", c.name, want, said)
			}
		}
		if c.says == nil && said != "" || again != 0 {
			t.Errorf("%s: %q, again after %s", c.name, said, again)
		}
	}
}

func TestCrashIsRemembered(t *testing.T) {
	vm := &vmopv1.VirtualMachine{Spec: vmopv1.VirtualMachineSpec{PowerState: vmopv1.VirtualMachinePowerStateOn}}
	ended := machinev1.State{Phase: machinev1.Ended, Started: at, End: machinev1.End{Reason: machinev1.EndPanicked, Message: "the kernel\nis dead", At: at}}
	if again, said := look(vm, ended, 0, nil); !strings.HasPrefix(said, "False GuestPanicked: the machine has ended at "+at+" (Panicked: the kernel is dead)") || again != 0 {
		t.Errorf("%q, again after %s", said, again)
	}
	if again, said := look(vm, machinev1.State{}, 0, func(in *Inputs) { in.Pod = nil }); said == "" || again <= 0 {
		t.Errorf("before it is started: %q, again after %s", said, again)
	}
	running := machinev1.State{Phase: machinev1.Running, Started: at}
	if again, said := look(vm, running, time.Minute, nil); said == "" || again != 9*time.Minute {
		t.Errorf("soon afterwards: %q, again after %s", said, again)
	}
	if again, said := look(vm, running, remembered, nil); said != "" || again != 0 {
		t.Errorf("later: %q, again after %s", said, again)
	}
	ended.End.Reason = machinev1.EndCrashed
	if _, said := look(vm, ended, 0, nil); !strings.HasPrefix(said, "False Crashed: ") {
		t.Errorf("QEMU has crashed: %q", said)
	}
	vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateOff
	if _, said := look(vm, machinev1.State{}, 0, nil); said != "" {
		t.Errorf("powered off: %q", said)
	}
	ended.End.Reason = machinev1.EndShutdown
	if _, said := look(vm, ended, 0, nil); said != "" {
		t.Errorf("the guest has powered itself off: %q", said)
	}
}

// TestRestarted: a restart that has failed is named until the guest begins anew, in whatever way.
func TestRestarted(t *testing.T) {
	running, asked := machinev1.State{Phase: machinev1.Running, Started: at}, time.Now()
	for name, c := range map[string]struct {
		state  machinev1.State
		change func(*Inputs)
		stays  bool
	}{
		"it runs on":    {state: running, stays: true},
		"nothing known": {stays: true},
		"it is reset":   {state: machinev1.State{Phase: machinev1.Running, Started: time.Now().Add(time.Hour).Format(time.RFC3339)}},
		"it has ended":  {state: machinev1.State{Phase: machinev1.Ended, Started: at}},
		"it has begun anew after all": {state: running, change: func(in *Inputs) {
			Restarted(in.VM, machinev1.State{Started: asked.Add(2 * time.Second).Format(time.RFC3339)}, asked, "too late")
		}},
		"it has no pod":   {change: func(in *Inputs) { in.Pod = nil }},
		"asked, and well": {state: running, change: func(in *Inputs) { Restarted(in.VM, running, asked, "") }},
	} {
		vm := &vmopv1.VirtualMachine{}
		Restarted(vm, running, asked, "no\nanswer")
		if got := condition.Get(vm.Status.Conditions, RestartCondition); got == nil || got.Status != metav1.ConditionFalse || got.Message != "no answer" {
			t.Errorf("%+v", got)
		}
		look(vm, c.state, 0, c.change)
		if got := condition.Get(vm.Status.Conditions, RestartCondition); (got != nil) != c.stays {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
