package vmpublish

import (
	"errors"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine"
)

const (
	sourceValid = vmopv1.VirtualMachinePublishRequestConditionSourceValid
	targetValid = vmopv1.VirtualMachinePublishRequestConditionTargetValid
	uploaded    = vmopv1.VirtualMachinePublishRequestConditionUploaded
	available   = vmopv1.VirtualMachinePublishRequestConditionImageAvailable
	complete    = vmopv1.VirtualMachinePublishRequestConditionComplete
)

type world struct {
	*testing.T
	*Reconciler
	now time.Time
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(vmopv1.AddToScheme(scheme), snapshotv1.AddToScheme(scheme), imageregistry.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, now: time.Now()}
	w.Reconciler = &Reconciler{Now: func() time.Time { return w.now }, Events: events.NewFakeRecorder(100), Client: fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&vmopv1.VirtualMachinePublishRequest{}, &imageregistry.ContentLibraryItem{}, &snapshotv1.VolumeSnapshot{}, &snapshotv1.VolumeSnapshotContent{}, &vmopv1.VirtualMachineImage{}).Build()}
	return w
}

func machine() *vmopv1.VirtualMachine {
	vm := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "box", UID: "vm-uid"}}
	vm.Spec.ImageName, vm.Spec.Image = "tiny", &vmopv1.VirtualMachineImageRef{Kind: "VirtualMachineImage", Name: "vmi-1"}
	condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated)
	return vm
}

func library(name string, writable bool, labels map[string]string) *imageregistry.ContentLibrary {
	return &imageregistry.ContentLibrary{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, Labels: labels}, Spec: imageregistry.ContentLibrarySpec{Writable: writable}}
}

func request(change ...func(*vmopv1.VirtualMachinePublishRequest)) *vmopv1.VirtualMachinePublishRequest {
	p := &vmopv1.VirtualMachinePublishRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "box", UID: "request-uid"},
		Spec:       vmopv1.VirtualMachinePublishRequestSpec{BackoffLimit: 2},
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// run is one look; it returns nil when the request is gone.
func (w *world) run() *vmopv1.VirtualMachinePublishRequest {
	w.Helper()
	key := client.ObjectKey{Namespace: "team", Name: "box"}
	_, err := w.Reconcile(w.Context(), ctrl.Request{NamespacedName: key})
	w.ok(err)
	p := &vmopv1.VirtualMachinePublishRequest{}
	if err := w.Get(w.Context(), key, p); apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		w.Fatal(err)
	}
	return p
}

func reason(p *vmopv1.VirtualMachinePublishRequest, kind string) string {
	if c := condition.Get(p.Status.Conditions, kind); c != nil {
		return c.Reason
	}
	return ""
}

// snapshotted does what the storage does.
func (w *world) snapshotted() {
	w.Helper()
	object := &snapshotv1.VolumeSnapshot{}
	w.ok(w.Get(w.Context(), client.ObjectKey{Namespace: "team", Name: "publish-request-uid"}, object))
	if *object.Spec.Source.PersistentVolumeClaimName != virtualmachine.BootClaim(machine()) {
		w.Fatalf("%+v", object.Spec)
	}
	content := &snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: "content"}}
	content.Spec.VolumeSnapshotRef.UID = object.UID
	w.ok(w.Create(w.Context(), content))
	content.Status = &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: new("default/s-1")}
	w.ok(w.Status().Update(w.Context(), content))
	object.Status = &snapshotv1.VolumeSnapshotStatus{ReadyToUse: new(true), BoundVolumeSnapshotContentName: new("content")}
	w.ok(w.Status().Update(w.Context(), object))
}

// item is the one that was made, after its status was changed.
func (w *world) item(ready bool, reason string) *imageregistry.ContentLibraryItem {
	w.Helper()
	item := &imageregistry.ContentLibraryItem{}
	w.ok(w.Get(w.Context(), client.ObjectKey{Namespace: "team", Name: "box-image"}, item))
	item.Status.Ready = ready
	if reason != "" {
		condition.False(&item.Status.Conditions, imageregistry.ReadyCondition, reason, "said so")
	}
	w.ok(w.Status().Update(w.Context(), item))
	return item
}

func TestPublish(t *testing.T) {
	base := &vmopv1.VirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "vmi-1"}, Status: vmopv1.VirtualMachineImageStatus{
		Firmware: "efi", OSInfo: vmopv1.VirtualMachineImageOSInfo{Type: "debian12_64Guest"},
	}}
	w := newWorld(t, machine(), base, library("other", true, nil), library("ours", true, map[string]string{defaultLabel: ""}),
		request(func(p *vmopv1.VirtualMachinePublishRequest) { p.Spec.TTLSecondsAfterFinished = new(int64(60)) }))
	p := w.run()
	if reason(p, sourceValid) != "True" || reason(p, targetValid) != "True" || reason(p, uploaded) != vmopv1.UploadTaskQueuedReason || reason(p, complete) != vmopv1.HasNotBeenUploadedReason ||
		p.Status.SourceRef.Name != "box" || p.Status.TargetRef.Item.Name != "box-image" || p.Status.TargetRef.Location.Name != "ours" || p.Status.StartTime.IsZero() {
		t.Fatalf("%+v", p.Status)
	}
	w.snapshotted()
	if p = w.run(); reason(p, uploaded) != vmopv1.UploadingReason || p.Status.Attempts != 1 {
		t.Fatalf("%+v", p.Status)
	}
	item := w.item(false, "Transferring")
	if item.Spec.Source.Volume.Snapshot != "default/s-1" || item.Spec.Library != "ours" || item.Spec.Firmware != "efi" || item.Spec.OS.Type != "debian12_64Guest" {
		t.Errorf("%+v", item.Spec)
	}
	if p = w.run(); !strings.Contains(condition.Get(p.Status.Conditions, uploaded).Message, "said so") {
		t.Errorf("%+v", p.Status)
	}
	item = w.item(true, "")
	if p = w.run(); reason(p, uploaded) != "True" || reason(p, available) != vmopv1.TargetVirtualMachineImageNotFoundReason || reason(p, complete) != vmopv1.ImageUnavailableReason {
		t.Fatalf("%+v", p.Status)
	}
	image := &vmopv1.VirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: imageregistry.ImageName(item.UID)}}
	w.ok(w.Create(t.Context(), image))
	condition.True(&image.Status.Conditions, vmopv1.ReadyConditionType)
	w.ok(w.Status().Update(t.Context(), image))
	if p = w.run(); !p.Status.Ready || p.Status.ImageName != image.Name || reason(p, complete) != "True" || p.Status.CompletionTime.IsZero() {
		t.Fatalf("%+v", p.Status)
	}
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: "team", Name: "publish-request-uid"}, &snapshotv1.VolumeSnapshot{}); !apierrors.IsNotFound(err) {
		t.Errorf("the snapshot stays: %v", err)
	}
	w.now = p.Status.CompletionTime.Add(time.Minute)
	if w.run() != nil {
		t.Error("the request stays")
	}
	w.item(true, "") // the item does
}

func TestInvalid(t *testing.T) {
	good := library("default", true, nil)
	tests := map[string]struct {
		objects []client.Object
		change  func(*vmopv1.VirtualMachinePublishRequest)
		kind    string
		reason  string
	}{
		"no machine": {[]client.Object{good}, nil, sourceValid, vmopv1.SourceVirtualMachineNotExistReason},
		"not made": {
			[]client.Object{good, func() client.Object { vm := machine(); vm.Status = vmopv1.VirtualMachineStatus{}; return vm }()},
			nil, sourceValid,
			vmopv1.SourceVirtualMachineNotCreatedReason,
		},
		"no library": {[]client.Object{machine()}, nil, targetValid, vmopv1.TargetContentLibraryNotExistReason},
		"other kind": {[]client.Object{machine(), good}, func(p *vmopv1.VirtualMachinePublishRequest) { p.Spec.Target.Location.Kind = "ClusterContentLibrary" }, targetValid, vmopv1.TargetContentLibraryNotExistReason},
		"read-only":  {[]client.Object{machine(), library("default", false, nil)}, nil, targetValid, vmopv1.TargetContentLibraryNotWritableReason},
		"taken": {[]client.Object{machine(), good, &imageregistry.ContentLibraryItem{
			ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "x"},
			Spec:       imageregistry.ContentLibraryItemSpec{Library: "default", Name: "box-image"},
		}}, nil, targetValid, vmopv1.TargetItemAlreadyExistsReason},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := request()
			if tt.change != nil {
				tt.change(p)
			}
			w := newWorld(t, append(tt.objects, p)...)
			if p = w.run(); reason(p, tt.kind) != tt.reason || reason(p, uploaded) != vmopv1.UploadTaskNotStartedReason || reason(p, complete) != vmopv1.HasNotBeenUploadedReason {
				t.Errorf("%+v", p.Status)
			}
		})
	}
}

// TestBackoff: an attempt that fails is repeated after a pause, and given up at the limit.
func TestBackoff(t *testing.T) {
	w := newWorld(t, machine(), library("default", true, nil), request())
	w.run()
	w.snapshotted()
	w.run()
	w.item(false, imageregistry.ItemContentBad)
	p := w.run()
	if reason(p, uploaded) != vmopv1.UploadFailureReason || p.Status.Attempts != 1 {
		t.Fatalf("%+v", p.Status)
	}
	if p = w.run(); p.Status.Attempts != 1 {
		t.Fatalf("tried again at once: %+v", p.Status)
	}
	w.now = w.now.Add(retryFirst)
	if p = w.run(); p.Status.Attempts != 2 || reason(p, uploaded) != vmopv1.UploadingReason {
		t.Fatalf("%+v", p.Status)
	}
	w.item(false, imageregistry.ItemContentBad)
	if p = w.run(); reason(p, uploaded) != vmopv1.FatalReason || p.Status.Ready {
		t.Fatalf("%+v", p.Status)
	}
	w.now = w.now.Add(time.Hour)
	if p = w.run(); p.Status.Attempts != 2 {
		t.Errorf("tried again: %+v", p.Status)
	}
}

func TestItemName(t *testing.T) {
	p := request()
	p.Status.TargetRef = &vmopv1.VirtualMachinePublishRequestTarget{}
	for name, ok := range map[string]bool{"golden": true, "Debian 12 (nginx)": false, strings.Repeat("x", 300): false} {
		p.Status.TargetRef.Item.Name = name
		if got := itemName(p, library("default", true, nil)); (got == name) != ok || len(got) > 253 || strings.ContainsAny(got, " (A") {
			t.Errorf("%q becomes %q", name, got)
		}
	}
}

// TestInProject: in the registry an image is REPOSITORY:TAG, which must be one and not be there.
func TestInProject(t *testing.T) {
	project := library("registry", true, nil)
	project.Spec.Registry = &imageregistry.RegistryBacking{}
	unseen := newWorld(t, machine(), project.DeepCopy(), request(func(p *vmopv1.VirtualMachinePublishRequest) { p.Spec.Target.Location.Name = "registry" }))
	if p := unseen.run(); reason(p, targetValid) != vmopv1.TargetContentLibraryNotReadyReason {
		t.Errorf("a project that nobody has looked at: %+v", condition.Get(p.Status.Conditions, targetValid))
	}
	condition.True(&project.Status.Conditions, imageregistry.ReadyCondition)
	for name, want := range map[string]string{
		"web": "True", "a/web:1.0": "True", "Web": reasonName, "a b": reasonName, "web:": reasonName, strings.Repeat("x", 252): reasonName, "there:1": vmopv1.TargetItemAlreadyExistsReason,
	} {
		w := newWorld(t, machine(), project.DeepCopy(), request(func(p *vmopv1.VirtualMachinePublishRequest) {
			p.Spec.Target.Item.Name, p.Spec.Target.Location.Name = name, "registry"
		}))
		w.Tagged = func(project, repository, tag string) (bool, error) {
			return project == "team" && repository == "there" && tag == "1", nil
		}
		if p := w.run(); reason(p, targetValid) != want {
			t.Errorf("%.20q: %+v", name, condition.Get(p.Status.Conditions, targetValid))
		}
	}
	w := newWorld(t, machine(), project, request(func(p *vmopv1.VirtualMachinePublishRequest) {
		p.Spec.Target.Item.Name, p.Spec.Target.Location.Name = "web:latest", "registry"
	}))
	tagged := false
	w.Tagged = func(string, string, string) (bool, error) { return tagged, nil }
	w.run()
	w.snapshotted()
	w.run()
	tagged = true // by ourselves
	item := &imageregistry.ContentLibraryItem{}
	w.ok(w.Get(t.Context(), client.ObjectKey{Namespace: "team", Name: "publish-request-uid"}, item))
	if item.Spec.Name != "web" || item.Spec.Library != "registry" || *item.Spec.Push != (imageregistry.PushTarget{Repository: "web", Tag: "latest"}) {
		t.Errorf("%+v", item.Spec)
	}
	condition.False(&item.Status.Conditions, imageregistry.ReadyCondition, imageregistry.ItemPushing, "5 of 10 bytes")
	w.ok(w.Status().Update(t.Context(), item))
	if p := w.run(); reason(p, targetValid) != "True" || !strings.Contains(condition.Get(p.Status.Conditions, uploaded).Message, "Pushing: 5 of 10 bytes") {
		t.Errorf("%+v", p.Status)
	}
	condition.False(&item.Status.Conditions, imageregistry.ReadyCondition, imageregistry.ItemPushRefused, "quota 1 GiB")
	w.ok(w.Status().Update(t.Context(), item))
	if p := w.run(); reason(p, uploaded) != vmopv1.UploadFailureReason || !strings.Contains(condition.Get(p.Status.Conditions, uploaded).Message, "quota 1 GiB") {
		t.Errorf("%+v", p.Status)
	}
}
