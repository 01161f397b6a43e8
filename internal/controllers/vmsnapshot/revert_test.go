package vmsnapshot

import (
	"encoding/json"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine"
)

const reverted = vmopv1.VirtualMachineSnapshotRevertSucceeded

// wish asks for a machine to go back.
func (w *world) wish(name string) {
	w.Helper()
	vm := w.vm()
	vm.Spec.CurrentSnapshotName = name
	w.ok(w.Update(w.Context(), vm))
}

// revert is one look of the controller of virtual machines.
func (w *world) revert() (virtualmachine.Revert, *vmopv1.VirtualMachine) {
	w.Helper()
	vm := w.vm()
	out, err := w.v.Revert(w.Context(), vm, w.pod())
	w.ok(err)
	w.ok(w.Status().Update(w.Context(), vm))
	return out, vm
}

func why(vm *vmopv1.VirtualMachine) string {
	c := condition.Get(vm.Status.Conditions, reverted)
	return strings.TrimPrefix(c.Reason, "VirtualMachineSnapshot") + ": " + c.Message
}

// agents roll volumes back.
func (w *world) agents(failing string) {
	w.Helper()
	for _, name := range []string{"pv-boot", "pv-data"} {
		pv := &corev1.PersistentVolume{}
		if !w.get(name, pv) || pv.Annotations[imageregistry.RollbackAnnotation] == "" {
			continue
		}
		if failing != "" {
			metav1.SetMetaDataAnnotation(&pv.ObjectMeta, imageregistry.RollbackErrorAnnotation, failing)
		} else {
			delete(pv.Annotations, imageregistry.RollbackErrorAnnotation)
			metav1.SetMetaDataAnnotation(&pv.ObjectMeta, imageregistry.RolledBackAnnotation, pv.Annotations[imageregistry.RollbackAnnotation])
		}
		w.ok(w.Update(w.Context(), pv))
	}
}

func (w *world) marks() string {
	var out []string
	for _, name := range []string{"pv-boot", "pv-data"} {
		pv := &corev1.PersistentVolume{}
		w.get(name, pv)
		out = append(out, pv.Annotations[imageregistry.RollbackAnnotation])
	}
	return strings.Join(out, " ")
}

// off powers the machine off.
func (w *world) off() {
	w.Helper()
	if p := w.pod(); p != nil {
		w.ok(w.Delete(w.Context(), p))
	}
	vm := w.vm()
	vm.Status.PowerState = off
	w.ok(w.Status().Update(w.Context(), vm))
}

func TestRevertDisks(t *testing.T) {
	w := newWorld(t, on)
	w.taken("one", false)
	w.taken("two", false)
	vm := w.vm()
	vm.Spec.ClassName = "large"
	w.ok(w.Update(t.Context(), vm))
	w.wish("one")
	if out, vm := w.revert(); !out.PowerOff || !out.Busy || why(vm) != "RevertInProgress: powering the virtual machine off" || w.marks() != " " {
		t.Fatalf("%+v, %s, %q", out, why(vm), w.marks())
	}
	w.off()
	w.ok(w.Create(t.Context(), &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{machinev1.UIDLabel: "vm-uid"}}, Spec: storagev1.VolumeAttachmentSpec{NodeName: "host-1"}}))
	if out, vm := w.revert(); !out.Busy || !strings.Contains(why(vm), "host-1 has let go") {
		t.Fatalf("%+v, %s", out, why(vm))
	}
	w.ok(w.Delete(t.Context(), &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "a"}}))
	w.revert()
	w.revert()
	if marks := strings.Fields(w.marks()); len(marks) != 2 || !strings.HasPrefix(marks[0], "default/s-vm") || marks[0] == marks[1] {
		t.Fatalf("%q", marks)
	}
	w.agents("the datastore is full")
	if out, vm := w.revert(); !out.Busy || !strings.Contains(why(vm), "boot (the datastore is full)") {
		t.Fatalf("%+v, %s", out, why(vm))
	}
	w.agents("")
	if out, vm := w.revert(); !out.Busy || vm.Spec.ClassName != "small" || vm.Spec.PowerState != off || vm.Spec.CurrentSnapshotName != "one" {
		t.Fatalf("%+v, %+v", out, vm.Spec)
	}
	out, vm := w.revert()
	if !out.Done || out.Busy || vm.Spec.CurrentSnapshotName != "" || vm.Annotations[virtualmachine.RevertAnnotation] != "" || why(vm) != "True: " || w.marks() != " " {
		t.Fatalf("%+v, %+v, %s", out, vm, why(vm))
	}
	if w.family() != "one(two) @one" {
		t.Error(w.family())
	}
	// The next one is below it.
	w.taken("three", false)
	if got := w.family(); got != "one(two three) @three" {
		t.Error(got)
	}
}

func TestRevertMemory(t *testing.T) {
	w := newWorld(t, on)
	w.taken("one", true)
	w.off()
	w.wish("one")
	for range 2 {
		w.revert()
	}
	w.agents("")
	w.revert()
	out, vm := w.revert()
	if out.MemoryClaim != "memory-snap-one" || out.Busy || out.PowerOff || vm.Spec.PowerState != on || vm.Spec.CurrentSnapshotName == "" {
		t.Fatalf("%+v, %+v", out, vm.Spec)
	}
	p := podOf(w.vm())
	var m machinev1.Machine
	w.ok(json.Unmarshal([]byte(p.Annotations[machinev1.Annotation]), &m))
	m.Restore = &machinev1.MemoryState{Volume: "default/memory-snap-one"}
	text, _ := json.Marshal(m)
	p.Annotations[machinev1.Annotation] = string(text)
	state := p.Annotations[machinev1.StateAnnotation]
	delete(p.Annotations, machinev1.StateAnnotation)
	w.ok(w.Create(t.Context(), p))
	if out, _ = w.revert(); out.MemoryClaim == "" || out.Done {
		t.Fatalf("%+v before it runs", out)
	}
	p = w.pod()
	p.Annotations[machinev1.StateAnnotation] = state
	w.ok(w.Update(t.Context(), p))
	if out, vm = w.revert(); !out.Done || vm.Spec.PowerState != on || vm.Spec.CurrentSnapshotName != "" {
		t.Errorf("%+v, %+v", out, vm.Spec)
	}
}

func TestRevertRefused(t *testing.T) {
	w := newWorld(t, off)
	w.taken("one", false)
	w.make("broken", false)
	w.ok(w.Create(t.Context(), &vmopv1.VirtualMachineSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "foreign"}, Spec: vmopv1.VirtualMachineSnapshotSpec{VMName: "other"}}))
	for name, say := range map[string]string{
		"none": `RevertFailed: there is no snapshot "none"`, "broken": "RevertSkipped: snapshot broken is not ready", "foreign": "RevertFailed: snapshot foreign is of virtual machine other",
	} {
		w.wish(name)
		if out, vm := w.revert(); out != (virtualmachine.Revert{}) || !strings.HasPrefix(why(vm), say) {
			t.Errorf("%s: %+v, %s", name, out, why(vm))
		}
	}
	w.wish("one")
	claim := &corev1.PersistentVolumeClaim{}
	w.get("data-claim", claim)
	w.ok(w.Delete(t.Context(), claim))
	if out, vm := w.revert(); out.Busy || !strings.Contains(why(vm), "PersistentVolumeClaim data-claim, which was disk data, is gone") {
		t.Errorf("%+v, %s", out, why(vm))
	}
}

// TestRevertIsFinished: a wish that is taken back half-way is gone through with, one that has changed is followed.
func TestRevertIsFinished(t *testing.T) {
	w := newWorld(t, off)
	w.taken("one", false)
	w.taken("two", false)
	w.wish("one")
	w.revert()
	w.revert()
	first := w.marks()
	w.wish("")
	if out, vm := w.revert(); !out.Busy || vm.Spec.CurrentSnapshotName != "one" {
		t.Fatalf("%+v, %q", out, vm.Spec.CurrentSnapshotName)
	}
	w.agents("")
	w.wish("two")
	for range 2 {
		w.revert()
	}
	if w.marks() == first || w.marks() == " " {
		t.Errorf("%q after %q", w.marks(), first)
	}
	w.agents("")
	w.revert()
	if out, _ := w.revert(); !out.Done || w.family() != "one(two) @two" {
		t.Errorf("%+v, %s", out, w.family())
	}
}

// TestPlanOfStrangers: a plan is a user's to write, and must not reach volumes of other namespaces.
func TestPlanOfStrangers(t *testing.T) {
	secret := bound("secret", "secret-claim", "1Gi")
	secret[1].(*corev1.PersistentVolume).Spec.ClaimRef.Namespace = "other"
	w := newWorld(t, on, secret[1])
	w.make("one", false)
	w.run("one")
	s := w.snap("one")
	p := planOf(s)
	p.Disks[0].Volume = "pv-secret"
	text, _ := json.Marshal(p)
	s.Annotations[planAnnotation] = string(text)
	w.ok(w.Update(t.Context(), s))
	w.host(machinev1.OperationState{Done: true})
	if s, _ = w.run("one"); reason(s, created) != "CreationFailed" {
		t.Errorf("%+v", s.Status)
	}
}
