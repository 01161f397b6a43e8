package admission

import (
	"context"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/deletion"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/validate"
)

// namespaces looks at Namespaces that people make (the API server asks for users that are people only), and at the
// deletion of Namespaces that SupervisorNamespaces have.
type namespaces struct{ *Webhook }

// Default makes a request for a SupervisorNamespace of what an owner makes.
func (n *namespaces) Default(ctx context.Context, ns *corev1.Namespace) error {
	p, err := n.who(ctx)
	if err != nil || !p.create || p.admin {
		return err
	}
	refused := func(why string) error {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "namespaces"}, ns.Name, errors.New(why))
	}
	if errs := validate.Name(ns.Name); len(errs) > 0 {
		return refused(errs.ToAggregate().Error())
	}
	for _, notes := range []map[string]string{ns.Labels, ns.Annotations} {
		for key := range notes {
			if reserved(key) {
				return refused(fmt.Sprintf("%s is for administrators to set: leave it out", key))
			}
		}
	}
	var list atoll.SupervisorNamespaceTemplateList
	if err := n.Live.List(ctx, &list); err != nil {
		return fmt.Errorf("listing SupervisorNamespaceTemplates: %w", err)
	}
	template := ""
	for i := range list.Items {
		if list.Items[i].Spec.SelfService.Default && list.Items[i].DeletionTimestamp == nil {
			template = list.Items[i].Name
		}
	}
	if template == "" {
		return refused("there is no default SupervisorNamespaceTemplate to bound it by: make a SupervisorNamespace with spec.className of a template that is offered to you (kubectl get svnstemplate), or ask an administrator for a template with spec.selfService.default")
	}
	if err := n.may(ctx, p.user, template, ns.Name); err != nil {
		return refused(err.Error())
	}
	if ns.Annotations == nil {
		ns.Annotations = map[string]string{}
	}
	ns.Annotations[atoll.TemplateAnnotation] = template
	ns.Annotations[atoll.CreatorAnnotation] = p.user.Username
	return nil
}

// reserved tells whether a label or annotation means something to the platform.
func reserved(key string) bool {
	domain, _, qualified := strings.Cut(key, "/")
	if !qualified || key == corev1.LastAppliedConfigAnnotation || key == corev1.LabelMetadataName {
		return false
	}
	for _, suffix := range []string{"atoll.dev", "kubernetes.io", "k8s.io", "vmware.com"} {
		if domain == suffix || strings.HasSuffix(domain, "."+suffix) {
			return true
		}
	}
	return false
}

// ValidateCreate implements admission.Validator.
func (n *namespaces) ValidateCreate(context.Context, *corev1.Namespace) (admission.Warnings, error) {
	return nil, nil
}

// ValidateUpdate implements admission.Validator.
func (n *namespaces) ValidateUpdate(context.Context, *corev1.Namespace, *corev1.Namespace) (admission.Warnings, error) {
	return nil, nil
}

// ValidateDelete refuses to delete the Namespace of a SupervisorNamespace while there is something in it, unless that
// allows it.
func (n *namespaces) ValidateDelete(ctx context.Context, ns *corev1.Namespace) (admission.Warnings, error) {
	p, err := n.who(ctx)
	if err != nil || p.controller || ns.DeletionTimestamp != nil {
		return nil, err
	}
	sn := &atoll.SupervisorNamespace{}
	err = n.Live.Get(ctx, client.ObjectKey{Name: ns.Name}, sn)
	if apierrors.IsNotFound(err) || err == nil && sn.Annotations[atoll.DeleteContentsAnnotation] == "true" {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the SupervisorNamespace: %w", err)
	}
	left, err := deletion.Contents(ctx, n.Live, ns.Name)
	if err != nil || len(left) == 0 {
		return nil, err
	}
	return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "namespaces"}, ns.Name, fmt.Errorf(
		"there is still something in it: %s. Delete that first, or allow it: kubectl annotate svns %s %s=true",
		strings.Join(deletion.Strings(left), ", "), ns.Name, atoll.DeleteContentsAnnotation))
}
