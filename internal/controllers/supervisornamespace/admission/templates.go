package admission

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/selfservice"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/validate"
)

func decode(raw []byte, into any) error {
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("reading the object before the change: %w", err)
	}
	return nil
}

func sameSpec(before, now *atoll.SupervisorNamespace) bool {
	return equality.Semantic.DeepEqual(before.Spec, now.Spec)
}

// templates checks SupervisorNamespaceTemplates, which only administrators write.
type templates struct{ *Webhook }

// ValidateCreate implements admission.Validator.
func (t *templates) ValidateCreate(ctx context.Context, obj *atoll.SupervisorNamespaceTemplate) (admission.Warnings, error) {
	return nil, t.template(ctx, obj)
}

// ValidateUpdate implements admission.Validator.
func (t *templates) ValidateUpdate(ctx context.Context, _, obj *atoll.SupervisorNamespaceTemplate) (admission.Warnings, error) {
	if obj.DeletionTimestamp != nil {
		return nil, nil
	}
	return nil, t.template(ctx, obj)
}

// ValidateDelete refuses to delete what others are made from.
func (t *templates) ValidateDelete(ctx context.Context, obj *atoll.SupervisorNamespaceTemplate) (admission.Warnings, error) {
	var users []string
	var all atoll.SupervisorNamespaceList
	if err := t.Live.List(ctx, &all); err != nil {
		return nil, fmt.Errorf("listing SupervisorNamespaces: %w", err)
	}
	for i := range all.Items {
		if all.Items[i].Spec.ClassName == obj.Name {
			users = append(users, "SupervisorNamespace "+all.Items[i].Name)
		}
	}
	var list atoll.SupervisorNamespaceTemplateList
	if err := t.Live.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("listing SupervisorNamespaceTemplates: %w", err)
	}
	for i := range list.Items {
		if list.Items[i].Spec.BasedOn == obj.Name {
			users = append(users, "SupervisorNamespaceTemplate "+list.Items[i].Name)
		}
	}
	if len(users) == 0 {
		return nil, nil
	}
	if more := len(users) - 5; more > 0 {
		users = append(users[:5], fmt.Sprintf("%d more", more))
	}
	return nil, apierrors.NewForbidden(schema.GroupResource{Group: atoll.GroupVersion().Group, Resource: "supervisornamespacetemplates"}, obj.Name,
		fmt.Errorf("it bounds %s: delete those first", strings.Join(users, ", ")))
}

func (t *templates) template(ctx context.Context, obj *atoll.SupervisorNamespaceTemplate) error {
	spec := field.NewPath("spec")
	errs := validate.Spec(&obj.Spec.Template, spec.Child("template"), t.net())
	if obj.Spec.Template.ClassName != "" {
		errs = append(errs, field.Forbidden(spec.Child("template", "className"), "a template is based on another by spec.basedOn"))
	}
	if obj.Spec.SelfService.MaxPerUser < 0 {
		errs = append(errs, field.Invalid(spec.Child("selfService", "maxPerUser"), obj.Spec.SelfService.MaxPerUser, "must not be negative"))
	}
	if obj.Spec.SelfService.Default && !obj.Spec.SelfService.Enabled && len(obj.Spec.SelfService.Subjects) == 0 {
		errs = append(errs, field.Invalid(spec.Child("selfService", "default"), true, "nobody may use it: set selfService.enabled, or name subjects"))
	}
	find, err := selfservice.Templates(ctx, t.Live)
	if err != nil {
		return err
	}
	with := func(name string) *atoll.SupervisorNamespaceTemplate {
		if name == obj.Name {
			return obj
		}
		return find(name)
	}
	if _, err := resolve.Chain(obj.Name, with); err != nil {
		errs = append(errs, field.Invalid(spec.Child("basedOn"), obj.Spec.BasedOn, err.Error()))
	} else if len(errs) == 0 {
		if whole, err := resolve.Template(obj.Name, with); err == nil {
			errs = append(errs, validate.Spec(whole, spec.Child("template"), t.net())...)
		}
	}
	if obj.Spec.SelfService.Default {
		if other := t.otherDefault(ctx, obj.Name); other != "" {
			errs = append(errs, field.Invalid(spec.Child("selfService", "default"), true, "SupervisorNamespaceTemplate "+other+" is the default already: there can be one"))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return apierrors.NewInvalid(schema.GroupKind{Group: atoll.GroupVersion().Group, Kind: "SupervisorNamespaceTemplate"}, obj.Name, errs)
}

// otherDefault is the default template if it is another one.
func (t *templates) otherDefault(ctx context.Context, name string) string {
	var list atoll.SupervisorNamespaceTemplateList
	if err := t.Live.List(ctx, &list); err != nil {
		return ""
	}
	for i := range list.Items {
		if list.Items[i].Spec.SelfService.Default && list.Items[i].Name != name && list.Items[i].DeletionTimestamp == nil {
			return list.Items[i].Name
		}
	}
	return ""
}
