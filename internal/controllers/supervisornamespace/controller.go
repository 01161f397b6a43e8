package supervisornamespace

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/selfservice"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/validate"
)

// fieldManager owns what is applied.
const fieldManager = "atoll-supervisor-namespace"

const (
	// lookAgain is how often is looked at what cannot be watched.
	lookAgain = 5 * time.Second
	// registryEvery is how often the registry is asked what a project takes.
	registryEvery = time.Minute
)

// Registry is what the controller needs of the registry.
type Registry interface {
	// Usage is how many bytes the images of a project take.
	Usage(ctx context.Context, project string) (int64, error)
	// Forget removes a project with all its images. One that is not there is no error.
	Forget(project string) error
}

// Reconciler keeps SupervisorNamespaces.
type Reconciler struct {
	// Client writes, and reads from the controller's own cache: SupervisorNamespaces, templates, pods, and what is owned.
	client.Client
	// Shared reads from the manager's cache: Namespaces, ResourceQuotas, VirtualMachineClasses, and what specs refer to.
	Shared client.Reader
	// Live reads past all caches.
	Live client.Reader
	// Network is the cluster's address plan.
	Network expand.Network
	// EndpointURL is the API server for the status, RegistryHost the registry.
	EndpointURL, RegistryHost string
	// Registry may be nil.
	Registry Registry

	recounts recounts
}

// Reconcile does what one SupervisorNamespace needs now.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	sn := &atoll.SupervisorNamespace{}
	if err := r.Get(ctx, client.ObjectKey{Name: req.Name}, sn); err != nil {
		if apierrors.IsNotFound(err) {
			return ctrl.Result{}, r.selfMade(ctx, req.Name)
		}
		return ctrl.Result{}, err
	}
	before := sn.DeepCopy()
	var result ctrl.Result
	var err error
	if sn.DeletionTimestamp != nil {
		result, err = r.finalize(ctx, sn)
	} else {
		result, err = r.keep(ctx, sn)
	}
	return result, errors.Join(err, r.writeStatus(ctx, before, sn))
}

func (r *Reconciler) writeStatus(ctx context.Context, before, sn *atoll.SupervisorNamespace) error {
	if equality.Semantic.DeepEqual(before.Status, sn.Status) {
		return nil
	}
	patch := sn.DeepCopy()
	patch.ObjectMeta = *before.ObjectMeta.DeepCopy()
	patch.Spec = before.Spec
	if err := client.IgnoreNotFound(r.Status().Patch(ctx, patch, client.MergeFrom(before))); err != nil {
		return fmt.Errorf("writing the status: %w", err)
	}
	return nil
}

// keep brings one that is not being deleted in order.
func (r *Reconciler) keep(ctx context.Context, sn *atoll.SupervisorNamespace) (ctrl.Result, error) {
	if !controllerutil.ContainsFinalizer(sn, atoll.NamespaceFinalizer) {
		before := sn.DeepCopy()
		controllerutil.AddFinalizer(sn, atoll.NamespaceFinalizer)
		if err := r.Patch(ctx, sn, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
			return ctrl.Result{}, client.IgnoreNotFound(err)
		}
	}
	return r.expandAll(ctx, sn)
}

// expandAll makes everything that a SupervisorNamespace consists of, and says how it is.
func (r *Reconciler) expandAll(ctx context.Context, sn *atoll.SupervisorNamespace) (ctrl.Result, error) {
	sn.Status.ObservedGeneration = sn.Generation
	if atoll.SystemNamespace(sn.Name) {
		r.ready(sn, atoll.ReasonNamespaceReserved, "the name is one of the system's own namespaces: delete this object and choose another name")
		return ctrl.Result{}, nil
	}
	if err := r.effective(ctx, sn); err != nil {
		if errors.Is(err, resolve.ErrUnknown) || errors.Is(err, resolve.ErrCycle) {
			r.ready(sn, atoll.ReasonTemplateInvalid, "spec.className: "+err.Error())
			return ctrl.Result{}, nil
		}
		return ctrl.Result{}, err
	}
	in := expand.Input{Name: sn.Name, Spec: sn.Status.Effective, Network: r.Network, Owner: *metav1.NewControllerRef(sn, atoll.GroupVersion().WithKind("SupervisorNamespace"))}
	if sn.Annotations[atoll.SelfServiceAnnotation] == "true" {
		in.Creator = sn.Annotations[atoll.CreatorAnnotation]
	}
	wait, err := r.namespace(ctx, sn, in)
	if err != nil || wait {
		return ctrl.Result{}, err
	}
	unknown, err := r.references(ctx, sn, &in)
	if err != nil {
		return ctrl.Result{}, err
	}
	sn.Status.NamespaceEndpointURL = r.EndpointURL
	if r.RegistryHost != "" {
		sn.Status.RegistryProject = r.RegistryHost + "/" + sn.Name
	}
	pending, applyErr := r.objects(ctx, sn, in)
	if err := r.report(ctx, sn); err != nil {
		return ctrl.Result{}, errors.Join(err, applyErr)
	}
	switch {
	case applyErr != nil:
		r.ready(sn, atoll.ReasonNotExpanded, applyErr.Error())
	case len(unknown) > 0:
		r.ready(sn, atoll.ReasonUnknownReference, strings.Join(unknown, "; "))
	case pending != "":
		r.ready(sn, atoll.ReasonNotExpanded, pending)
	default:
		meta.SetStatusCondition(&sn.Status.Conditions, metav1.Condition{
			Type: atoll.NamespaceReady, Status: metav1.ConditionTrue, Reason: atoll.ReasonReady, ObservedGeneration: sn.Generation,
		})
	}
	result := ctrl.Result{}
	if r.Registry != nil {
		result.RequeueAfter = registryEvery
	}
	if pending != "" {
		result.RequeueAfter = lookAgain
	}
	return result, applyErr
}

// ready sets the condition Ready to False.
func (r *Reconciler) ready(sn *atoll.SupervisorNamespace, reason, message string) {
	meta.SetStatusCondition(&sn.Status.Conditions, metav1.Condition{
		Type: atoll.NamespaceReady, Status: metav1.ConditionFalse, Reason: reason, Message: message, ObservedGeneration: sn.Generation,
	})
}

// effective writes what is enforced into the status. With a template that cannot be used, what was enforced stays.
func (r *Reconciler) effective(ctx context.Context, sn *atoll.SupervisorNamespace) error {
	find, err := selfservice.Templates(ctx, r.Client)
	if err != nil {
		return err
	}
	spec, err := resolve.Effective(&sn.Spec, find)
	if err != nil {
		return err
	}
	if sn.Spec.ClassName != "" && sn.Annotations[atoll.SelfServiceAnnotation] == "true" {
		if err := withinTemplate(sn, spec, find); err != nil {
			return err
		}
	}
	if equality.Semantic.DeepEqual(spec, sn.Status.Effective) {
		return nil
	}
	before := sn.DeepCopy()
	sn.Status.Effective = spec
	patch := before.DeepCopy()
	patch.Status.Effective = spec
	if err := r.Status().Patch(ctx, patch, client.MergeFrom(before)); err != nil {
		return fmt.Errorf("writing what is enforced into the status: %w", err)
	}
	return nil
}

// withinTemplate cuts what somebody made by themselves to its template, which may have become stricter, and says so. What an
// administrator has made wider stays.
func withinTemplate(sn *atoll.SupervisorNamespace, spec *atoll.SupervisorNamespaceSpec, find resolve.Templates) error {
	template, err := resolve.Template(sn.Spec.ClassName, find)
	if err != nil {
		return err
	}
	resolve.Default(template)
	condition := metav1.Condition{Type: atoll.NamespaceWithinTemplate, Status: metav1.ConditionTrue, Reason: "WithinTemplate", ObservedGeneration: sn.Generation}
	wider := validate.Within(spec, template, field.NewPath("spec"))
	switch {
	case len(wider) == 0:
	case sn.Annotations[atoll.WidenedAnnotation] == "true":
		condition.Reason = "WidenedByAdministrator"
	default:
		validate.Cut(spec, template)
		condition.Status, condition.Reason = metav1.ConditionFalse, "WiderThanTemplate"
		condition.Message = fmt.Sprintf("what SupervisorNamespaceTemplate %s allows is enforced instead of: %s. An owner can narrow this object, or an administrator widen the template",
			sn.Spec.ClassName, strings.TrimSuffix(strings.TrimPrefix(wider.ToAggregate().Error(), "["), "]"))
	}
	meta.SetStatusCondition(&sn.Status.Conditions, condition)
	return nil
}

// namespace makes, adopts and keeps the Namespace. With wait there is none to put anything into.
func (r *Reconciler) namespace(ctx context.Context, sn *atoll.SupervisorNamespace, in expand.Input) (wait bool, err error) {
	want := expand.Namespace(in)
	have := &corev1.Namespace{}
	err = r.Shared.Get(ctx, client.ObjectKeyFromObject(want), have)
	if apierrors.IsNotFound(err) {
		err = r.Create(ctx, want.DeepCopy(), client.FieldOwner(fieldManager))
		if err == nil {
			return false, nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return false, fmt.Errorf("making the Namespace: %w", err)
		}
		err = r.Live.Get(ctx, client.ObjectKeyFromObject(want), have)
	}
	if err != nil {
		return false, fmt.Errorf("reading the Namespace: %w", err)
	}
	ours := have.Labels[atoll.SupervisorNamespaceLabel] == sn.Name
	switch {
	case have.DeletionTimestamp != nil && ours && sn.DeletionTimestamp == nil:
		// Who may delete the Namespace has deleted it: the webhook of Namespaces has seen to that it was empty.
		r.ready(sn, atoll.ReasonNamespaceTerminated, "the Namespace is being deleted, and this object with it")
		return true, client.IgnoreNotFound(r.Delete(ctx, sn.DeepCopy(), client.Preconditions{UID: &sn.UID}))
	case have.DeletionTimestamp != nil:
		r.ready(sn, atoll.ReasonNamespaceTerminated, "a Namespace of this name is being deleted: "+strings.Join(terminating(have), "; "))
		return true, nil
	case !ours && sn.Annotations[atoll.AdoptAnnotation] != "true":
		r.ready(sn, atoll.ReasonNamespaceExists, fmt.Sprintf("there is a Namespace %s already, which this object did not make: annotate this object with %s=true to take it over, or delete it and choose another name", sn.Name, atoll.AdoptAnnotation))
		return true, nil
	}
	return false, r.ensure(ctx, want)
}

// selfMade makes the SupervisorNamespace of a Namespace that an owner has made with kubectl.
func (r *Reconciler) selfMade(ctx context.Context, name string) error {
	ns := &corev1.Namespace{}
	if err := r.Shared.Get(ctx, client.ObjectKey{Name: name}, ns); err != nil {
		return client.IgnoreNotFound(err)
	}
	template, creator := ns.Annotations[atoll.TemplateAnnotation], ns.Annotations[atoll.CreatorAnnotation]
	if template == "" || ns.DeletionTimestamp != nil || ns.Labels[atoll.SupervisorNamespaceLabel] != "" {
		return nil
	}
	sn := &atoll.SupervisorNamespace{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{
			atoll.AdoptAnnotation: "true", atoll.CreatorAnnotation: creator, atoll.SelfServiceAnnotation: "true",
		}},
		Spec: atoll.SupervisorNamespaceSpec{ClassName: template},
	}
	if subject, domain, ok := atoll.SplitSubject(creator); ok {
		sn.Spec.AccessList = []atoll.NamespaceAccess{{SubjectType: "User", Subject: subject, Domain: domain, Role: atoll.RoleOwner}}
	}
	if err := r.Create(ctx, sn); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making the SupervisorNamespace of Namespace %s: %w", name, err)
	}
	return nil
}
