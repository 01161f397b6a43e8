package vmpublish

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine"
)

// snapshotName is the name of the VolumeSnapshot that a request is made of.
func snapshotName(p *vmopv1.VirtualMachinePublishRequest) string { return "publish-" + string(p.UID) }

// itemName is the name of the item's object: that of the image if it can be one. In the registry an image is known by its
// repository and tag, and the object by the request.
func itemName(p *vmopv1.VirtualMachinePublishRequest, library *imageregistry.ContentLibrary) string {
	if library.Spec.Registry != nil {
		return "publish-" + string(p.UID)
	}
	name := p.Status.TargetRef.Item.Name
	if len(validation.IsDNS1123Subdomain(name)) == 0 {
		return name
	}
	return fmt.Sprintf("item-%x", sha256.Sum256([]byte(name)))[:21]
}

// item is the one that the request has made, nil when there is none.
func (r *Reconciler) item(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest) (*imageregistry.ContentLibraryItem, error) {
	var list imageregistry.ContentLibraryItemList
	if err := r.List(ctx, &list, client.InNamespace(p.Namespace), client.MatchingLabels{requestLabel: string(p.UID)}); err != nil {
		return nil, fmt.Errorf("listing library items: %w", err)
	}
	for i := range list.Items {
		if list.Items[i].DeletionTimestamp == nil {
			return &list.Items[i], nil
		}
	}
	return nil, nil
}

func uploading(p *vmopv1.VirtualMachinePublishRequest, reason, format string, args ...any) {
	condition.False(&p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionUploaded, reason, format, args...)
}

// upload takes the snapshot, and makes the item when it is there.
func (r *Reconciler) upload(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest, vm *vmopv1.VirtualMachine, library *imageregistry.ContentLibrary) (time.Duration, error) {
	if left := pause(p).Sub(r.Now()); left > 0 {
		return left, nil
	}
	object := &snapshotv1.VolumeSnapshot{}
	err := r.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: snapshotName(p)}, object)
	if apierrors.IsNotFound(err) {
		object = &snapshotv1.VolumeSnapshot{
			ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: snapshotName(p)},
			Spec:       snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: new(virtualmachine.BootClaim(vm))}},
		}
		if err := controllerutil.SetControllerReference(p, object, r.Scheme()); err != nil {
			return 0, fmt.Errorf("owning VolumeSnapshot %s: %w", object.Name, err)
		}
		if err := r.Create(ctx, object); err != nil {
			uploading(p, vmopv1.UploadFailureReason, "taking a snapshot of the boot disk: %s", err)
			return 0, fmt.Errorf("making VolumeSnapshot %s: %w", object.Name, err)
		}
		uploading(p, vmopv1.UploadTaskQueuedReason, "a snapshot of the boot disk is being taken")
		return lookEvery, nil
	}
	if err != nil {
		return 0, fmt.Errorf("reading VolumeSnapshot %s: %w", snapshotName(p), err)
	}
	st := object.Status
	if st == nil || st.ReadyToUse == nil || !*st.ReadyToUse || st.BoundVolumeSnapshotContentName == nil {
		why := "a snapshot of the boot disk is being taken"
		if st != nil && st.Error != nil && st.Error.Message != nil {
			why += ": " + *st.Error.Message
		}
		uploading(p, vmopv1.UploadTaskQueuedReason, "%s", why)
		return lookEvery, nil
	}
	content := &snapshotv1.VolumeSnapshotContent{}
	if err := r.Get(ctx, client.ObjectKey{Name: *st.BoundVolumeSnapshotContentName}, content); err != nil {
		return 0, fmt.Errorf("reading VolumeSnapshotContent %s: %w", *st.BoundVolumeSnapshotContentName, err)
	}
	if content.Status == nil || content.Status.SnapshotHandle == nil || content.Spec.VolumeSnapshotRef.UID != object.UID {
		return lookEvery, nil
	}
	return lookEvery, r.makeItem(ctx, p, vm, library, *content.Status.SnapshotHandle)
}

// makeItem makes the item, which is what an attempt is.
func (r *Reconciler) makeItem(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest, vm *vmopv1.VirtualMachine, library *imageregistry.ContentLibrary, handle string) error {
	target := p.Status.TargetRef
	item := &imageregistry.ContentLibraryItem{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: itemName(p, library), Labels: map[string]string{requestLabel: string(p.UID)}},
		Spec: imageregistry.ContentLibraryItemSpec{
			Library: target.Location.Name, Name: target.Item.Name, Description: target.Item.Description,
			Source: &imageregistry.ItemSource{Volume: &imageregistry.VolumeSource{Snapshot: handle}},
		},
	}
	if library.Spec.Registry != nil {
		repository, tag := imageregistry.SplitTagName(target.Item.Name)
		item.Spec.Name, item.Spec.Push = imageregistry.TagName(repository, tag), &imageregistry.PushTarget{Repository: repository, Tag: tag}
	}
	if err := r.inherit(ctx, vm, item); err != nil {
		return err
	}
	if err := controllerutil.SetOwnerReference(p, item, r.Scheme()); err != nil {
		return fmt.Errorf("owning ContentLibraryItem %s: %w", item.Name, err)
	}
	p.Status.Attempts++
	p.Status.LastAttemptTime = metav1.NewTime(r.Now())
	if err := r.Create(ctx, item); err != nil {
		return r.failed(p, fmt.Sprintf("making ContentLibraryItem %s: %s", item.Name, err))
	}
	uploading(p, vmopv1.UploadingReason, "ContentLibraryItem %s is being filled", item.Name)
	return nil
}

// inherit gives the item what is known of the image that the machine was made of.
func (r *Reconciler) inherit(ctx context.Context, vm *vmopv1.VirtualMachine, item *imageregistry.ContentLibraryItem) error {
	if vm.Spec.Image == nil {
		return nil
	}
	var st vmopv1.VirtualMachineImageStatus
	var err error
	if vm.Spec.Image.Kind == "ClusterVirtualMachineImage" {
		image := &vmopv1.ClusterVirtualMachineImage{}
		err = r.Get(ctx, client.ObjectKey{Name: vm.Spec.Image.Name}, image)
		st = image.Status
	} else {
		image := &vmopv1.VirtualMachineImage{}
		err = r.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: vm.Spec.Image.Name}, image)
		st = image.Status
	}
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("reading image %s: %w", vm.Spec.Image.Name, err)
	}
	item.Spec.OS = imageregistry.OSInfo{ID: st.OSInfo.ID, Type: st.OSInfo.Type, Version: st.OSInfo.Version}
	item.Spec.Firmware = st.Firmware
	if vm.Spec.BootOptions != nil && vm.Spec.BootOptions.Firmware != "" {
		item.Spec.Firmware = string(vm.Spec.BootOptions.Firmware)
	}
	return nil
}

// failed says that an attempt has failed, and whether there is another one.
func (r *Reconciler) failed(p *vmopv1.VirtualMachinePublishRequest, why string) error {
	if p.Status.Attempts >= max(1, p.Spec.BackoffLimit) {
		uploading(p, vmopv1.FatalReason, "%s; it was tried %d times, make a new request to try again", why, p.Status.Attempts)
		r.event(p, corev1.EventTypeWarning, "PublishFailed", "%s", why)
		return nil
	}
	uploading(p, vmopv1.UploadFailureReason, "%s; it is tried again", why)
	r.event(p, corev1.EventTypeWarning, "PublishRetried", "%s", why)
	return nil
}

// pause is when the next attempt may begin.
func pause(p *vmopv1.VirtualMachinePublishRequest) time.Time {
	c := condition.Get(p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionUploaded)
	if p.Status.Attempts == 0 || c == nil || c.Reason != vmopv1.UploadFailureReason {
		return time.Time{}
	}
	wait := retryFirst
	for range min(p.Status.Attempts-1, 10) {
		wait = min(2*wait, retryMost)
	}
	return p.Status.LastAttemptTime.Add(wait)
}

// keep has an item that is ready outlive its request. Before that it goes with the request: nobody else would end it.
func (r *Reconciler) keep(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest, item *imageregistry.ContentLibraryItem) error {
	base := item.DeepCopy()
	item.OwnerReferences = slices.DeleteFunc(item.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == p.UID })
	if len(item.OwnerReferences) == len(base.OwnerReferences) {
		return nil
	}
	if err := r.Patch(ctx, item, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("keeping ContentLibraryItem %s: %w", item.Name, err)
	}
	return nil
}

// follow waits for the item's content and its image.
func (r *Reconciler) follow(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest, item *imageregistry.ContentLibraryItem) (time.Duration, error) {
	if !item.Status.Ready {
		c := condition.Get(item.Status.Conditions, imageregistry.ReadyCondition)
		switch {
		case c != nil && slices.Contains([]string{imageregistry.ItemSourceBad, imageregistry.ItemContentBad, imageregistry.ItemChecksum, imageregistry.ItemPushRefused}, c.Reason):
			if err := r.Delete(ctx, item, client.Preconditions{UID: &item.UID}); client.IgnoreNotFound(err) != nil {
				return 0, fmt.Errorf("deleting ContentLibraryItem %s: %w", item.Name, err)
			}
			why := "the importer cannot use the disk: " + c.Message
			if c.Reason == imageregistry.ItemPushRefused {
				why = c.Message
			}
			return lookEvery, r.failed(p, why)
		case c != nil && c.Message != "":
			uploading(p, vmopv1.UploadingReason, "ContentLibraryItem %s: %s: %s", item.Name, c.Reason, c.Message)
		default:
			uploading(p, vmopv1.UploadingReason, "ContentLibraryItem %s is being filled", item.Name)
		}
		return lookEvery, nil
	}
	if err := r.keep(ctx, p, item); err != nil {
		return 0, err
	}
	condition.True(&p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionUploaded)
	uuid := item.Spec.UUID
	if uuid == "" {
		uuid = item.UID
	}
	image := &vmopv1.VirtualMachineImage{}
	name := imageregistry.ImageName(uuid)
	err := r.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: name}, image)
	if client.IgnoreNotFound(err) != nil {
		return 0, fmt.Errorf("reading VirtualMachineImage %s: %w", name, err)
	}
	if err != nil || !condition.IsTrue(image.Status.Conditions, vmopv1.ReadyConditionType) {
		condition.False(&p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionImageAvailable, vmopv1.TargetVirtualMachineImageNotFoundReason, "VirtualMachineImage %s is not ready yet", name)
		incomplete(p, vmopv1.ImageUnavailableReason, "the image is not available yet")
		return lookEvery, nil
	}
	condition.True(&p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionImageAvailable)
	condition.True(&p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionComplete)
	p.Status.ImageName, p.Status.Ready = name, true
	p.Status.CompletionTime = condition.Get(p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionComplete).LastTransitionTime
	r.event(p, corev1.EventTypeNormal, "Published", "the image is %s", name)
	return 0, nil
}
