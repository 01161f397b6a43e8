package vmsnapshot

import (
	"context"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

func TestRunningWithMemory(t *testing.T) {
	w := newWorld(t, on)
	w.make("one", true)
	s := w.snap("one")
	s.Spec.Quiesce = &vmopv1.QuiesceSpec{Timeout: &metav1.Duration{Duration: time.Minute}}
	w.ok(w.Update(t.Context(), s))
	s, _ = w.run("one")
	if reason(s, created) != "CreationInProgress" || s.Labels[vmopv1.VMNameForSnapshotLabel] != "box" || len(s.OwnerReferences) != 1 || len(s.Finalizers) != 1 {
		t.Fatalf("%+v", s)
	}
	claim := &corev1.PersistentVolumeClaim{}
	if !w.get("memory-snap-one", claim) || *claim.Spec.VolumeMode != corev1.PersistentVolumeBlock || claim.Spec.Resources.Requests.Storage().Value() != 2<<30+memoryExtra || *claim.Spec.StorageClassName != "atoll" {
		t.Fatalf("claim %+v", claim)
	}
	for range 3 {
		w.storage()
		w.run("one")
	}
	ops := w.operations()
	if len(ops) != 1 {
		t.Fatalf("operations %+v", ops)
	}
	op := ops[0]
	if op.Kind != machinev1.Snapshot || !op.Quiesce || op.QuiesceSeconds != 60 || op.Memory.Volume != "default/memory-snap-one" || len(op.Snapshots) != 2 || op.Snapshots["boot"] == op.Snapshots["data"] {
		t.Errorf("operation %+v", op)
	}
	w.host(machinev1.OperationState{Percent: 40})
	if s, _ = w.run("one"); !strings.Contains(message(s), "40%") {
		t.Errorf("%+v", s.Status)
	}
	w.host(machinev1.OperationState{Done: true, Quiesced: true, Bytes: 77})
	s, _ = w.run("one")
	if reason(s, created) != "True" || reason(s, ready) != "WaitingForCSISync" || !s.Status.Quiesced || s.Status.PowerState != on || s.Status.Storage.Used.Value() != 77 {
		t.Errorf("%+v", s.Status)
	}
	if r := s.Status.Storage.Requested; len(r) != 1 || r[0].StorageClass != "atoll" || r[0].Total.Value() != 6<<30+2<<30+memoryExtra {
		t.Errorf("%+v", r)
	}
	if len(w.operations()) != 1 {
		t.Error("the operation is forgotten before it is known to be noted")
	}
	if w.run("one"); len(w.operations()) != 0 {
		t.Error("the operation is not forgotten")
	}
	var attachments storagev1.VolumeAttachmentList
	w.ok(w.List(t.Context(), &attachments))
	if len(attachments.Items) != 0 {
		t.Errorf("still attached: %+v", attachments.Items)
	}
	var snaps snapshotv1.VolumeSnapshotList
	w.ok(w.List(t.Context(), &snaps))
	content := &snapshotv1.VolumeSnapshotContent{}
	if len(snaps.Items) != 2 || !w.get(*snaps.Items[0].Spec.Source.VolumeSnapshotContentName, content) {
		t.Fatalf("VolumeSnapshots %+v", snaps.Items)
	}
	if h := *content.Spec.Source.SnapshotHandle; h != "default/"+op.Snapshots["boot"] && h != "default/"+op.Snapshots["data"] || content.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentDelete ||
		content.Spec.VolumeSnapshotRef.Name != snaps.Items[0].Name || !metav1.IsControlledBy(&snaps.Items[0], s) {
		t.Errorf("content %+v", content.Spec)
	}
	w.storage()
	if s, _ = w.run("one"); reason(s, ready) != "True" || w.family() != "one @one" {
		t.Errorf("%+v, %s", s.Status, w.family())
	}
}

// TestStale: a snapshot that was read before the last change of its status undoes nothing, and the host is not asked again,
// which does nothing twice.
func TestStale(t *testing.T) {
	for name, c := range map[string]struct {
		result machinev1.OperationState
		want   string
	}{
		"taken":  {machinev1.OperationState{Done: true}, "True"},
		"failed": {machinev1.OperationState{Done: true, Error: "no room"}, "CreationFailed"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, on)
			w.make("one", false)
			w.run("one")
			w.host(c.result)
			stale := w.snap("one")
			if s, _ := w.run("one"); reason(s, created) != c.want {
				t.Fatalf("%+v", s.Status)
			}
			w.host(c.result) // of what it is still told
			read := func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
				if s, ok := o.(*vmopv1.VirtualMachineSnapshot); ok {
					stale.DeepCopyInto(s)
					return nil
				}
				return c.Get(ctx, key, o, opts...)
			}
			r := &Reconciler{Client: interceptor.NewClient(w.Client.(client.WithWatch), interceptor.Funcs{Get: read}), Events: w.r.Events}
			if result, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(stale)}); err != nil || result.RequeueAfter == 0 {
				t.Errorf("%+v, %v", result, err)
			}
			if s := w.snap("one"); reason(s, created) != c.want || len(w.operations()) != 1 {
				t.Errorf("%+v, %+v", s.Status, w.operations())
			}
			if c.want == "True" {
				w.storage()
			}
			if s, _ := w.run("one"); reason(s, created) != c.want || reason(s, ready) == "True" != (c.want == "True") || len(w.operations()) != 0 {
				t.Errorf("%+v, %+v", s.Status, w.operations())
			}
		})
	}
}

func TestWithoutMemory(t *testing.T) {
	w := newWorld(t, on)
	s := w.taken("one", false)
	if s.Status.PowerState != off || planOf(s).Memory != "" || w.get("memory-snap-one", &corev1.PersistentVolumeClaim{}) {
		t.Errorf("%+v", s.Status)
	}
}

// TestOff: a machine that is off is held off, and its disks are snapshotted by CSI.
func TestOff(t *testing.T) {
	w := newWorld(t, off)
	w.make("one", true) // there is no memory
	s, _ := w.run("one")
	if w.vm().Annotations[checkAnnotation] != "one" || reason(s, created) != "CreationInProgress" {
		t.Fatalf("%v, %+v", w.vm().Annotations, s.Status)
	}
	var snaps snapshotv1.VolumeSnapshotList
	w.ok(w.List(t.Context(), &snaps))
	if len(snaps.Items) != 2 || snaps.Items[0].Spec.Source.PersistentVolumeClaimName == nil {
		t.Fatalf("%+v", snaps.Items)
	}
	w.storage()
	s, _ = w.run("one")
	if _, held := w.vm().Annotations[checkAnnotation]; held || reason(s, ready) != "True" || s.Status.PowerState != off || w.family() != "one @one" {
		t.Errorf("%v, %+v, %s", w.vm().Annotations, s.Status, w.family())
	}
}

func TestTurns(t *testing.T) {
	w := newWorld(t, off)
	w.make("one", false)
	w.make("two", false)
	if s, _ := w.run("two"); reason(s, created) != "WaitingForCreation" || !strings.Contains(message(s), "snapshot one") {
		t.Errorf("%+v", s.Status)
	}
	w.run("one")
	w.storage()
	w.run("one")
	w.run("two")
	w.storage()
	if s, _ := w.run("two"); reason(s, ready) != "True" || w.family() != "one(two) @two" {
		t.Errorf("%+v, %s", s.Status, w.family())
	}
}

func TestFailures(t *testing.T) {
	t.Run("no machine", func(t *testing.T) {
		w := newWorld(t, off)
		w.ok(w.Create(t.Context(), &vmopv1.VirtualMachineSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "one"}, Spec: vmopv1.VirtualMachineSnapshotSpec{VMName: "other"}}))
		if s, _ := w.run("one"); reason(s, ready) != "WaitingForCreation" || !strings.Contains(message(s), `no virtual machine "other"`) {
			t.Errorf("%+v", s.Status)
		}
	})
	t.Run("the host cannot", func(t *testing.T) {
		w := newWorld(t, on)
		w.make("one", false)
		w.run("one")
		w.host(machinev1.OperationState{Done: true, Error: "no\x1broom"})
		s, _ := w.run("one")
		if reason(s, created) != "CreationFailed" || !strings.Contains(message(s), "no room") || len(w.operations()) != 1 {
			t.Errorf("the host has forgotten before it is known: %+v, %+v", s.Status, w.operations())
		}
		if s, _ = w.run("one"); reason(s, created) != "CreationFailed" || len(w.operations()) != 0 {
			t.Errorf("%+v, %+v", s.Status, w.operations())
		}
		w.ok(w.Delete(t.Context(), s))
		if w.run("one"); w.snap("one") != nil || w.family() != " @-" {
			t.Errorf("not deleted; %s", w.family())
		}
	})
	t.Run("stopped meanwhile", func(t *testing.T) {
		w := newWorld(t, on)
		w.make("one", false)
		w.run("one")
		w.ok(w.Delete(t.Context(), w.pod()))
		s, _ := w.run("one")
		if reason(s, created) != "CreationFailed" || !strings.Contains(message(s), "has stopped while") {
			t.Errorf("%+v", s.Status)
		}
		var snaps snapshotv1.VolumeSnapshotList // so that what the host has made is deleted
		if w.ok(w.List(t.Context(), &snaps)); len(snaps.Items) != 2 {
			t.Errorf("%+v", snaps.Items)
		}
	})
	t.Run("powered on meanwhile", func(t *testing.T) {
		w := newWorld(t, off)
		w.make("one", false)
		w.run("one")
		w.ok(w.Create(t.Context(), podOf(w.vm())))
		w.run("one")
		s, _ := w.run("one")
		if _, held := w.vm().Annotations[checkAnnotation]; held || reason(s, created) != "CreationFailed" {
			t.Errorf("%+v", s.Status)
		}
	})
	t.Run("shared disk", func(t *testing.T) {
		w := newWorld(t, off)
		vm := w.vm()
		vm.Spec.Volumes[0].SharingMode = vmopv1.VolumeSharingModeMultiWriter
		w.ok(w.Update(t.Context(), vm))
		w.make("one", false)
		if s, _ := w.run("one"); reason(s, created) != "CreationFailed" || !strings.Contains(message(s), "IndependentPersistent") {
			t.Errorf("%+v", s.Status)
		}
		vm = w.vm()
		vm.Spec.Volumes[0].DiskMode = vmopv1.VolumeDiskModeIndependentPersistent
		w.ok(w.Update(t.Context(), vm))
		if s := w.taken("two", false); len(planOf(s).Disks) != 1 {
			t.Errorf("%+v", planOf(s).Disks)
		}
	})
	t.Run("not made yet", func(t *testing.T) {
		w := newWorld(t, off)
		vm := w.vm()
		vm.Status.Conditions = nil
		w.ok(w.Status().Update(t.Context(), vm))
		w.make("one", false)
		if s, result := w.run("one"); reason(s, created) != "WaitingForCreation" || result.RequeueAfter == 0 {
			t.Errorf("%+v", s.Status)
		}
	})
	t.Run("between", func(t *testing.T) {
		w := newWorld(t, on)
		w.ok(w.Delete(t.Context(), w.pod()))
		w.make("one", false)
		if s, result := w.run("one"); reason(s, created) != "WaitingForCreation" || result.RequeueAfter == 0 {
			t.Errorf("%+v", s.Status)
		}
	})
}

// TestDeleteInAnyOrder: a tree loses members, and stays one.
func TestDeleteInAnyOrder(t *testing.T) {
	w := newWorld(t, off)
	for _, name := range []string{"a", "b", "c"} {
		w.taken(name, false)
	}
	if got := w.family(); got != "a(b(c)) @c" {
		t.Fatal(got)
	}
	for _, step := range []struct{ name, left string }{{"b", "a(c) @c"}, {"a", "c @c"}, {"c", " @-"}} {
		w.ok(w.Delete(t.Context(), w.snap(step.name)))
		w.run(step.name)
		if got := w.family(); got != step.left || w.snap(step.name) != nil {
			t.Errorf("without %s: %s, want %s", step.name, got, step.left)
		}
	}
}

// TestDeleteWaitsForTheHost: what is under way is not taken away under it.
func TestDeleteWaitsForTheHost(t *testing.T) {
	w := newWorld(t, on)
	w.make("one", false)
	w.run("one")
	w.ok(w.Delete(t.Context(), w.snap("one")))
	if _, result := w.run("one"); result.RequeueAfter == 0 || w.snap("one") == nil {
		t.Fatal("deleted under the host")
	}
	w.host(machinev1.OperationState{Done: true})
	if w.run("one"); w.snap("one") != nil || len(w.operations()) != 0 {
		t.Error("not deleted")
	}
}
