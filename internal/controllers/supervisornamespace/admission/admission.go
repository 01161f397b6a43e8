// Package admission holds the webhooks of SupervisorNamespaces and their templates.
//
// Everybody's are checked for what cannot be (package validate). Administrators are those who may update all
// SupervisorNamespaces; the API server is asked. Others may do less, and RBAC has let them in here only for that: make one
// from a template that is offered to them, no wider than that, and change or delete one of which they are an owner. The
// API server writes down who made one: annotations that say so are what this webhook sets, whatever a client says.
//
// What can go wrong: the cache is behind, so that what is looked for is looked for again past it before a request is
// refused; and two requests of one person in the same moment, which are counted one after the other in this process.
package admission

import (
	"context"
	"errors"
	"fmt"
	"slices"

	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/cluster"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/selfservice"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/validate"
)

// Config of the webhooks.
type Config struct {
	// Controller is the user that the controller of SupervisorNamespaces is.
	Controller string
	Network    expand.Network
}

// Webhook checks SupervisorNamespaces, templates, and Namespaces that people make themselves.
type Webhook struct {
	// Cached and Live read; Live past the cache.
	Cached, Live client.Reader
	// Admin tells administrators.
	Admin   func(context.Context, authenticationv1.UserInfo) (bool, error)
	Config  Config
	Granted *selfservice.Grants
}

// Setup adds the webhooks to a manager. Own is the cluster of the controller's identity.
func Setup(mgr ctrl.Manager, own cluster.Cluster, cfg Config) error {
	w := &Webhook{Cached: own.GetClient(), Live: own.GetAPIReader(), Config: cfg, Granted: selfservice.NewGrants(), Admin: administrator(own.GetClient())}
	w.defaults(mgr)
	return errors.Join(
		ctrl.NewWebhookManagedBy(mgr, &atoll.SupervisorNamespace{}).WithValidator(w).Complete(),
		ctrl.NewWebhookManagedBy(mgr, &atoll.SupervisorNamespaceTemplate{}).WithValidator(&templates{w}).Complete(),
		ctrl.NewWebhookManagedBy(mgr, &corev1.Namespace{}).WithDefaulter(&namespaces{w}).WithValidator(&namespaces{w}).Complete(),
	)
}

// administrator asks the API server whether somebody may change every SupervisorNamespace.
func administrator(c client.Client) func(context.Context, authenticationv1.UserInfo) (bool, error) {
	return func(ctx context.Context, user authenticationv1.UserInfo) (bool, error) {
		if slices.Contains(user.Groups, "system:masters") {
			return true, nil
		}
		extra := map[string]authorizationv1.ExtraValue{}
		for k, v := range user.Extra {
			extra[k] = authorizationv1.ExtraValue(v)
		}
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: user.Username, Groups: user.Groups, UID: user.UID, Extra: extra,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Group: atoll.GroupVersion().Group, Resource: "supervisornamespaces", Verb: "update"},
		}}
		if err := c.Create(ctx, review); err != nil {
			return false, fmt.Errorf("asking whether %s is an administrator: %w", user.Username, err)
		}
		return review.Status.Allowed, nil
	}
}

// who is the person of a request, and what they are.
type who struct {
	user       authenticationv1.UserInfo
	admin      bool
	controller bool
	create     bool
}

func (w *Webhook) who(ctx context.Context) (who, error) {
	req, err := admission.RequestFromContext(ctx)
	if err != nil {
		return who{}, err
	}
	out := who{user: req.UserInfo, controller: req.UserInfo.Username == w.Config.Controller, create: req.Operation == admissionv1.Create}
	if out.controller {
		out.admin = true
		return out, nil
	}
	out.admin, err = w.Admin(ctx, req.UserInfo)
	return out, err
}

// Default writes down who makes a SupervisorNamespace, and gives it its finalizer.
func (w *Webhook) Default(ctx context.Context, sn *atoll.SupervisorNamespace) error {
	p, err := w.who(ctx)
	if err != nil {
		return err
	}
	if !p.create {
		return w.keepNotes(ctx, p, sn)
	}
	if !slices.Contains(sn.Finalizers, atoll.NamespaceFinalizer) {
		sn.Finalizers = append(sn.Finalizers, atoll.NamespaceFinalizer)
	}
	if p.controller {
		return nil // on behalf of whoever made the Namespace
	}
	if sn.Annotations == nil {
		sn.Annotations = map[string]string{}
	}
	sn.Annotations[atoll.CreatorAnnotation] = p.user.Username
	delete(sn.Annotations, atoll.SelfServiceAnnotation)
	delete(sn.Annotations, atoll.WidenedAnnotation)
	if p.admin {
		return nil
	}
	sn.Annotations[atoll.SelfServiceAnnotation] = "true"
	selfservice.AddOwner(&sn.Spec, p.user.Username)
	return nil
}

// keepNotes gives back what nobody changes by hand, and notes where an administrator widens what somebody made by
// themselves: a template holds for all others.
func (w *Webhook) keepNotes(ctx context.Context, p who, sn *atoll.SupervisorNamespace) error {
	req, err := admission.RequestFromContext(ctx)
	if err != nil {
		return err
	}
	before := &atoll.SupervisorNamespace{}
	if err := decode(req.OldObject.Raw, before); err != nil {
		return err
	}
	for _, key := range []string{atoll.CreatorAnnotation, atoll.SelfServiceAnnotation, atoll.WidenedAnnotation} {
		value, had := before.Annotations[key]
		switch now, has := sn.Annotations[key]; {
		case had && now != value:
			if sn.Annotations == nil {
				sn.Annotations = map[string]string{}
			}
			sn.Annotations[key] = value
		case !had && has:
			delete(sn.Annotations, key)
		}
	}
	if p.controller || sn.Annotations[atoll.SelfServiceAnnotation] != "true" || sameSpec(before, sn) {
		return nil
	}
	delete(sn.Annotations, atoll.WidenedAnnotation)
	if !p.admin {
		return nil
	}
	widened, err := w.widened(ctx, before, sn)
	if err == nil && widened {
		sn.Annotations[atoll.WidenedAnnotation] = "true"
	}
	return err
}

// widened tells whether an administrator's change makes a spec wider than its template, or it was that on purpose. What is
// wider because the template became stricter stays cut when something else is changed.
func (w *Webhook) widened(ctx context.Context, before, sn *atoll.SupervisorNamespace) (bool, error) {
	now, err := w.wider(ctx, sn)
	if err != nil || len(now) == 0 || before.Annotations[atoll.WidenedAnnotation] == "true" {
		return len(now) > 0, err
	}
	was, err := w.wider(ctx, before)
	known := map[string]bool{}
	for _, e := range was {
		known[e.Error()] = true
	}
	return slices.ContainsFunc(now, func(e *field.Error) bool { return !known[e.Error()] }), err
}

// wider says where a spec is wider than its template. One that has none, or that cannot be used, is not.
func (w *Webhook) wider(ctx context.Context, sn *atoll.SupervisorNamespace) (field.ErrorList, error) {
	find, err := w.templates(ctx, sn.Spec.ClassName)
	if err != nil || sn.Spec.ClassName == "" {
		return nil, err
	}
	effective, err := resolve.Effective(&sn.Spec, find)
	if err != nil {
		return nil, nil //nolint:nilerr // the validation names it
	}
	template, err := resolve.Template(sn.Spec.ClassName, find)
	if err != nil {
		return nil, nil //nolint:nilerr // the validation names it
	}
	resolve.Default(template)
	return validate.Within(effective, template, field.NewPath("spec")), nil
}

func (w *Webhook) net() validate.Network {
	var out validate.Network
	if w.Config.Network.PodCIDR.IsValid() {
		out.Inside = append(out.Inside, w.Config.Network.PodCIDR, w.Config.Network.ServiceCIDR)
	}
	return out
}

// templates reads them all, past the cache if one is not in it.
func (w *Webhook) templates(ctx context.Context, name string) (resolve.Templates, error) {
	for _, reader := range []client.Reader{w.Cached, w.Live} {
		find, err := selfservice.Templates(ctx, reader)
		if err != nil {
			return nil, err
		}
		if _, err := resolve.Chain(name, find); err == nil || reader == w.Live {
			return find, nil
		}
	}
	return nil, nil
}

// ValidateCreate implements admission.Validator.
func (w *Webhook) ValidateCreate(ctx context.Context, sn *atoll.SupervisorNamespace) (admission.Warnings, error) {
	p, err := w.who(ctx)
	if err != nil {
		return nil, err
	}
	errs := validate.Name(sn.Name)
	more, err := w.check(ctx, p, sn)
	if err != nil {
		return nil, err
	}
	errs = append(errs, more...)
	if len(errs) > 0 || p.admin {
		return nil, refuse(sn, errs)
	}
	return nil, w.selfService(ctx, p, sn)
}

// check looks at a spec, alone and with its template.
func (w *Webhook) check(ctx context.Context, p who, sn *atoll.SupervisorNamespace) (field.ErrorList, error) {
	spec := field.NewPath("spec")
	errs := validate.Spec(&sn.Spec, spec, w.net())
	find, err := w.templates(ctx, sn.Spec.ClassName)
	if err != nil || len(errs) > 0 {
		return errs, err
	}
	effective, err := resolve.Effective(&sn.Spec, find)
	if err != nil {
		return append(errs, field.Invalid(spec.Child("className"), sn.Spec.ClassName, err.Error())), nil
	}
	errs = append(errs, validate.Spec(effective, spec, w.net())...)
	if p.admin || len(errs) > 0 {
		return errs, nil
	}
	return w.wider(ctx, sn)
}

// ValidateUpdate implements admission.Validator.
func (w *Webhook) ValidateUpdate(ctx context.Context, before, sn *atoll.SupervisorNamespace) (admission.Warnings, error) {
	p, err := w.who(ctx)
	if err != nil {
		return nil, err
	}
	if before.Spec.ClassName != sn.Spec.ClassName {
		return nil, refuse(sn, field.ErrorList{field.Forbidden(field.NewPath("spec", "className"), fmt.Sprintf("is %q and cannot change: make another SupervisorNamespace", before.Spec.ClassName))})
	}
	if sameSpec(before, sn) {
		return nil, w.notes(p, before, sn)
	}
	errs, err := w.check(ctx, p, sn)
	if err != nil {
		return nil, err
	}
	if err := w.notes(p, before, sn); err != nil {
		return nil, err
	}
	if !p.admin && before.Annotations[atoll.SelfServiceAnnotation] != "true" {
		return nil, forbidden(sn, "an administrator has made it: ask an administrator to change it")
	}
	return nil, refuse(sn, errs)
}

// notes refuses annotations and finalizers that only administrators set, also of one that is being deleted: without its
// finalizer the object would be gone, and its Namespace, with all that runs in it, would stay.
func (w *Webhook) notes(p who, before, sn *atoll.SupervisorNamespace) error {
	if p.admin {
		return nil
	}
	if before.Annotations[atoll.AdoptAnnotation] != sn.Annotations[atoll.AdoptAnnotation] {
		return forbidden(sn, "only an administrator sets annotation "+atoll.AdoptAnnotation)
	}
	if !slices.Equal(before.Finalizers, sn.Finalizers) {
		return forbidden(sn, "only an administrator changes finalizers")
	}
	return nil
}

// ValidateDelete implements admission.Validator; RBAC has decided.
func (w *Webhook) ValidateDelete(context.Context, *atoll.SupervisorNamespace) (admission.Warnings, error) {
	return nil, nil
}

// selfService says whether somebody who is no administrator may make this one.
func (w *Webhook) selfService(ctx context.Context, p who, sn *atoll.SupervisorNamespace) error {
	if sn.Annotations[atoll.AdoptAnnotation] != "" {
		return forbidden(sn, "only an administrator sets annotation "+atoll.AdoptAnnotation)
	}
	if sn.Spec.ClassName == "" {
		return forbidden(sn, "spec.className must name a SupervisorNamespaceTemplate that is offered to you (kubectl get svnstemplate)")
	}
	if err := w.may(ctx, p.user, sn.Spec.ClassName, sn.Name); err != nil {
		return forbidden(sn, err.Error())
	}
	return nil
}

// may says whether somebody may make a namespace of a template, and counts it.
func (w *Webhook) may(ctx context.Context, user authenticationv1.UserInfo, template, name string) error {
	if err := w.Live.Get(ctx, client.ObjectKey{Name: name}, &corev1.Namespace{}); !apierrors.IsNotFound(err) {
		if err != nil {
			return fmt.Errorf("looking for a Namespace %s: %w", name, err)
		}
		return fmt.Errorf("there is a Namespace %s already: choose another name", name)
	}
	var all atoll.SupervisorNamespaceList
	if err := w.Live.List(ctx, &all); err != nil {
		return fmt.Errorf("listing SupervisorNamespaces: %w", err)
	}
	t := &atoll.SupervisorNamespaceTemplate{}
	if err := w.Live.Get(ctx, client.ObjectKey{Name: template}, t); err != nil {
		return fmt.Errorf("reading SupervisorNamespaceTemplate %s: %w", template, err)
	}
	made := &metav1.PartialObjectMetadataList{}
	made.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NamespaceList"))
	if err := w.Live.List(ctx, made); err != nil {
		return fmt.Errorf("listing Namespaces: %w", err)
	}
	return w.Granted.May(user, t, all.Items, made.Items, name)
}

func kind() schema.GroupKind {
	return schema.GroupKind{Group: atoll.GroupVersion().Group, Kind: "SupervisorNamespace"}
}

func refuse(sn *atoll.SupervisorNamespace, errs field.ErrorList) error {
	if len(errs) == 0 {
		return nil
	}
	return apierrors.NewInvalid(kind(), sn.Name, errs)
}

func forbidden(sn *atoll.SupervisorNamespace, why string) error {
	return apierrors.NewForbidden(schema.GroupResource{Group: atoll.GroupVersion().Group, Resource: "supervisornamespaces"}, sn.Name, errors.New(why))
}
