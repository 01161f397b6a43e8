package virtualmachine

import (
	"context"
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
)

func TestFromObjectToAddress(t *testing.T) {
	vm := newVM()
	w := newWorld(t, append(surroundings(), vm)...)
	got := w.settle()
	for _, typ := range []string{
		vmopv1.VirtualMachineConditionClassReady, vmopv1.VirtualMachineConditionImageReady, vmopv1.VirtualMachineConditionStorageReady,
		vmopv1.VirtualMachineConditionBootstrapReady, vmopv1.VirtualMachineConditionNetworkReady, vmopv1.VirtualMachineConditionCreated,
	} {
		if text := message(got, typ); text != "True True " {
			t.Errorf("%s: %s", typ, text)
		}
	}
	if got.Status.PowerState != vmopv1.VirtualMachinePowerStateOff || !strings.HasPrefix(got.Status.UniqueID, "vm-") {
		t.Errorf("%+v", got.Status)
	}
	if m := w.machine(); len(m.Disks) != 0 || len(m.Awaiting) != 1 || m.Awaiting[0] != "boot" {
		t.Errorf("before the claim is bound: %+v, awaiting %v", m.Disks, m.Awaiting)
	}
	w.bind(BootClaim(vm), "default/boot")
	w.run(func(_ *corev1.Pod, s *machinev1.State) { s.Phase, s.Started = machinev1.Starting, "" })
	w.settle()
	if m := w.machine(); len(m.Disks) != 1 || m.Disks[0].Volume != "default/boot" || len(m.Awaiting) != 0 || m.Revision != 1 {
		t.Errorf("when it is bound: %+v", m)
	}
	w.run(func(_ *corev1.Pod, s *machinev1.State) {
		s.Guest = &machinev1.Guest{Agent: true, Hostname: "web", OSName: "Debian\x07 12"}
	})
	got = w.settle()
	s := got.Status
	if s.PowerState != vmopv1.VirtualMachinePowerStateOn || s.Network.PrimaryIP4 != "10.244.0.7" || s.NodeName != "n1" || s.Zone != "z1" ||
		s.BiosUUID != vm.Spec.BiosUUID || s.Guest.GuestFullName != "Debian  12" || s.Hardware.CPU.Total != 2 || len(s.Volumes) != 1 || !s.Volumes[0].Attached {
		t.Errorf("%+v", s)
	}
	if text := message(got, vmopv1.VirtualMachineToolsCondition); text != "True True " {
		t.Error(text)
	}
	if text := message(got, vmopv1.VirtualMachinePowerStateSynced); text != "True True " {
		t.Error(text)
	}
}

func TestPowerOffAndOn(t *testing.T) {
	w := started(t)
	vm := newVM()
	update(w, vm, func(vm *vmopv1.VirtualMachine) {
		vm.Spec.PowerState, vm.Spec.PowerOffMode = vmopv1.VirtualMachinePowerStateOff, vmopv1.VirtualMachinePowerOpModeHard
	})
	update(w, w.pod(), func(p *corev1.Pod) { p.Finalizers = []string{"test/kubelet"} }) // a kubelet takes its time
	w.settle()
	if p := w.pod(); p == nil || p.DeletionTimestamp == nil || w.machine().Stop.Mode != machinev1.Hard {
		t.Fatalf("%+v", p)
	}
	update(w, vm, func(vm *vmopv1.VirtualMachine) { vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateOn })
	got := w.settle()
	if text := message(got, vmopv1.VirtualMachinePowerStateSynced); got.Status.PowerState != vmopv1.VirtualMachinePowerStateOn && !strings.Contains(text, "is ending the machine") {
		t.Errorf("%s, %s", got.Status.PowerState, text)
	}
	old := w.pod().UID
	update(w, w.pod(), func(p *corev1.Pod) { p.Finalizers = nil })
	w.settle()
	if p := w.pod(); p == nil || p.DeletionTimestamp != nil || p.UID == old && old != "" {
		t.Fatalf("no new pod: %+v", p)
	}
}

func TestCrashAndShutdown(t *testing.T) {
	w := started(t)
	end := func(reason machinev1.EndReason) {
		w.run(func(p *corev1.Pod, s *machinev1.State) {
			p.Status.Phase = corev1.PodFailed
			s.Phase, s.End = machinev1.Ended, machinev1.End{Reason: reason, Message: "killed", At: w.clock.Now().Format(time.RFC3339)}
		})
	}
	end(machinev1.EndCrashed)
	got := w.settle()
	if text := message(got, vmopv1.VirtualMachinePowerStateSynced); !strings.Contains(text, "Crashed: killed") || got.Status.PowerState != vmopv1.VirtualMachinePowerStateOff {
		t.Errorf("%s, %s", got.Status.PowerState, text)
	}
	if p := w.pod(); p == nil || p.Status.Phase != corev1.PodFailed {
		t.Fatal("its pod is gone at once, and with it the log")
	}
	w.clock.SetTime(w.clock.Now().Add(time.Minute))
	w.settle()
	if p := w.pod(); p == nil || p.Status.Phase == corev1.PodFailed {
		t.Fatal("it is not started again")
	}
}

func TestVolumes(t *testing.T) {
	claim := func(name string) *corev1.PersistentVolumeClaim {
		return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: uid("claim-" + name)}, Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: new("fast"), AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("5Gi")}},
		}}
	}
	taken := claim("taken")
	taken.Annotations = map[string]string{attachment.HolderAnnotation: "other", attachment.HolderNameAnnotation: "db"}
	boot := claim("disk-of-db")
	boot.OwnerReferences = []metav1.OwnerReference{{APIVersion: vmopv1.GroupVersion.String(), Kind: "VirtualMachine", Name: "db", UID: "other", Controller: new(true)}}
	w := started(t, claim("data"), taken, boot)
	vm := newVM()
	volume := func(name string) vmopv1.VirtualMachineVolume {
		return vmopv1.VirtualMachineVolume{Name: name, VirtualMachineVolumeSource: vmopv1.VirtualMachineVolumeSource{
			PersistentVolumeClaim: &vmopv1.PersistentVolumeClaimVolumeSource{PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}},
		}}
	}
	update(w, vm, func(vm *vmopv1.VirtualMachine) {
		vm.Spec.Volumes = []vmopv1.VirtualMachineVolume{volume("data"), volume("taken"), volume("nothing"), volume("disk-of-db")}
	})
	got := w.settle()
	byName := func(vm *vmopv1.VirtualMachine, name string) vmopv1.VirtualMachineVolumeStatus {
		for _, s := range vm.Status.Volumes {
			if s.Name == name {
				return s
			}
		}
		t.Fatalf("no volume %s in %+v", name, vm.Status.Volumes)
		return vmopv1.VirtualMachineVolumeStatus{}
	}
	if text := byName(got, "taken").Error; !strings.Contains(text, "in use by VirtualMachine db") {
		t.Error(text)
	}
	if text := byName(got, "nothing").Error; !strings.Contains(text, "nothing does not exist") {
		t.Error(text)
	}
	if text := byName(got, "disk-of-db").Error; !strings.Contains(text, "a part of VirtualMachine db") {
		t.Error(text)
	}
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "data"}}
	if err := w.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil || c.Annotations["volume.kubernetes.io/selected-node"] != "n1" || len(c.Finalizers) != 1 {
		t.Fatalf("%+v, %v", c, err)
	}
	w.bind("data", "default/data")
	w.settle()
	if n := w.attach(); n != 1 {
		t.Fatalf("%d attachments", n)
	}
	w.settle()
	if m := w.machine(); len(m.Disks) != 2 || m.Disks[1].Name != "data" || m.Disks[1].Volume != "default/data" || m.Disks[1].Unit != 1 {
		t.Fatalf("%+v", m.Disks)
	}
	w.run(nil)
	got = w.settle()
	if s := byName(got, "data"); !s.Attached || s.Error != "" || s.DiskUUID == "" {
		t.Errorf("%+v", s)
	}
	// Whatever happens to the attachment, the machine keeps what it has.
	var there storagev1.VolumeAttachmentList
	if err := w.List(t.Context(), &there); err != nil || len(there.Items) != 1 {
		t.Fatalf("%v, %+v", err, there.Items)
	}
	update(w, &there.Items[0], func(a *storagev1.VolumeAttachment) {
		a.Status.Attached, a.Status.AttachError = false, &storagev1.VolumeError{Message: "lost"}
	})
	got = w.settle()
	if m := w.machine(); len(m.Disks) != 2 || !strings.Contains(byName(got, "data").Error, "lost") {
		t.Fatalf("%+v, %+v", m.Disks, byName(got, "data"))
	}
	// And away again: first the machine lets go of it, then the host, and then the claim is free.
	update(w, vm, func(vm *vmopv1.VirtualMachine) { vm.Spec.Volumes = nil })
	w.settle()
	var attachments storagev1.VolumeAttachmentList
	if err := w.List(t.Context(), &attachments); err != nil || len(attachments.Items) != 1 || len(w.machine().Disks) != 1 {
		t.Fatalf("detached before the machine has let go: %v, %+v", err, w.machine().Disks)
	}
	w.run(nil)
	w.settle()
	if err := w.Get(t.Context(), client.ObjectKeyFromObject(c), c); err != nil || len(c.Finalizers) != 0 || c.Annotations[attachment.HolderAnnotation] != "" {
		t.Fatalf("%+v, %v", c.ObjectMeta, err)
	}
	if err := w.List(t.Context(), &attachments); err != nil || len(attachments.Items) != 0 {
		t.Fatalf("%v, %+v", err, attachments.Items)
	}
}

func TestNoSecondMachineOverTheSameDisks(t *testing.T) {
	vm := newVM()
	left := &storagev1.VolumeAttachment{
		ObjectMeta: metav1.ObjectMeta{Name: "left", Finalizers: []string{"external-attacher/csi-atoll-dev"}, Labels: map[string]string{machinev1.UIDLabel: string(vm.UID), attachment.PurposeLabel: attachment.Disks}},
		Spec:       storagev1.VolumeAttachmentSpec{Attacher: attachment.Driver, NodeName: "n0", Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: new("pv-x")}},
	}
	w := newWorld(t, append(surroundings(), vm, left)...)
	got := w.settle()
	if w.pod() != nil {
		t.Fatal("it was started although node n0 may still have a disk of it")
	}
	if text := message(got, vmopv1.VirtualMachinePowerStateSynced); !strings.Contains(text, "node n0 has not let go of all volumes yet") {
		t.Error(text)
	}
	update(w, left, func(a *storagev1.VolumeAttachment) { a.Finalizers = nil })
	w.settle()
	if w.pod() == nil {
		t.Fatal("it was not started")
	}
}

func TestSuspendAndResume(t *testing.T) {
	w := started(t)
	vm := newVM()
	update(w, vm, func(vm *vmopv1.VirtualMachine) { vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateSuspended })
	w.settle()
	w.bind(MemoryClaim(vm), "default/memory")
	w.settle()
	w.attach()
	w.settle()
	ops := w.machine().Operations
	if len(ops) != 1 || ops[0].Kind != machinev1.Suspend || ops[0].Memory.Volume != "default/memory" {
		t.Fatalf("%+v", ops)
	}
	w.run(func(p *corev1.Pod, s *machinev1.State) {
		p.Status.Phase = corev1.PodSucceeded
		s.Phase, s.End = machinev1.Ended, machinev1.End{Reason: machinev1.EndSuspended}
	})
	got := w.settle()
	if got.Status.PowerState != vmopv1.VirtualMachinePowerStateSuspended || w.pod() != nil {
		t.Fatalf("%s, pod %v", got.Status.PowerState, w.pod())
	}
	if text := message(got, vmopv1.VirtualMachinePowerStateSynced); text != "True True " {
		t.Error(text)
	}
	update(w, vm, func(vm *vmopv1.VirtualMachine) { vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateOn })
	w.settle()
	m := w.machine()
	if m.Restore == nil || m.Restore.Volume != "default/memory" || len(m.Awaiting) != 1 {
		t.Fatalf("%+v, awaiting %v", m.Restore, m.Awaiting)
	}
	w.run(func(_ *corev1.Pod, s *machinev1.State) { *s = machinev1.State{Revision: 1, Phase: machinev1.Starting} })
	w.settle()
	w.attach()
	w.settle()
	if m := w.machine(); len(m.Awaiting) != 0 || m.Restore == nil {
		t.Fatalf("%+v", m)
	}
	w.run(nil)
	got = w.settle()
	c := &corev1.PersistentVolumeClaim{}
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: MemoryClaim(vm)}, c); !apierrors.IsNotFound(err) {
		t.Errorf("the memory that was used up is still there: %v", err)
	}
	if got.Status.PowerState != vmopv1.VirtualMachinePowerStateOn {
		t.Error(got.Status.PowerState)
	}
}

func TestRestart(t *testing.T) {
	w := started(t)
	vm := newVM()
	w.clock.SetTime(w.clock.Now().Add(time.Hour))
	update(w, vm, func(vm *vmopv1.VirtualMachine) { vm.Spec.NextRestartTime = w.clock.Now().Format(time.RFC3339Nano) })
	w.settle()
	ops := w.machine().Operations
	if len(ops) != 1 || ops[0].Kind != machinev1.Reset || ops[0].Mode != machinev1.TrySoft {
		t.Fatalf("%+v", ops)
	}
	w.run(func(_ *corev1.Pod, s *machinev1.State) {
		s.Operations = []machinev1.OperationState{{ID: ops[0].ID, Done: true}}
	})
	got := w.settle()
	if got.Status.LastRestartTime == nil || len(w.machine().Operations) != 0 {
		t.Fatalf("%v, %+v", got.Status.LastRestartTime, w.machine().Operations)
	}
	w.run(nil)
	w.settle()
	if len(w.machine().Operations) != 0 {
		t.Fatal("it is restarted again")
	}
	// One that is asked for after the end of another, which is noticed late.
	ask := func(at time.Time) []machinev1.Operation {
		update(w, vm, func(vm *vmopv1.VirtualMachine) { vm.Spec.NextRestartTime = at.Format(time.RFC3339Nano) })
		w.settle()
		return w.machine().Operations
	}
	begin := w.clock.Now().Add(time.Minute)
	w.clock.SetTime(begin)
	first := ask(begin)
	w.run(func(_ *corev1.Pod, s *machinev1.State) {
		s.Operations = []machinev1.OperationState{{ID: first[0].ID, Done: true}}
	})
	w.clock.SetTime(begin.Add(time.Hour))
	w.settle()
	if ops := ask(begin.Add(time.Minute)); len(ops) != 1 || ops[0].ID == first[0].ID {
		t.Errorf("a restart that was asked for in the meantime: %+v", ops)
	}
}

func TestResizeInPlace(t *testing.T) {
	big := &vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "big"}, Spec: vmopv1.VirtualMachineClassSpec{
		Hardware: vmopv1.VirtualMachineClassHardware{Cpus: 4, Memory: resource.MustParse("2Gi")},
	}}
	w := started(t, big)
	vm := newVM()
	update(w, vm, func(vm *vmopv1.VirtualMachine) { vm.Spec.ClassName = "big" })
	w.settle()
	p := w.pod()
	if got := p.Spec.Containers[0].Resources.Requests.Memory().String(); got != "2Gi" {
		t.Fatalf("the pod asks for %s", got)
	}
	if m := w.machine(); m.CPU.Count != 2 {
		t.Fatalf("the machine has more before its host has room: %+v", m.CPU)
	}
	update(w, p, func(p *corev1.Pod) {
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: machinev1.Container, AllocatedResources: p.Spec.Containers[0].Resources.Requests}}
	})
	w.settle()
	if m := w.machine(); m.CPU.Count != 4 || m.Memory.Bytes != 2<<30 {
		t.Fatalf("%+v, %+v", m.CPU, m.Memory)
	}
	w.run(nil)
	got := w.settle()
	if got.Status.Hardware.CPU.Total != 4 || message(got, vmopv1.VirtualMachineClassConfigurationSynced) != "True True " {
		t.Errorf("%+v", got.Status.Hardware)
	}
	update(w, vm, func(vm *vmopv1.VirtualMachine) { vm.Spec.ClassName = "small" })
	got = w.settle()
	if text := message(got, vmopv1.VirtualMachineClassConfigurationSynced); !strings.HasPrefix(text, "False PowerCyclePending") {
		t.Error(text)
	}
}

func TestClassEditHasNoEffectUntilAskedFor(t *testing.T) {
	w := started(t)
	update(w, &vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "small"}}, func(c *vmopv1.VirtualMachineClass) { c.Spec.Hardware.Cpus = 3 })
	got := w.settle()
	if text := message(got, vmopv1.VirtualMachineClassConfigurationSynced); !strings.HasPrefix(text, "False ClassUpdated") || w.machine().CPU.Count != 2 {
		t.Errorf("%s, %+v", text, w.machine().CPU)
	}
	update(w, newVM(), func(vm *vmopv1.VirtualMachine) {
		metav1.SetMetaDataAnnotation(&vm.ObjectMeta, vmopv1.VirtualMachineSameVMClassResizeAnnotation, "")
	})
	w.settle()
	if got := w.pod().Spec.Containers[0].Resources.Limits.Cpu().String(); got != "3" {
		t.Errorf("limit %s", got)
	}
}

func TestDeletionKeepsTheUsersClaims(t *testing.T) {
	data := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "data", UID: "d"}}
	vm := newVM()
	vm.Spec.Volumes = []vmopv1.VirtualMachineVolume{{Name: "data", VirtualMachineVolumeSource: vmopv1.VirtualMachineVolumeSource{
		PersistentVolumeClaim: &vmopv1.PersistentVolumeClaimVolumeSource{PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}},
	}}}
	w := newWorld(t, append(surroundings(), vm, data)...)
	w.settle()
	if err := w.Delete(t.Context(), newVM()); err != nil {
		t.Fatal(err)
	}
	w.settle()
	if err := w.Get(t.Context(), client.ObjectKeyFromObject(vm), vm); !apierrors.IsNotFound(err) {
		t.Fatalf("it is not gone: %v", err)
	}
	if err := w.Get(t.Context(), client.ObjectKeyFromObject(data), data); err != nil || len(data.Finalizers) > 0 || data.DeletionTimestamp != nil {
		t.Errorf("%+v, %v", data.ObjectMeta, err)
	}
	boot := &corev1.PersistentVolumeClaim{}
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: BootClaim(vm)}, boot); !apierrors.IsNotFound(err) {
		t.Errorf("the boot disk is still there: %v", err)
	}
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	vm := newVM()
	vm.Spec.ClassName, vm.Spec.StorageClass, vm.Spec.Image.Name = "huge", "gold", "plan9"
	w := newWorld(t, append(surroundings(), vm)...)
	got := w.settle()
	for typ, want := range map[string]string{
		vmopv1.VirtualMachineConditionClassReady:   "False NotFound VirtualMachineClass huge does not exist",
		vmopv1.VirtualMachineConditionImageReady:   "False NotFound ClusterVirtualMachineImage plan9 does not exist",
		vmopv1.VirtualMachineConditionStorageReady: "False NotFound StorageClass gold does not exist",
	} {
		if text := message(got, typ); !strings.HasPrefix(text, want) {
			t.Errorf("%s: %s", typ, text)
		}
	}
	if w.pod() != nil {
		t.Error("it was started")
	}
}

func TestBootDiskSmallerThanTheImage(t *testing.T) {
	vm := newVM()
	vm.Spec.Advanced = &vmopv1.VirtualMachineAdvancedSpec{BootDiskCapacity: new(resource.MustParse("1Gi"))}
	w := newWorld(t, append(surroundings(), vm)...)
	got := w.settle()
	if text := message(got, vmopv1.VirtualMachineConditionStorageReady); !strings.Contains(text, "bootDiskCapacity is 1Gi, but the disk of ClusterVirtualMachineImage debian has 10Gi") {
		t.Error(text)
	}
	update(w, vm, func(vm *vmopv1.VirtualMachine) {
		vm.Spec.Advanced.BootDiskCapacity = new(resource.MustParse("20Gi"))
	})
	got = w.settle()
	if text := message(got, vmopv1.VirtualMachineConditionStorageReady); text != "True True " {
		t.Error(text)
	}
}

func TestAnotherPodOfItsName(t *testing.T) {
	other := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "web"}}
	w := newWorld(t, append(surroundings(), newVM())...)
	w.r.Client = hiding{w.Client}
	if err := w.Create(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	got := w.settle()
	if text := message(got, vmopv1.VirtualMachineConditionPlacementReady); !strings.Contains(text, "another pod called web") {
		t.Error(text)
	}
}

// hiding is a cache of pods of virtual machines only.
type hiding struct{ client.Client }

// Get implements client.Reader.
func (h hiding) Get(ctx context.Context, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
	err := h.Client.Get(ctx, key, obj, opts...)
	if p, ok := obj.(*corev1.Pod); ok && err == nil && p.Labels[machinev1.UIDLabel] == "" {
		return apierrors.NewNotFound(corev1.Resource("pods"), key.Name)
	}
	return err
}

// failing is an API server that does not answer questions about claims.
type failing struct{ client.Client }

// Get implements client.Reader.
func (f failing) Get(ctx context.Context, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
	if _, ok := obj.(*corev1.PersistentVolumeClaim); ok && key.Name == "data" {
		return apierrors.NewServiceUnavailable("not now")
	}
	return f.Client.Get(ctx, key, obj, opts...)
}

func TestAnErrorTakesNothingFromAMachine(t *testing.T) {
	data := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "data", UID: "d"}, Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: new("fast")}}
	w := started(t, data)
	update(w, newVM(), func(vm *vmopv1.VirtualMachine) {
		vm.Spec.Volumes = []vmopv1.VirtualMachineVolume{{Name: "data", VirtualMachineVolumeSource: vmopv1.VirtualMachineVolumeSource{
			PersistentVolumeClaim: &vmopv1.PersistentVolumeClaimVolumeSource{PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}},
		}}}
	})
	w.settle()
	w.bind("data", "default/data")
	w.settle()
	w.attach()
	w.settle()
	w.run(nil)
	w.settle()
	w.r.Client = failing{w.Client}
	if _, err := w.r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(newVM())}); err == nil {
		t.Error("no error")
	}
	var there storagev1.VolumeAttachmentList
	if err := w.List(t.Context(), &there); err != nil || len(there.Items) != 1 || there.Items[0].DeletionTimestamp != nil || len(w.machine().Disks) != 2 {
		t.Errorf("%v, %+v, %+v", err, there.Items, w.machine().Disks)
	}
}

func TestNoStartWithoutItsVolumes(t *testing.T) {
	vm := newVM()
	vm.Spec.Volumes = []vmopv1.VirtualMachineVolume{{Name: "data", VirtualMachineVolumeSource: vmopv1.VirtualMachineVolumeSource{
		PersistentVolumeClaim: &vmopv1.PersistentVolumeClaimVolumeSource{PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}},
	}}}
	w := newWorld(t, append(surroundings(), vm)...)
	got := w.settle()
	if text := message(got, vmopv1.VirtualMachineConditionStorageReady); !strings.Contains(text, "PersistentVolumeClaim data does not exist") || w.pod() != nil {
		t.Errorf("%s, pod %v", text, w.pod())
	}
	if err := w.Create(t.Context(), &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "data"}, Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: new("fast")}}); err != nil {
		t.Fatal(err)
	}
	got = w.settle()
	if text := message(got, vmopv1.VirtualMachineConditionStorageReady); text != "True True " || w.pod() == nil {
		t.Errorf("%s, pod %v", text, w.pod())
	}
	if m := w.machine(); len(m.Awaiting) != 2 {
		t.Errorf("it would be started without its volumes: awaiting %v", m.Awaiting)
	}
}
