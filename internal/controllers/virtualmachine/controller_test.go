package virtualmachine

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	testclock "k8s.io/utils/clock/testing"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
	"atoll.dev/atoll/internal/controllers/manager"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
)

func uid(s string) types.UID { return types.UID(s) }

const ns = "team"

// world is a controller with an API server that only remembers. What others do there, the test does.
type world struct {
	*testing.T
	client.Client
	r     *Reconciler
	clock *testclock.FakePassiveClock
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	scheme, err := manager.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	clock, made := testclock.NewFakePassiveClock(time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)), 0
	c := fake.NewClientBuilder().WithScheme(scheme).
		WithStatusSubresource(&vmopv1.VirtualMachine{}, &netop.NetworkInterface{}).
		WithIndex(&vmopv1.VirtualMachine{}, refersIndex, refersTo).
		WithIndex(&corev1.PersistentVolumeClaim{}, holderIndex, heldBy).
		WithObjects(objects...).
		WithInterceptorFuncs(interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
			made++
			obj.SetUID(uid(fmt.Sprintf("uid-%d", made)))
			obj.SetCreationTimestamp(metav1.NewTime(clock.Now()))
			return c.Create(ctx, obj, opts...)
		}, SubResourceUpdate: func(ctx context.Context, c client.Client, name string, obj client.Object, opts ...client.SubResourceUpdateOption) error {
			if name == "resize" {
				return c.Update(ctx, obj)
			}
			return c.SubResource(name).Update(ctx, obj, opts...)
		}}).Build()
	return &world{T: t, Client: c, clock: clock, r: &Reconciler{Client: c, Live: c, Clock: clock}}
}

// surroundings are what a machine refers to.
func surroundings() []client.Object {
	class := &vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "small"}, Spec: vmopv1.VirtualMachineClassSpec{
		Hardware: vmopv1.VirtualMachineClassHardware{Cpus: 2, Memory: resource.MustParse("1Gi")},
	}}
	image := &vmopv1.ClusterVirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Name: "debian"}, Status: vmopv1.VirtualMachineImageStatus{
		Type: "OVF", Firmware: "efi",
		Disks:      []vmopv1.VirtualMachineImageDiskInfo{{Name: "disk0", Limit: new(resource.MustParse("10Gi"))}},
		Conditions: []metav1.Condition{{Type: "Ready", Status: metav1.ConditionTrue, Reason: "True"}},
	}}
	storage := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "fast"}, Provisioner: attachment.Driver, VolumeBindingMode: new(storagev1.VolumeBindingWaitForFirstConsumer)}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}}}
	return []client.Object{class, image, storage, node}
}

func newVM() *vmopv1.VirtualMachine {
	return &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "web", UID: "11111111-2222-3333-4444-555555555555", Labels: map[string]string{"app": "web"}},
		Spec: vmopv1.VirtualMachineSpec{
			Image: &vmopv1.VirtualMachineImageRef{Kind: "ClusterVirtualMachineImage", Name: "debian"}, ClassName: "small", StorageClass: "fast",
			PowerState: vmopv1.VirtualMachinePowerStateOn, PowerOffMode: vmopv1.VirtualMachinePowerOpModeTrySoft,
			BiosUUID: "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee", InstanceUUID: "aaaaaaaa-bbbb-cccc-dddd-ffffffffffff",
		},
	}
}

// settle has the controller look until nothing changes.
func (w *world) settle() *vmopv1.VirtualMachine {
	w.Helper()
	key := client.ObjectKey{Namespace: ns, Name: "web"}
	last := ""
	for range 20 {
		if _, err := w.r.Reconcile(w.Context(), ctrl.Request{NamespacedName: key}); err != nil {
			w.Fatal(err)
		}
		now := w.versions()
		if now == last {
			vm := &vmopv1.VirtualMachine{}
			if err := w.Get(w.Context(), key, vm); err != nil && !apierrors.IsNotFound(err) {
				w.Fatal(err)
			}
			return vm
		}
		last = now
	}
	w.Fatal("it does not settle")
	return nil
}

// versions of all that there is.
func (w *world) versions() string {
	w.Helper()
	var out strings.Builder
	for _, list := range []client.ObjectList{
		&vmopv1.VirtualMachineList{}, &corev1.PodList{}, &corev1.PersistentVolumeClaimList{}, &storagev1.VolumeAttachmentList{},
		&corev1.SecretList{}, &vmopv1.VirtualMachineClassInstanceList{}, &netop.NetworkInterfaceList{},
	} {
		if err := w.List(context.Background(), list); err != nil {
			w.Fatal(err)
		}
		_ = meta.EachListItem(list, func(o runtime.Object) error {
			m, err := meta.Accessor(o)
			if err == nil {
				out.WriteString(m.GetName() + "@" + m.GetResourceVersion() + " ")
			}
			return err
		})
	}
	return out.String()
}

func (w *world) pod() *corev1.Pod {
	w.Helper()
	p := &corev1.Pod{}
	err := w.Get(w.Context(), client.ObjectKey{Namespace: ns, Name: "web"}, p)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		w.Fatal(err)
	}
	return p
}

func (w *world) machine() machinev1.Machine {
	w.Helper()
	var m machinev1.Machine
	p := w.pod()
	if p == nil {
		w.Fatal("there is no pod")
	}
	if err := json.Unmarshal([]byte(p.Annotations[machinev1.Annotation]), &m); err != nil {
		w.Fatal(err)
	}
	return m
}

// update changes an object.
func update[T client.Object](w *world, obj T, change func(T)) T {
	w.Helper()
	if err := w.Get(w.Context(), client.ObjectKeyFromObject(obj), obj); err != nil {
		w.Fatal(err)
	}
	change(obj)
	w.write(obj)
	return obj
}

// write writes an object and its status.
func (w *world) write(obj client.Object) {
	w.Helper()
	status := obj.DeepCopyObject().(client.Object)
	if err := w.Update(w.Context(), obj); err != nil {
		w.Fatal(err)
	}
	status.SetResourceVersion(obj.GetResourceVersion())
	if err := w.Status().Update(w.Context(), status); err != nil && !apierrors.IsNotFound(err) {
		w.Fatal(err)
	}
}

// bind is the provisioner.
func (w *world) bind(claim, handle string) {
	w.Helper()
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-" + claim}, Spec: corev1.PersistentVolumeSpec{
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: attachment.Driver, VolumeHandle: handle}},
	}}
	if err := w.Create(w.Context(), pv); err != nil {
		w.Fatal(err)
	}
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: claim}}
	update(w, c, func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeName, c.Status.Phase = pv.Name, corev1.ClaimBound })
}

// run is the scheduler, the kubelet and the host: the machine is in a state.
func (w *world) run(change func(*corev1.Pod, *machinev1.State)) {
	w.Helper()
	p := w.pod()
	var s machinev1.State
	if text := p.Annotations[machinev1.StateAnnotation]; text != "" {
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			w.Fatal(err)
		}
	}
	m := w.machine()
	p.Spec.NodeName, p.Status.Phase = "n1", corev1.PodRunning
	s.Revision++
	s.Applied, s.Phase, s.CPUs, s.Memory, s.Started = m.Revision, machinev1.Running, m.CPU.Count, m.Memory.Bytes, "2026-11-28T12:00:00Z"
	s.Disks = nil
	for _, d := range m.Disks {
		s.Disks = append(s.Disks, machinev1.DiskState{Name: d.Name, Volume: d.Volume, Attached: true})
	}
	s.NICs = []machinev1.NICState{{Name: "eth0", MAC: "02:00:00:00:00:01", Addresses: []string{"10.244.0.7/22"}, Gateway4: "10.244.0.1"}}
	if change != nil {
		change(p, &s)
	}
	text, err := json.Marshal(s)
	if err != nil {
		w.Fatal(err)
	}
	p.Annotations[machinev1.StateAnnotation] = string(text)
	w.write(p)
}

// attach is the agent with its volumes.
func (w *world) attach() int {
	w.Helper()
	var list storagev1.VolumeAttachmentList
	if err := w.List(w.Context(), &list); err != nil {
		w.Fatal(err)
	}
	for i := range list.Items {
		list.Items[i].Status.Attached = true
		w.write(&list.Items[i])
	}
	return len(list.Items)
}

func message(vm *vmopv1.VirtualMachine, typ string) string {
	c := meta.FindStatusCondition(vm.Status.Conditions, typ)
	if c == nil {
		return "none"
	}
	return string(c.Status) + " " + c.Reason + " " + c.Message
}

// started is a world with a machine that runs.
func started(t *testing.T, more ...client.Object) *world {
	t.Helper()
	vm := newVM()
	w := newWorld(t, append(append(surroundings(), vm), more...)...)
	w.settle()
	w.run(func(_ *corev1.Pod, s *machinev1.State) { s.Phase, s.Started = machinev1.Starting, "" })
	w.bind(BootClaim(vm), "default/boot")
	w.settle()
	w.run(nil)
	w.settle()
	return w
}
