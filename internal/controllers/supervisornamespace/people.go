package supervisornamespace

import (
	"context"
	"fmt"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// person is a User or Group, of which the cache has no more than the name.
func person(kind, name string) *metav1.PartialObjectMetadata {
	out := &metav1.PartialObjectMetadata{}
	out.SetGroupVersionKind(atoll.GroupVersion().WithKind(kind))
	out.SetName(name)
	return out
}

// people says in the status who of the access list is not known. The namespace is as good without them, so that it is
// not less ready for it: they get their role when they come. Users and groups of another issuer are not known here;
// the issuer is.
func (r *Reconciler) people(ctx context.Context, sn *atoll.SupervisorNamespace) error {
	var issuers atoll.IdentityProviderList
	if err := r.List(ctx, &issuers); err != nil {
		return fmt.Errorf("listing IdentityProviders: %w", err)
	}
	domains := map[string]bool{}
	for i := range issuers.Items {
		domains[issuers.Items[i].Spec.Domain] = true
	}
	var unknown []string
	for i, a := range sn.EffectiveSpec().AccessList {
		missing := ""
		switch a.Domain {
		case atoll.LocalDomain, "":
			obj := person(a.SubjectType, a.Subject)
			err := r.Get(ctx, client.ObjectKeyFromObject(obj), obj)
			if client.IgnoreNotFound(err) != nil {
				return fmt.Errorf("looking up %s %s: %w", a.SubjectType, a.Subject, err)
			}
			if apierrors.IsNotFound(err) {
				missing = fmt.Sprintf("%s %s does not exist", a.SubjectType, a.Subject)
			}
		default:
			if !domains[a.Domain] {
				missing = fmt.Sprintf("no IdentityProvider has domain %s", a.Domain)
			}
		}
		if missing != "" {
			unknown = append(unknown, fmt.Sprintf("spec.accessList[%d]: %s", i, missing))
		}
	}
	condition := metav1.Condition{Type: atoll.NamespacePeopleKnown, Status: metav1.ConditionTrue, Reason: "Known", ObservedGeneration: sn.Generation}
	if len(unknown) > 0 {
		condition.Status, condition.Reason = metav1.ConditionFalse, atoll.ReasonUnknownReference
		condition.Message = strings.Join(unknown, "; ")
	}
	meta.SetStatusCondition(&sn.Status.Conditions, condition)
	return nil
}

// grants tells whether a namespace gives somebody of a name, or of a domain, a role.
func grants(sn *atoll.SupervisorNamespace, obj client.Object) bool {
	issuer, foreign := obj.(*atoll.IdentityProvider)
	for _, a := range sn.EffectiveSpec().AccessList {
		if foreign && a.Domain == issuer.Spec.Domain || !foreign && a.Subject == obj.GetName() && (a.Domain == atoll.LocalDomain || a.Domain == "") {
			return true
		}
	}
	return false
}
