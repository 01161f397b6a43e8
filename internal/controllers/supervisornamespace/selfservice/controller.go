package selfservice

import (
	"context"
	"errors"
	"fmt"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/cluster"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
)

// BindingName is the ClusterRoleBinding of all who may make namespaces by themselves.
const BindingName = "atoll:self-service"

const (
	fieldManager = "atoll-self-service"
	// collect makes one of changes that come in quick succession.
	collect = 300 * time.Millisecond
)

// Reconciler keeps the binding and the status of templates.
type Reconciler struct {
	// Client writes, and reads SupervisorNamespaces and templates from a cache.
	client.Client
	// Live reads past it.
	Live client.Reader
}

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager, own cluster.Cluster) error {
	r := &Reconciler{Client: own.GetClient(), Live: own.GetAPIReader()}
	b := ctrl.NewControllerManagedBy(mgr).Named("supervisornamespace-selfservice")
	for _, obj := range []client.Object{&atoll.SupervisorNamespace{}, &atoll.SupervisorNamespaceTemplate{}} {
		b = b.WatchesRawSource(source.Kind(own.GetCache(), obj, once()))
	}
	return b.Complete(r)
}

// once asks for one look at everything, a moment later.
func once() handler.EventHandler {
	add := func(q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		q.AddAfter(reconcile.Request{NamespacedName: types.NamespacedName{Name: BindingName}}, collect)
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, _ event.CreateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			add(q)
		},
		DeleteFunc: func(_ context.Context, _ event.DeleteEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			add(q)
		},
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			sn, ok := e.ObjectNew.(*atoll.SupervisorNamespace)
			before, ok2 := e.ObjectOld.(*atoll.SupervisorNamespace)
			if !ok || !ok2 || !equality.Semantic.DeepEqual(before.EffectiveSpec().AccessList, sn.EffectiveSpec().AccessList) {
				add(q)
			}
		},
	}
}

// Reconcile looks at everything.
func (r *Reconciler) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	var templates atoll.SupervisorNamespaceTemplateList
	if err := r.List(ctx, &templates); err != nil {
		return ctrl.Result{}, fmt.Errorf("listing SupervisorNamespaceTemplates: %w", err)
	}
	var all atoll.SupervisorNamespaceList
	if err := r.List(ctx, &all); err != nil {
		return ctrl.Result{}, fmt.Errorf("listing SupervisorNamespaces: %w", err)
	}
	errs := []error{r.bind(ctx, Subjects(templates.Items, all.Items))}
	for i := range templates.Items {
		errs = append(errs, r.status(ctx, &templates.Items[i], templates.Items, all.Items))
	}
	return ctrl.Result{}, errors.Join(errs...)
}

// Subjects are all who may make namespaces by themselves. Owners are among them whether a template lets them or not:
// the webhook tells them why they cannot.
func Subjects(templates []atoll.SupervisorNamespaceTemplate, all []atoll.SupervisorNamespace) []rbacv1.Subject {
	var out []rbacv1.Subject
	for i := range templates {
		t := &templates[i]
		for _, s := range t.Spec.SelfService.Subjects {
			out = append(out, expand.Subject(s.SubjectType, s.Subject, s.Domain))
		}
	}
	for i := range all {
		out = append(out, expand.Subjects(all[i].EffectiveSpec(), atoll.RoleOwner)...)
	}
	return expand.SortSubjects(out)
}

// bind keeps the binding.
func (r *Reconciler) bind(ctx context.Context, subjects []rbacv1.Subject) error {
	have := &rbacv1.ClusterRoleBinding{}
	err := r.Live.Get(ctx, client.ObjectKey{Name: BindingName}, have)
	if apierrors.IsNotFound(err) {
		have = &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: BindingName},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: expand.SelfServiceRole},
			Subjects:   subjects,
		}
		err = r.Create(ctx, have, client.FieldOwner(fieldManager))
	} else if err == nil && !equality.Semantic.DeepEqual(have.Subjects, subjects) {
		have.Subjects = subjects
		err = r.Update(ctx, have, client.FieldOwner(fieldManager))
	}
	if err != nil {
		return fmt.Errorf("keeping ClusterRoleBinding %s: %w", BindingName, err)
	}
	return nil
}

// status writes whether a template can be used, and by how many it is.
func (r *Reconciler) status(ctx context.Context, t *atoll.SupervisorNamespaceTemplate, templates []atoll.SupervisorNamespaceTemplate, all []atoll.SupervisorNamespace) error {
	before := t.DeepCopy()
	t.Status.Namespaces = 0
	for i := range all {
		if all[i].Spec.ClassName == t.Name {
			t.Status.Namespaces++
		}
	}
	condition := metav1.Condition{Type: atoll.NamespaceReady, Status: metav1.ConditionTrue, Reason: atoll.ReasonReady, ObservedGeneration: t.Generation}
	_, err := resolve.Chain(t.Name, func(name string) *atoll.SupervisorNamespaceTemplate {
		for i := range templates {
			if templates[i].Name == name {
				return &templates[i]
			}
		}
		return nil
	})
	if err != nil {
		condition.Status, condition.Reason, condition.Message = metav1.ConditionFalse, atoll.ReasonTemplateInvalid, "spec.basedOn: "+err.Error()
	}
	meta.SetStatusCondition(&t.Status.Conditions, condition)
	if equality.Semantic.DeepEqual(before.Status, t.Status) {
		return nil
	}
	if err := client.IgnoreNotFound(r.Status().Patch(ctx, t, client.MergeFrom(before))); err != nil {
		return fmt.Errorf("writing the status of SupervisorNamespaceTemplate %s: %w", t.Name, err)
	}
	return nil
}
