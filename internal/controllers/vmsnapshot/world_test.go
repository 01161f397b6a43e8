package vmsnapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine"
)

const (
	on  = vmopv1.VirtualMachinePowerStateOn
	off = vmopv1.VirtualMachinePowerStateOff
)

// world is a namespace with a machine of two disks, and the parts of a cluster that the controller waits for.
type world struct {
	*testing.T
	client.Client
	r *Reconciler
	v *Reverter
}

func newWorld(t *testing.T, power vmopv1.VirtualMachinePowerState, more ...client.Object) *world {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(vmopv1.AddToScheme(scheme), corev1.AddToScheme(scheme), storagev1.AddToScheme(scheme), snapshotv1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	vm := &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "box", UID: "vm-uid"},
		Spec: vmopv1.VirtualMachineSpec{
			ClassName: "small", ImageName: "tiny", StorageClass: "atoll", PowerState: power,
			Volumes: []vmopv1.VirtualMachineVolume{{Name: "data"}},
		},
		Status: vmopv1.VirtualMachineStatus{PowerState: power},
	}
	condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated)
	vm.Spec.Volumes[0].PersistentVolumeClaim = &vmopv1.PersistentVolumeClaimVolumeSource{}
	vm.Spec.Volumes[0].PersistentVolumeClaim.ClaimName = "data-claim"
	objects := append([]client.Object{vm}, more...)
	objects = append(objects, bound("boot", virtualmachine.BootClaim(vm), "5Gi")...)
	objects = append(objects, bound("data", "data-claim", "1Gi")...)
	objects = append(objects, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "host-1"}}, &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "atoll"}})
	if power == on {
		objects = append(objects, podOf(vm))
	}
	w := &world{T: t}
	w.Client = fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&vmopv1.VirtualMachine{}, &vmopv1.VirtualMachineSnapshot{}, &snapshotv1.VolumeSnapshot{}, &snapshotv1.VolumeSnapshotContent{}, &storagev1.VolumeAttachment{}).Build()
	w.r = &Reconciler{Client: w.Client, Events: events.NewFakeRecorder(1000)}
	w.v = &Reverter{Client: w.Client, Events: events.NewFakeRecorder(1000)}
	return w
}

// bound is a claim with its volume.
func bound(volume, claim, size string) []client.Object {
	return []client.Object{
		&corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: claim, UID: types.UID("claim-" + claim)},
			Spec:       corev1.PersistentVolumeClaimSpec{VolumeName: "pv-" + volume},
			Status:     corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound},
		},
		&corev1.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: "pv-" + volume},
			Spec: corev1.PersistentVolumeSpec{
				Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)}, StorageClassName: "atoll", VolumeMode: new(corev1.PersistentVolumeBlock),
				ClaimRef:               &corev1.ObjectReference{Namespace: "team", Name: claim},
				PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi.atoll.dev", VolumeHandle: "default/" + volume}},
			},
		},
	}
}

func podOf(vm *vmopv1.VirtualMachine) *corev1.Pod {
	m, _ := json.Marshal(machinev1.Machine{
		Name: vm.Name, Namespace: vm.Namespace, UID: string(vm.UID), Memory: machinev1.Memory{Bytes: 1 << 30}, Revision: 1,
		Disks: []machinev1.Disk{{Name: "boot", Volume: "default/boot"}, {Name: "data", Volume: "default/data"}, {Name: "cdrom-x", CDROM: true, Volume: "default/iso"}},
	})
	s, _ := json.Marshal(machinev1.State{Phase: machinev1.Running, Memory: 2 << 30})
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: vm.Namespace, Name: vm.Name, UID: "pod-uid", Labels: map[string]string{machinev1.UIDLabel: string(vm.UID)},
			Annotations:     map[string]string{machinev1.Annotation: string(m), machinev1.StateAnnotation: string(s)},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: vmopv1.GroupVersion.String(), Kind: "VirtualMachine", Name: vm.Name, UID: vm.UID, Controller: new(true)}},
		},
		Spec:   corev1.PodSpec{NodeName: "host-1"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
}

func (w *world) get(name string, into client.Object) bool {
	w.Helper()
	key := client.ObjectKey{Namespace: "team", Name: name}
	switch into.(type) {
	case *corev1.PersistentVolume, *snapshotv1.VolumeSnapshotContent:
		key.Namespace = ""
	}
	err := w.Get(w.Context(), key, into)
	if err != nil && !apierrors.IsNotFound(err) {
		w.Fatal(err)
	}
	return err == nil
}

func (w *world) vm() *vmopv1.VirtualMachine {
	w.Helper()
	vm := &vmopv1.VirtualMachine{}
	if !w.get("box", vm) {
		w.Fatal("the machine is gone")
	}
	return vm
}

func (w *world) pod() *corev1.Pod {
	w.Helper()
	p := &corev1.Pod{}
	if !w.get("box", p) {
		return nil
	}
	return p
}

func (w *world) snap(name string) *vmopv1.VirtualMachineSnapshot {
	w.Helper()
	s := &vmopv1.VirtualMachineSnapshot{}
	if !w.get(name, s) {
		return nil
	}
	return s
}

var sequence = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

// make makes a snapshot object; later ones are younger.
func (w *world) make(name string, memory bool) {
	w.Helper()
	var all vmopv1.VirtualMachineSnapshotList
	w.ok(w.List(w.Context(), &all))
	w.ok(w.Create(w.Context(), &vmopv1.VirtualMachineSnapshot{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, UID: types.UID("snap-" + name), CreationTimestamp: metav1.NewTime(sequence.Add(time.Duration(len(all.Items)) * time.Minute))},
		Spec:       vmopv1.VirtualMachineSnapshotSpec{VMName: "box", Memory: memory},
	}))
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) run(name string) (*vmopv1.VirtualMachineSnapshot, ctrl.Result) {
	w.Helper()
	result, err := w.r.Reconcile(w.Context(), ctrl.Request{NamespacedName: client.ObjectKey{Namespace: "team", Name: name}})
	w.ok(err)
	return w.snap(name), result
}

// reason of a condition, "True" when it is.
func reason(s *vmopv1.VirtualMachineSnapshot, kind string) string {
	c := condition.Get(s.Status.Conditions, kind)
	if c == nil {
		return ""
	}
	return strings.TrimPrefix(c.Reason, "VirtualMachineSnapshot")
}

// message of the condition that says whether a snapshot was taken.
func message(s *vmopv1.VirtualMachineSnapshot) string {
	if c := condition.Get(s.Status.Conditions, created); c != nil {
		return c.Message
	}
	return ""
}

const (
	created = vmopv1.VirtualMachineSnapshotCreatedCondition
	ready   = vmopv1.VirtualMachineSnapshotReadyCondition
)

// operations are those that the pod's machine was told.
func (w *world) operations() []machinev1.Operation {
	w.Helper()
	var m machinev1.Machine
	w.ok(json.Unmarshal([]byte(w.pod().Annotations[machinev1.Annotation]), &m))
	return m.Operations
}

// host does what a host does with the operations it was told.
func (w *world) host(result machinev1.OperationState) {
	w.Helper()
	p := w.pod()
	var s machinev1.State
	w.ok(json.Unmarshal([]byte(p.Annotations[machinev1.StateAnnotation]), &s))
	s.Operations = nil
	for _, op := range w.operations() {
		one := result
		one.ID = op.ID
		s.Operations = append(s.Operations, one)
	}
	text, _ := json.Marshal(s)
	p.Annotations[machinev1.StateAnnotation] = string(text)
	w.ok(w.Update(w.Context(), p))
}

// storage does what the storage of a cluster does: it binds claims, attaches volumes, and binds and takes snapshots.
func (w *world) storage() {
	w.Helper()
	var claims corev1.PersistentVolumeClaimList
	w.ok(w.List(w.Context(), &claims))
	for _, c := range claims.Items {
		if c.Spec.VolumeName != "" {
			continue
		}
		objects := bound(c.Name, c.Name, "3Gi")
		w.ok(w.Create(w.Context(), objects[1]))
		c.Spec.VolumeName, c.UID = "pv-"+c.Name, types.UID("claim-"+c.Name)
		w.ok(w.Update(w.Context(), &c))
		c.Status.Phase = corev1.ClaimBound
		w.ok(w.Status().Update(w.Context(), &c))
	}
	var attachments storagev1.VolumeAttachmentList
	w.ok(w.List(w.Context(), &attachments))
	for _, a := range attachments.Items {
		a.Status.Attached = true
		w.ok(w.Status().Update(w.Context(), &a))
	}
	var snaps snapshotv1.VolumeSnapshotList
	w.ok(w.List(w.Context(), &snaps))
	for _, s := range snaps.Items {
		content := &snapshotv1.VolumeSnapshotContent{}
		name := "content-" + s.Name
		handle := new("default/s-" + s.Name)
		if s.Spec.Source.VolumeSnapshotContentName != nil {
			name = *s.Spec.Source.VolumeSnapshotContentName
		}
		if !w.get(name, content) {
			content = &snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: name}}
			content.Spec.VolumeSnapshotRef = corev1.ObjectReference{Namespace: s.Namespace, Name: s.Name}
			w.ok(w.Create(w.Context(), content))
		} else if content.Spec.Source.SnapshotHandle != nil {
			handle = content.Spec.Source.SnapshotHandle
		}
		content.Status = &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: handle}
		w.ok(w.Status().Update(w.Context(), content))
		s.Status = &snapshotv1.VolumeSnapshotStatus{BoundVolumeSnapshotContentName: &name, ReadyToUse: new(true), CreationTime: new(metav1.Now())}
		w.ok(w.Status().Update(w.Context(), &s))
	}
}

// taken takes a snapshot from beginning to end.
func (w *world) taken(name string, memory bool) *vmopv1.VirtualMachineSnapshot {
	w.Helper()
	w.make(name, memory)
	for range 10 {
		s, _ := w.run(name)
		if reason(s, ready) == "True" {
			return s
		}
		w.storage()
		if w.pod() != nil && len(w.operations()) > 0 {
			w.host(machinev1.OperationState{Done: true, Quiesced: true, Bytes: 77, PauseMillis: 5})
		}
	}
	s := w.snap(name)
	w.Fatalf("snapshot %s is not ready: %+v", name, s.Status)
	return nil
}

// family is the tree of the machine in words: roots, and children in brackets.
func (w *world) family() string {
	w.Helper()
	var describe func(refs []vmopv1.VirtualMachineSnapshotReference) string
	describe = func(refs []vmopv1.VirtualMachineSnapshotReference) string {
		var out []string
		for _, ref := range refs {
			text := ref.Name
			if s := w.snap(ref.Name); len(s.Status.Children) > 0 {
				text += "(" + describe(s.Status.Children) + ")"
			}
			out = append(out, text)
		}
		return strings.Join(out, " ")
	}
	vm := w.vm()
	at := "-"
	if vm.Status.CurrentSnapshot != nil {
		at = vm.Status.CurrentSnapshot.Name
	}
	return fmt.Sprintf("%s @%s", describe(vm.Status.RootSnapshots), at)
}
