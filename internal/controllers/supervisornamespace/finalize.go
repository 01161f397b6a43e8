package supervisornamespace

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/deletion"
)

// emptiedAnnotation is on a Namespace that is being deleted and has no pods any more.
const emptiedAnnotation = "atoll.dev/emptied"

// finalize ends a SupervisorNamespace that is being deleted.
//
//	Namespace is not there                the registry project goes, and the object
//	it is not ours                        the object goes
//	being deleted                         wait, and say what for
//	something in it, not allowed          bounds stay in force, wait until it is empty
//	else                                  delete it
func (r *Reconciler) finalize(ctx context.Context, sn *atoll.SupervisorNamespace) (ctrl.Result, error) {
	if !controllerutil.ContainsFinalizer(sn, atoll.NamespaceFinalizer) {
		return ctrl.Result{}, nil
	}
	ns := &corev1.Namespace{}
	err := r.Live.Get(ctx, client.ObjectKey{Name: sn.Name}, ns)
	switch {
	case apierrors.IsNotFound(err):
		return ctrl.Result{}, r.end(ctx, sn, r.Registry)
	case err != nil:
		return ctrl.Result{}, fmt.Errorf("reading the Namespace: %w", err)
	case ns.Labels[atoll.SupervisorNamespaceLabel] != sn.Name:
		return ctrl.Result{}, r.end(ctx, sn, nil)
	case ns.DeletionTimestamp != nil:
		left, err := deletion.Contents(ctx, r.Live, sn.Name)
		if err != nil {
			return ctrl.Result{}, err
		}
		said := terminating(ns)
		for _, l := range left {
			said = append(said, l.Stuck()...)
		}
		r.deleting(sn, "NamespaceTerminating", strings.Join(said, "; "))
		return ctrl.Result{RequeueAfter: lookAgain / 2}, r.emptied(ctx, ns, left)
	}
	if sn.Annotations[atoll.DeleteContentsAnnotation] != "true" {
		left, err := deletion.Contents(ctx, r.Live, sn.Name)
		if err != nil {
			return ctrl.Result{}, err
		}
		names := deletion.Strings(left)
		if r.Registry != nil {
			if bytes, err := r.Registry.Usage(ctx, sn.Name); err == nil && bytes > 0 {
				names = append(names, fmt.Sprintf("%d bytes of images in its registry project", bytes))
			}
		}
		if len(names) > 0 {
			result, err := r.expandAll(ctx, sn)
			r.deleting(sn, "NotEmpty", fmt.Sprintf("there is still something in it: %s. Delete that, or have it deleted by annotating this object with %s=true",
				strings.Join(names, ", "), atoll.DeleteContentsAnnotation))
			if result.RequeueAfter == 0 {
				result.RequeueAfter = lookAgain
			}
			return result, err
		}
	}
	if err := client.IgnoreNotFound(r.Delete(ctx, ns, client.Preconditions{UID: &ns.UID})); err != nil {
		return ctrl.Result{}, fmt.Errorf("deleting the Namespace: %w", err)
	}
	r.deleting(sn, "NamespaceTerminating", "its contents are being removed")
	return ctrl.Result{RequeueAfter: lookAgain / 10}, nil
}

// emptied changes a Namespace when no pod is left in it, for its own controller to look again. That waits for as long as
// pods may take to end, for minutes if one is a virtual machine, also when they have long ended.
func (r *Reconciler) emptied(ctx context.Context, ns *corev1.Namespace, left []deletion.Left) error {
	if ns.Annotations[emptiedAnnotation] != "" || slices.ContainsFunc(left, func(l deletion.Left) bool { return l.Kind == "Pod" }) {
		return nil
	}
	before := ns.DeepCopy()
	metav1.SetMetaDataAnnotation(&ns.ObjectMeta, emptiedAnnotation, "true")
	if err := r.Patch(ctx, ns, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("noting that the Namespace has no pods any more: %w", err)
	}
	return nil
}

func (r *Reconciler) deleting(sn *atoll.SupervisorNamespace, reason, message string) {
	meta.SetStatusCondition(&sn.Status.Conditions, metav1.Condition{
		Type: atoll.NamespaceDeleting, Status: metav1.ConditionTrue, Reason: reason, Message: message, ObservedGeneration: sn.Generation,
	})
	r.ready(sn, "Deleting", message)
}

// end removes what is outside of the Namespace, and lets the object go. The registry is nil if the images are not ours.
func (r *Reconciler) end(ctx context.Context, sn *atoll.SupervisorNamespace, images Registry) error {
	err := r.prune(ctx, sn.Name, nil)
	if images != nil {
		if removal := images.Forget(sn.Name); removal != nil {
			r.deleting(sn, "RegistryProject", "removing its project in the registry: "+removal.Error())
			err = errors.Join(err, fmt.Errorf("removing its project in the registry: %w", removal))
		}
	}
	if err != nil {
		return err
	}
	before := sn.DeepCopy()
	done := sn.DeepCopy()
	controllerutil.RemoveFinalizer(done, atoll.NamespaceFinalizer)
	return client.IgnoreNotFound(r.Patch(ctx, done, client.MergeFrom(before)))
}
