package supervisornamespace

import (
	"context"
	"slices"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

const (
	// countAfter collects changes of what is used: a namespace is counted that often at most.
	countAfter = time.Second
	// effectAfter is for quotas that have been counted, which a new namespace waits for.
	effectAfter = 50 * time.Millisecond
)

// watch says what a SupervisorNamespace is looked at for.
func (r *Reconciler) watch(b *builder.Builder, own cache.Cache) *builder.Builder {
	owned := handler.EnqueueRequestsFromMapFunc(ofLabel)
	for _, obj := range []client.Object{&corev1.LimitRange{}, &rbacv1.RoleBinding{}, &rbacv1.ClusterRole{}, &rbacv1.ClusterRoleBinding{}, &networkingv1.NetworkPolicy{}} {
		b = b.WatchesRawSource(source.Kind(own, obj, owned))
	}
	b = b.WatchesRawSource(source.Kind(own, client.Object(&atoll.SupervisorNamespace{}), handler.TypedEventHandler[client.Object, reconcile.Request](&handler.EnqueueRequestForObject{}),
		predicate.Or[client.Object](predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{}, predicate.Funcs{UpdateFunc: finalizersChanged})))
	b = b.WatchesRawSource(source.Kind(own, client.Object(&atoll.SupervisorNamespaceTemplate{}),
		handler.EnqueueRequestsFromMapFunc(r.those(func(sn *atoll.SupervisorNamespace) bool { return sn.Spec.ClassName != "" })),
		predicate.GenerationChangedPredicate{}))
	b = b.WatchesRawSource(source.Kind(own, client.Object(&corev1.Pod{}), r.later(ofNamespace, countAfter)))
	for _, obj := range []client.Object{person("User", ""), person("Group", ""), &atoll.IdentityProvider{}} {
		b = b.WatchesRawSource(source.Kind(own, obj, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, obj client.Object) []reconcile.Request {
			return r.those(func(sn *atoll.SupervisorNamespace) bool { return grants(sn, obj) })(ctx, obj)
		}), created()))
	}
	b = b.
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(r.ofNamespaceItself), builder.WithPredicates(predicate.Funcs{UpdateFunc: labelsChanged})).
		Watches(&corev1.ResourceQuota{}, r.later(ofLabel, effectAfter)).
		Watches(&corev1.PersistentVolumeClaim{}, r.later(ofNamespace, countAfter)).
		Watches(&vmopv1.VirtualMachineClass{}, handler.EnqueueRequestsFromMapFunc(r.ofClass), builder.WithPredicates(predicate.GenerationChangedPredicate{}))
	lacking := handler.EnqueueRequestsFromMapFunc(r.those(lacksReference))
	for _, obj := range []client.Object{&storagev1.StorageClass{}, &imageregistry.ClusterContentLibrary{}, &imageregistry.ContentLibrary{}, &encryption.EncryptionClass{}} {
		b = b.Watches(obj, lacking, builder.WithPredicates(created()))
	}
	return b.Watches(&corev1.Node{}, handler.EnqueueRequestsFromMapFunc(r.those(func(sn *atoll.SupervisorNamespace) bool {
		res := sn.EffectiveSpec().Resources
		return lacksReference(sn) || res.CPUReservation != nil || res.MemoryReservation != nil
	})), builder.WithPredicates(predicate.Funcs{UpdateFunc: capacityChanged}))
}

// ofLabel is the SupervisorNamespace that an object belongs to. One that loses its label is deleted, to a watch by label.
func ofLabel(_ context.Context, obj client.Object) []reconcile.Request {
	if name := obj.GetLabels()[atoll.SupervisorNamespaceLabel]; name != "" {
		return request(name)
	}
	return nil
}

// ofNamespace is the one that an object is in.
func ofNamespace(_ context.Context, obj client.Object) []reconcile.Request {
	return request(obj.GetNamespace())
}

func request(name string) []reconcile.Request {
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Name: name}}}
}

// ofNamespaceItself is that of a Namespace, and those that wait for a Namespace of that name.
func (r *Reconciler) ofNamespaceItself(ctx context.Context, obj client.Object) []reconcile.Request {
	return append(request(obj.GetName()), r.those(lacksReference)(ctx, obj)...)
}

// ofClass is the one that a class is in; of a class of the catalogue, all that list some.
func (r *Reconciler) ofClass(ctx context.Context, obj client.Object) []reconcile.Request {
	if obj.GetNamespace() == atoll.ClassCatalogNamespace {
		return r.those(func(sn *atoll.SupervisorNamespace) bool { return sn.EffectiveSpec().VMClasses != nil })(ctx, obj)
	}
	return ofLabel(ctx, obj)
}

func lacksReference(sn *atoll.SupervisorNamespace) bool {
	c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceReady)
	return c != nil && c.Reason == atoll.ReasonUnknownReference
}

// those has all SupervisorNamespaces looked at that pick picks.
func (r *Reconciler) those(pick func(*atoll.SupervisorNamespace) bool) handler.MapFunc {
	return func(ctx context.Context, _ client.Object) []reconcile.Request {
		var list atoll.SupervisorNamespaceList
		if err := r.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
			return nil // the cache ends with the process
		}
		var out []reconcile.Request
		for i := range list.Items {
			if pick(&list.Items[i]) {
				out = append(out, request(list.Items[i].Name)...)
			}
		}
		return out
	}
}

// later has requests wait, so that several changes are one. What is no SupervisorNamespace is not asked for.
func (r *Reconciler) later(of handler.MapFunc, after time.Duration) handler.EventHandler {
	enqueue := func(ctx context.Context, obj client.Object, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		for _, req := range of(ctx, obj) {
			if err := r.Get(ctx, req.NamespacedName, &atoll.SupervisorNamespace{}); err == nil {
				q.AddAfter(req, after)
			}
		}
	}
	return handler.Funcs{
		CreateFunc: func(ctx context.Context, e event.CreateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			enqueue(ctx, e.Object, q)
		},
		UpdateFunc: func(ctx context.Context, e event.UpdateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			if !sameUse(e.ObjectOld, e.ObjectNew) {
				enqueue(ctx, e.ObjectNew, q)
			}
		},
		DeleteFunc: func(ctx context.Context, e event.DeleteEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			enqueue(ctx, e.Object, q)
		},
	}
}

// sameUse tells whether a change is none of what is counted.
func sameUse(before, now client.Object) bool {
	switch b := before.(type) {
	case *corev1.Pod:
		n, ok := now.(*corev1.Pod)
		return ok && b.Status.Phase == n.Status.Phase && equality.Semantic.DeepEqual(b.Spec, n.Spec)
	case *corev1.PersistentVolumeClaim:
		n, ok := now.(*corev1.PersistentVolumeClaim)
		return ok && equality.Semantic.DeepEqual(b.Spec.Resources, n.Spec.Resources)
	}
	return false
}

// created is for objects that come and go.
func created() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(event.UpdateEvent) bool { return false }}
}

func finalizersChanged(e event.UpdateEvent) bool {
	return !slices.Equal(e.ObjectOld.GetFinalizers(), e.ObjectNew.GetFinalizers())
}

func labelsChanged(e event.UpdateEvent) bool {
	return !equality.Semantic.DeepEqual(e.ObjectOld.GetLabels(), e.ObjectNew.GetLabels()) ||
		!equality.Semantic.DeepEqual(e.ObjectOld.GetAnnotations(), e.ObjectNew.GetAnnotations()) ||
		(e.ObjectOld.GetDeletionTimestamp() == nil) != (e.ObjectNew.GetDeletionTimestamp() == nil)
}

func capacityChanged(e event.UpdateEvent) bool {
	before, ok := e.ObjectOld.(*corev1.Node)
	now, ok2 := e.ObjectNew.(*corev1.Node)
	return ok && ok2 && (ready(before) != ready(now) || !equality.Semantic.DeepEqual(before.Status.Allocatable, now.Status.Allocatable) ||
		!strings.EqualFold(before.Labels[corev1.LabelTopologyZone], now.Labels[corev1.LabelTopologyZone]))
}
