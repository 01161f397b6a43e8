package virtualmachine

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/restarts"
)

// suspending is a world whose machine has been told to save its memory, and the operation.
func suspending(t *testing.T, mode vmopv1.VirtualMachinePowerOpMode) (*world, machinev1.Operation) {
	t.Helper()
	w := started(t)
	vm := newVM()
	update(w, vm, func(vm *vmopv1.VirtualMachine) {
		vm.Spec.PowerState, vm.Spec.SuspendMode = vmopv1.VirtualMachinePowerStateSuspended, mode
	})
	w.settle()
	w.bind(MemoryClaim(vm), "default/memory")
	w.settle()
	w.attach()
	w.settle()
	return w, w.suspend()
}

// suspend is the operation that the machine has been told, the zero one if none.
func (w *world) suspend() machinev1.Operation {
	w.Helper()
	if ops := w.machine().Operations; len(ops) > 0 {
		return ops[0]
	}
	return machinev1.Operation{}
}

// host is the host when it has looked at the operations: the one that is asked for has failed, others are forgotten.
func (w *world) host(failed string) {
	w.Helper()
	op := w.suspend()
	w.run(func(_ *corev1.Pod, s *machinev1.State) {
		s.Operations = nil
		if op.ID != "" {
			s.Operations = []machinev1.OperationState{{ID: op.ID, Done: failed != "", Error: failed}}
		}
	})
}

// TestSuspendFails: the reason stays until it succeeds, and it is tried again after a pause, at once in another mode. A
// machine that is to go on knows nothing of it any more.
func TestSuspendFails(t *testing.T) {
	w, first := suspending(t, vmopv1.VirtualMachinePowerOpModeSoft)
	why := func(when string) {
		t.Helper()
		if text := message(w.settle(), vmopv1.VirtualMachinePowerStateSynced); !strings.Contains(text, "its memory could not be saved: no agent answers") {
			t.Errorf("%s: %s", when, text)
		}
	}
	w.host("no agent answers")
	why("when it has failed")
	w.clock.SetTime(w.clock.Now().Add(restarts.PauseSuspend - time.Second))
	why("in the pause")
	if w.suspend().ID != first.ID {
		t.Fatal("it is forgotten too early")
	}
	w.clock.SetTime(w.clock.Now().Add(time.Second))
	why("after the pause")
	if op := w.suspend(); op.ID != "" {
		t.Fatalf("it is not forgotten, or asked for before the host has forgotten it: %+v", op)
	}
	w.host("")
	why("when it is tried again")
	if op := w.suspend(); op.ID != first.ID || op.Mode != machinev1.Soft {
		t.Fatalf("it is not tried again: %+v", op)
	}
	w.host("")
	why("while it is tried again")
	w.host("no agent answers")
	why("when it has failed again")
	if w.suspend().ID == "" {
		t.Fatal("the second pause is none")
	}
	update(w, newVM(), func(vm *vmopv1.VirtualMachine) { vm.Spec.SuspendMode = vmopv1.VirtualMachinePowerOpModeHard })
	why("in another mode")
	w.host("")
	why("when that is tried")
	if op := w.suspend(); op.Mode != machinev1.Hard {
		t.Fatalf("another mode has to wait: %+v", op)
	}
	w.host("no agent answers")
	update(w, newVM(), func(vm *vmopv1.VirtualMachine) { vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateOn })
	if text := message(w.settle(), vmopv1.VirtualMachinePowerStateSynced); text != "True True " || w.suspend().ID != "" {
		t.Errorf("of a machine that is to go on: %s, %+v", text, w.suspend())
	}
}

// TestSuspendHeardLate: the kubelet says that a pod has ended before its host says how. The memory is not given up.
func TestSuspendHeardLate(t *testing.T) {
	w, _ := suspending(t, vmopv1.VirtualMachinePowerOpModeHard)
	update(w, w.pod(), func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })
	if text := message(w.settle(), vmopv1.VirtualMachinePowerStateSynced); w.pod() == nil || !strings.Contains(text, "node n1 has not said yet how") {
		t.Fatalf("pod %v: %s", w.pod(), text)
	}
	w.clock.SetTime(w.clock.Now().Add(hearEnd - time.Second))
	w.settle()
	w.run(func(p *corev1.Pod, s *machinev1.State) {
		p.Status.Phase = corev1.PodSucceeded
		s.Phase, s.End = machinev1.Ended, machinev1.End{Reason: machinev1.EndSuspended}
	})
	if got := w.settle(); got.Status.PowerState != vmopv1.VirtualMachinePowerStateSuspended || w.pod() != nil {
		t.Fatalf("%s, pod %v", got.Status.PowerState, w.pod())
	}
}

// TestResumeHeardLate: memory that a machine was to go on from, and has not begun to, is not given up before its host says so.
func TestResumeHeardLate(t *testing.T) {
	for name, end := range map[string]func(*corev1.Pod){
		"when the host has said something": func(*corev1.Pod) {},
		"when it has said nothing at all": func(p *corev1.Pod) {
			delete(p.Annotations, machinev1.StateAnnotation)
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, _ := suspending(t, vmopv1.VirtualMachinePowerOpModeHard)
			w.run(func(p *corev1.Pod, s *machinev1.State) {
				p.Status.Phase = corev1.PodSucceeded
				s.Phase, s.End = machinev1.Ended, machinev1.End{Reason: machinev1.EndSuspended}
			})
			w.settle()
			update(w, newVM(), func(vm *vmopv1.VirtualMachine) { vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateOn })
			w.settle()
			w.run(func(_ *corev1.Pod, s *machinev1.State) { *s = machinev1.State{Revision: 1, Phase: machinev1.Starting} })
			w.settle()
			memory := func() string {
				c := &corev1.PersistentVolumeClaim{}
				if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: MemoryClaim(newVM())}, c); err != nil {
					t.Fatal(err)
				}
				return c.Annotations[memoryAnnotation]
			}
			update(w, w.pod(), func(p *corev1.Pod) {
				p.Status.Phase = corev1.PodFailed
				end(p)
			})
			if got := w.settle(); memory() != memoryUsed || got.Status.PowerState != vmopv1.VirtualMachinePowerStateSuspended {
				t.Errorf("memory is %s, the machine %s", memory(), got.Status.PowerState)
			}
			w.run(func(p *corev1.Pod, s *machinev1.State) {
				p.Status.Phase = corev1.PodFailed
				*s = machinev1.State{Revision: 2, Phase: machinev1.Ended, End: machinev1.End{Reason: machinev1.EndFailed}}
			})
			if w.settle(); memory() != memorySaved {
				t.Errorf("of a machine that was not begun memory is %s", memory())
			}
		})
	}
}

// TestSuspendConflict: an attempt that has failed is not told twice when it could not be forgotten at first.
func TestSuspendConflict(t *testing.T) {
	w, op := suspending(t, vmopv1.VirtualMachinePowerOpModeSoft)
	w.host("no agent answers")
	w.settle()
	w.clock.SetTime(w.clock.Now().Add(restarts.PauseSuspend))
	plain := w.r.Client
	w.r.Client = interceptor.NewClient(w.Client.(client.WithWatch), interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, obj client.Object, patch client.Patch, opts ...client.PatchOption) error {
			if _, pod := obj.(*corev1.Pod); pod {
				return apierrors.NewConflict(corev1.Resource("pods"), obj.GetName(), errors.New("somebody else has written"))
			}
			return c.Patch(ctx, obj, patch, opts...)
		},
	})
	if _, err := w.r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(newVM())}); err != nil && !apierrors.IsConflict(err) {
		t.Fatal(err)
	}
	if w.suspend().ID != op.ID {
		t.Fatal("it is forgotten in spite of the conflict")
	}
	w.r.Client = plain
	if w.settle(); w.suspend().ID != "" {
		t.Error("the pause has begun anew")
	}
}

// TestEndNeverHeard: a host that never says how a machine has ended does not keep it from being started again.
func TestEndNeverHeard(t *testing.T) {
	w := started(t)
	update(w, w.pod(), func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })
	w.settle()
	w.clock.SetTime(w.clock.Now().Add(hearEnd))
	w.settle()
	w.clock.SetTime(w.clock.Now().Add(restarts.PauseFirst))
	w.settle()
	if p := w.pod(); p == nil || p.Status.Phase == corev1.PodFailed {
		t.Fatalf("%v", p)
	}
}
