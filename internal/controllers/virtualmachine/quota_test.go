package virtualmachine

import (
	"context"
	"errors"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// full is an API server with a quota that is used up: it refuses what is made before it looks whether it is there already.
type full struct {
	client.Client
	secrets, pods bool
}

// Create implements client.Writer.
func (f *full) Create(ctx context.Context, obj client.Object, opts ...client.CreateOption) error {
	_, secret := obj.(*corev1.Secret)
	_, pod := obj.(*corev1.Pod)
	if secret && f.secrets || pod && f.pods {
		return apierrors.NewForbidden(corev1.Resource("objects"), obj.GetName(), errors.New("exceeded quota"))
	}
	return f.Client.Create(ctx, obj, opts...)
}

// seeds renders the same seed for all.
type seeds struct{}

// Render implements Bootstrap.
func (seeds) Render(context.Context, BootstrapInput) (*Seed, error) {
	return &Seed{Label: "cidata", Files: map[string][]byte{"meta-data": []byte("x")}}, nil
}

func TestBeyondAQuota(t *testing.T) {
	w := newWorld(t, append(surroundings(), newVM())...)
	quota := &full{Client: w.Client, secrets: true, pods: true}
	w.r.Client, w.r.Bootstrap = quota, seeds{}
	says := func(condition string, wants ...string) {
		t.Helper()
		text := message(w.settle(), condition)
		for _, want := range append(wants, "exceeded quota") {
			if !strings.Contains(text, want) {
				t.Errorf("%s: %s", condition, text)
			}
		}
		if w.pod() != nil {
			t.Error("there is a pod")
		}
	}
	says(vmopv1.VirtualMachineConditionBootstrapReady, "False", "the Secret of the seed disk cannot be made")
	quota.secrets = false
	says(vmopv1.VirtualMachineConditionPlacementReady, "False", "the pod cannot be made")
	quota.secrets = true // by the Secret that is there now
	says(vmopv1.VirtualMachineConditionPlacementReady, "False", "the pod cannot be made")
	quota.pods = false
	w.settle()
	if w.pod() == nil {
		t.Error("there is room, and no pod")
	}
}

// TestNobodyHasRoom: a machine that no node has taken becomes what its new class says, be it smaller or larger.
func TestNobodyHasRoom(t *testing.T) {
	class := func(name string, cpus int64, memory string) client.Object {
		return &vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: vmopv1.VirtualMachineClassSpec{
			Hardware: vmopv1.VirtualMachineClassHardware{Cpus: cpus, Memory: resource.MustParse(memory)},
		}}
	}
	w := newWorld(t, append(surroundings(), newVM(), class("tiny", 1, "512Mi"), class("big", 2, "2Gi"))...)
	w.settle()
	w.bind(BootClaim(newVM()), "default/boot")
	w.settle()
	for name, memory := range map[string]int64{"tiny": 512 << 20, "big": 2 << 30} {
		before := w.pod().UID
		update(w, newVM(), func(vm *vmopv1.VirtualMachine) { vm.Spec.ClassName = name })
		got := w.settle()
		p := w.pod()
		if p == nil || p.UID == before || w.machine().Memory.Bytes != memory || p.Spec.Containers[0].Resources.Limits.Memory().Value() != memory {
			t.Fatalf("%s: pod %s and then %+v", name, before, p)
		}
		if text := message(got, vmopv1.VirtualMachineClassConfigurationSynced); text != "True True " {
			t.Error(text)
		}
		w.settle()
		if w.pod().UID != p.UID {
			t.Errorf("%s: it is made anew for no reason", name)
		}
	}
	update(w, w.pod(), func(p *corev1.Pod) { p.Spec.NodeName = "n1" })
	placed := w.pod().UID
	update(w, newVM(), func(vm *vmopv1.VirtualMachine) { vm.Spec.ClassName = "small" })
	if w.settle(); w.pod().UID != placed {
		t.Error("a pod that a node has taken is made anew")
	}
}
