package vmpublish

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/controllers/condition"
)

const (
	// lookEvery is how often something is looked at that no watch tells about.
	lookEvery = 5 * time.Second
	// retryFirst is the pause after the first attempt that failed; it doubles.
	retryFirst = 10 * time.Second
	retryMost  = 5 * time.Minute
	// requestLabel of an item is the uid of the request that has made it.
	requestLabel = imageregistry.PublishRequestLabel
	// defaultLabel marks the library of a namespace that requests go to that name none.
	defaultLabel = "imageregistry.vmware.com/default"
)

// Reconciler answers requests.
type Reconciler struct {
	client.Client
	Events events.EventRecorder
	// Tagged tells whether a project of the registry has a tag.
	Tagged func(project, repository, tag string) (bool, error)
	// Now is the clock.
	Now func() time.Time
}

// Setup adds the controller to a manager. The registry says whether a project has a tag.
func Setup(tagged func(project, repository, tag string) (bool, error)) func(ctrl.Manager) error {
	return func(mgr ctrl.Manager) error { return setup(mgr, tagged) }
}

func setup(mgr ctrl.Manager, tagged func(project, repository, tag string) (bool, error)) error {
	r := &Reconciler{Client: mgr.GetClient(), Events: mgr.GetEventRecorder("virtualmachinepublishrequest"), Tagged: tagged, Now: time.Now}
	err := ctrl.NewControllerManagedBy(mgr).
		Named("virtualmachinepublishrequest").
		For(&vmopv1.VirtualMachinePublishRequest{}).
		Owns(&snapshotv1.VolumeSnapshot{}).
		Watches(&imageregistry.ContentLibraryItem{}, handler.EnqueueRequestsFromMapFunc(r.requestOf)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("setting up the controller of VirtualMachinePublishRequests: %w", err)
	}
	return nil
}

// requestOf names the request that an item was made by.
func (r *Reconciler) requestOf(ctx context.Context, item client.Object) []reconcile.Request {
	uid := item.GetLabels()[requestLabel]
	if uid == "" {
		return nil
	}
	var list vmopv1.VirtualMachinePublishRequestList
	if err := r.List(ctx, &list, client.InNamespace(item.GetNamespace())); err != nil {
		return nil // the informer that failed will tell
	}
	for i := range list.Items {
		if string(list.Items[i].UID) == uid {
			return []reconcile.Request{{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])}}
		}
	}
	return nil
}

// Reconcile does the next step of one request.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	p := &vmopv1.VirtualMachinePublishRequest{}
	if err := r.Get(ctx, req.NamespacedName, p); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if p.DeletionTimestamp != nil {
		return ctrl.Result{}, nil // the snapshot is owned, and so is the item until it is ready
	}
	if over(p) {
		return r.expire(ctx, p)
	}
	base := p.DeepCopy()
	again, err := r.advance(ctx, p)
	if !equality.Semantic.DeepEqual(base.Status, p.Status) {
		if writeErr := r.Status().Patch(ctx, p, client.MergeFrom(base)); client.IgnoreNotFound(writeErr) != nil {
			err = errors.Join(err, fmt.Errorf("writing the status: %w", writeErr))
		}
	}
	if err == nil && over(p) {
		return r.expire(ctx, p)
	}
	return ctrl.Result{RequeueAfter: again}, err
}

// over tells that nothing more happens with a request.
func over(p *vmopv1.VirtualMachinePublishRequest) bool {
	c := condition.Get(p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionUploaded)
	return p.Status.Ready || c != nil && c.Reason == vmopv1.FatalReason
}

// expire deletes what a finished request does not need any more, and the request when its time is over.
func (r *Reconciler) expire(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest) (ctrl.Result, error) {
	object := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: snapshotName(p)}}
	if err := r.Delete(ctx, object); client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("deleting VolumeSnapshot %s: %w", object.Name, err)
	}
	if p.Spec.TTLSecondsAfterFinished == nil || !p.Status.Ready {
		return ctrl.Result{}, nil
	}
	left := p.Status.CompletionTime.Add(time.Duration(*p.Spec.TTLSecondsAfterFinished) * time.Second).Sub(r.Now())
	if left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	return ctrl.Result{}, client.IgnoreNotFound(r.Delete(ctx, p, client.Preconditions{UID: &p.UID}))
}

// advance does what comes next and says when to look again.
func (r *Reconciler) advance(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest) (time.Duration, error) {
	if p.Status.StartTime.IsZero() {
		p.Status.StartTime = metav1.NewTime(r.Now())
	}
	r.name(p)
	vm, err := r.source(ctx, p)
	if err != nil {
		return 0, err
	}
	item, err := r.item(ctx, p)
	if err != nil {
		return 0, err
	}
	library, err := r.target(ctx, p, item)
	if err != nil {
		return 0, err
	}
	incomplete(p, vmopv1.HasNotBeenUploadedReason, "the image has not been uploaded")
	if vm == nil && item == nil || library == nil {
		if condition.Get(p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionUploaded) == nil {
			condition.False(&p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionUploaded, vmopv1.UploadTaskNotStartedReason, "source or target are not valid")
		}
		return lookEvery, nil
	}
	if item == nil {
		return r.upload(ctx, p, vm, library)
	}
	return r.follow(ctx, p, item)
}

// incomplete says what a request waits for.
func incomplete(p *vmopv1.VirtualMachinePublishRequest, reason, text string) {
	condition.False(&p.Status.Conditions, vmopv1.VirtualMachinePublishRequestConditionComplete, reason, "%s", text)
}

// name writes down what the request is about, with defaults.
func (r *Reconciler) name(p *vmopv1.VirtualMachinePublishRequest) {
	source := p.Spec.Source
	source.Name = cmp.Or(source.Name, p.Name)
	p.Status.SourceRef = &source
	target := p.Spec.Target
	target.Item.Name = cmp.Or(target.Item.Name, source.Name+"-image")
	if p.Status.TargetRef != nil {
		target.Location.Name = cmp.Or(target.Location.Name, p.Status.TargetRef.Location.Name)
	}
	p.Status.TargetRef = &target
}

// source is the machine to publish, nil when there is none, which a condition says.
func (r *Reconciler) source(ctx context.Context, p *vmopv1.VirtualMachinePublishRequest) (*vmopv1.VirtualMachine, error) {
	kind := vmopv1.VirtualMachinePublishRequestConditionSourceValid
	vm := &vmopv1.VirtualMachine{}
	err := r.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: p.Status.SourceRef.Name}, vm)
	switch {
	case apierrors.IsNotFound(err):
		condition.False(&p.Status.Conditions, kind, vmopv1.SourceVirtualMachineNotExistReason, "there is no virtual machine %q in this namespace; correct spec.source.name", p.Status.SourceRef.Name)
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("reading virtual machine %s: %w", p.Status.SourceRef.Name, err)
	case !condition.IsTrue(vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated):
		condition.False(&p.Status.Conditions, kind, vmopv1.SourceVirtualMachineNotCreatedReason, "virtual machine %s has not been made yet; see its conditions", vm.Name)
		return nil, nil
	case vm.Spec.Image == nil && vm.Spec.ImageName == "":
		condition.False(&p.Status.Conditions, kind, vmopv1.SourceVirtualMachineNotCreatedReason, "virtual machine %s was not made of an image, so that it has no boot disk that could become one", vm.Name)
		return nil, nil
	}
	condition.True(&p.Status.Conditions, kind)
	return vm, nil
}

// event tells about a request.
func (r *Reconciler) event(p *vmopv1.VirtualMachinePublishRequest, kind, reason, format string, args ...any) {
	if kind == corev1.EventTypeWarning || kind == corev1.EventTypeNormal {
		r.Events.Eventf(p, nil, kind, reason, "Publish", format, args...)
	}
}
