package identity

import (
	"context"
	"fmt"
	"slices"
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

// Access is a namespace that somebody may enter.
type Access struct {
	Namespace string `json:"namespace"`
	// Role is owner, edit, view, or administrator for who may do everything everywhere.
	Role string `json:"role"`
}

// RoleAdministrator is the role of who may do everything everywhere.
const RoleAdministrator = "administrator"

// bindingPrefix precedes the role in the names of the RoleBindings that a SupervisorNamespace expands into.
const bindingPrefix = "atoll-"

// roles are those of a SupervisorNamespace, the widest first.
func roles() []string { return []string{"owner", "edit", "view"} }

// Namespaces lists the SupervisorNamespaces that somebody may enter, sorted by name. It reads the RoleBindings that
// they expand into; who may do everything gets all of them.
func (s *Service) Namespaces(ctx context.Context, p Person) ([]Access, error) {
	if !s.isStarted() {
		return nil, ErrNotReady
	}
	everything, err := s.mayEverything(ctx, p)
	if err != nil {
		return nil, err
	}
	if everything {
		return s.allNamespaces(ctx)
	}
	var list rbacv1.RoleBindingList
	if err := s.client.List(ctx, &list, client.HasLabels{api.SupervisorNamespaceLabel}); err != nil {
		return nil, fmt.Errorf("listing role bindings: %w", err)
	}
	return accessOf(list.Items, p), nil
}

// accessOf picks the widest role in each namespace.
func accessOf(bindings []rbacv1.RoleBinding, p Person) []Access {
	best := map[string]int{}
	for _, b := range bindings {
		rank := slices.Index(roles(), strings.TrimPrefix(b.Name, bindingPrefix))
		if rank < 0 || !strings.HasPrefix(b.Name, bindingPrefix) || b.Labels[api.SupervisorNamespaceLabel] != b.Namespace {
			continue
		}
		if !slices.ContainsFunc(b.Subjects, func(subject rbacv1.Subject) bool { return isSubject(subject, p) }) {
			continue
		}
		if have, ok := best[b.Namespace]; !ok || rank < have {
			best[b.Namespace] = rank
		}
	}
	out := []Access{}
	for namespace, rank := range best {
		out = append(out, Access{Namespace: namespace, Role: roles()[rank]})
	}
	slices.SortFunc(out, func(a, b Access) int { return strings.Compare(a.Namespace, b.Namespace) })
	return out
}

func isSubject(subject rbacv1.Subject, p Person) bool {
	switch subject.Kind {
	case rbacv1.UserKind:
		return subject.Name == p.Name
	case rbacv1.GroupKind:
		return slices.Contains(p.Groups, subject.Name)
	}
	return false
}

// mayEverything asks the API server's authorizer.
func (s *Service) mayEverything(ctx context.Context, p Person) (bool, error) {
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: p.Name, Groups: p.Groups, UID: p.UID,
		ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "*", Group: "*", Resource: "*", Version: "*"},
	}}
	if err := s.client.Create(ctx, review); err != nil {
		return false, fmt.Errorf("asking what %s may do: %w", p.Name, err)
	}
	return review.Status.Allowed, nil
}

func (s *Service) allNamespaces(ctx context.Context) ([]Access, error) {
	list := metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NamespaceList"))
	if err := s.client.List(ctx, &list, client.HasLabels{api.SupervisorNamespaceLabel}); err != nil {
		return nil, fmt.Errorf("listing namespaces: %w", err)
	}
	out := []Access{}
	for _, n := range list.Items {
		if n.DeletionTimestamp == nil {
			out = append(out, Access{Namespace: n.Name, Role: RoleAdministrator})
		}
	}
	return out, nil
}
