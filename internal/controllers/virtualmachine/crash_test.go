package virtualmachine

import (
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/health"
	"atoll.dev/atoll/internal/controllers/virtualmachine/restarts"
)

func TestGuestCrash(t *testing.T) {
	w := started(t)
	// One crash after the other: each time it waits longer.
	for i := range 3 {
		w.run(func(_ *corev1.Pod, s *machinev1.State) {
			s.Trouble = &machinev1.Trouble{Reason: machinev1.GuestPanicked, At: w.clock.Now().Format(time.RFC3339)}
		})
		got := w.settle()
		if text := message(got, health.Condition); !strings.Contains(text, "False GuestPanicked the kernel of the guest has crashed") || got.Status.PowerState != vmopv1.VirtualMachinePowerStateOn {
			t.Errorf("%s, %s", got.Status.PowerState, text)
		}
		w.run(func(p *corev1.Pod, s *machinev1.State) {
			p.Status.Phase, s.Trouble = corev1.PodFailed, nil
			s.Phase, s.End = machinev1.Ended, machinev1.End{Reason: machinev1.EndPanicked, Message: "no restart", At: w.clock.Now().Format(time.RFC3339)}
		})
		pause := restarts.PauseFirst << i
		w.clock.SetTime(w.clock.Now().Add(pause - time.Second))
		if text := message(w.settle(), vmopv1.VirtualMachinePowerStateSynced); !strings.Contains(text, "Panicked: no restart") || w.pod().Status.Phase != corev1.PodFailed {
			t.Fatalf("crash %d: it does not wait: %s", i+1, text)
		}
		w.clock.SetTime(w.clock.Now().Add(time.Second))
		if w.settle(); w.pod() == nil || w.pod().Status.Phase == corev1.PodFailed {
			t.Fatalf("crash %d: it is not started again", i+1)
		}
		w.run(nil)
		if text := message(w.settle(), health.Condition); !strings.Contains(text, "no restart") {
			t.Errorf("when it runs again: %s", text)
		}
	}
}

// TestRestartFailed: a guest that has not restarted as it was asked to is named until it does, and not asked again.
func TestRestartFailed(t *testing.T) {
	w := started(t)
	ask := func(failed string) *vmopv1.VirtualMachine {
		w.clock.SetTime(w.clock.Now().Add(time.Hour))
		update(w, newVM(), func(vm *vmopv1.VirtualMachine) {
			vm.Spec.NextRestartTime, vm.Spec.RestartMode = w.clock.Now().Format(time.RFC3339Nano), vmopv1.VirtualMachinePowerOpModeSoft
		})
		w.settle()
		ops := w.machine().Operations
		if len(ops) != 1 {
			t.Fatalf("%+v", ops)
		}
		w.run(func(_ *corev1.Pod, s *machinev1.State) {
			s.Operations = []machinev1.OperationState{{ID: ops[0].ID, Done: true, Error: failed}}
		})
		return w.settle()
	}
	got := ask("no guest agent\nanswers")
	if text := message(got, health.RestartCondition); text != "False RestartFailed no guest agent answers" || got.Status.LastRestartTime == nil {
		t.Errorf("%s, %v", text, got.Status.LastRestartTime)
	}
	w.run(nil)
	if text := message(w.settle(), health.RestartCondition); !strings.HasPrefix(text, "False") || len(w.machine().Operations) != 0 {
		t.Errorf("afterwards: %s, %+v", text, w.machine().Operations)
	}
	if text := message(ask(""), health.RestartCondition); text != "none" {
		t.Errorf("when it was restarted: %s", text)
	}
}
