package virtualmachine

import (
	"context"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// pods writes down the machines of the pods that are made.
type pods struct {
	client.Client
	machines *[]string
}

// Create implements client.Writer.
func (p pods) Create(ctx context.Context, obj client.Object, opts ...client.CreateOption) error {
	if pod, ok := obj.(*corev1.Pod); ok {
		*p.machines = append(*p.machines, pod.Annotations[machinev1.Annotation])
	}
	return p.Client.Create(ctx, obj, opts...)
}

// TestThePodAwaitsItsVolumes: a host may start a machine as its pod was made.
func TestThePodAwaitsItsVolumes(t *testing.T) {
	data := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "data", UID: "d"}, Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: new("fast")}}
	vm := newVM()
	vm.Spec.Volumes = []vmopv1.VirtualMachineVolume{{Name: "data", VirtualMachineVolumeSource: vmopv1.VirtualMachineVolumeSource{
		PersistentVolumeClaim: &vmopv1.PersistentVolumeClaimVolumeSource{PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}},
	}}}
	w := newWorld(t, append(surroundings(), vm, data)...)
	var made []string
	w.r.Client = pods{w.Client, &made}
	w.settle()
	w.bind(BootClaim(vm), "default/boot")
	w.bind("data", "default/data")
	w.settle()
	if err := w.Delete(t.Context(), w.pod()); err != nil {
		t.Fatal(err)
	}
	w.settle()
	if len(made) != 2 {
		t.Fatalf("machines %v", made)
	}
	for i, want := range []string{`"awaiting":["boot","data"]`, `"awaiting":["data"]`} {
		if !strings.Contains(made[i], want) {
			t.Errorf("%s is not in %s", want, made[i])
		}
	}
}
