package supervisornamespace

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
)

// objects makes everything but the Namespace what it is to be. Pending says what is not in effect yet.
func (r *Reconciler) objects(ctx context.Context, sn *atoll.SupervisorNamespace, in expand.Input) (pending string, err error) {
	want := expand.Objects(in)
	var errs []error
	for _, o := range want {
		if err := r.ensure(ctx, o); err != nil {
			errs = append(errs, err)
		}
	}
	errs = append(errs, r.prune(ctx, in.Name, want), r.defaultClasses(ctx, in))
	for _, o := range want {
		if q, ok := o.(*corev1.ResourceQuota); ok && pending == "" {
			pending = r.counted(ctx, sn, q)
		}
	}
	return pending, errors.Join(errs...)
}

// reader is where objects of a kind are cached.
func (r *Reconciler) reader(obj client.Object) client.Reader {
	switch obj.(type) {
	case *corev1.Namespace, *corev1.ResourceQuota, *vmopv1.VirtualMachineClass:
		return r.Shared
	}
	return r.Client
}

// ensure applies an object, unless it is known to be like that.
func (r *Reconciler) ensure(ctx context.Context, want client.Object) error {
	what := want.GetObjectKind().GroupVersionKind().Kind + " " + want.GetName()
	have, err := empty(r.Scheme(), want)
	if err != nil {
		return err
	}
	err = r.reader(want).Get(ctx, client.ObjectKeyFromObject(want), have)
	if err == nil && same(want, have) {
		return nil
	}
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("reading %s: %w", what, err)
	}
	got, err := r.apply(ctx, want)
	if apierrors.IsInvalid(err) { // the role of a binding cannot change
		if err := client.IgnoreNotFound(r.Delete(ctx, want)); err != nil {
			return fmt.Errorf("replacing %s: %w", what, err)
		}
		got, err = r.apply(ctx, want)
	}
	if err != nil {
		return fmt.Errorf("applying %s: %w", what, err)
	}
	if same(want, got) {
		return nil
	}
	// Somebody else has put something into it that applying leaves.
	if err := r.overwrite(ctx, want, got); err != nil {
		return fmt.Errorf("putting %s right: %w", what, err)
	}
	return nil
}

// apply returns what the API server has then.
func (r *Reconciler) apply(ctx context.Context, want client.Object) (client.Object, error) {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return nil, err
	}
	u := &unstructured.Unstructured{Object: content}
	unstructured.RemoveNestedField(u.Object, "status")
	unstructured.RemoveNestedField(u.Object, "metadata", "creationTimestamp")
	if err := r.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(fieldManager), client.ForceOwnership); err != nil {
		return nil, err
	}
	got, err := empty(r.Scheme(), want)
	if err != nil {
		return nil, err
	}
	return got, runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, got)
}

func (r *Reconciler) overwrite(ctx context.Context, want, got client.Object) error {
	out, ok := want.DeepCopyObject().(client.Object)
	if !ok {
		return fmt.Errorf("%T is no object", want)
	}
	for k, v := range got.GetLabels() {
		if _, ours := out.GetLabels()[k]; !ours {
			out.GetLabels()[k] = v
		}
	}
	notes := got.GetAnnotations()
	if notes == nil {
		notes = map[string]string{}
	}
	maps.Copy(notes, out.GetAnnotations())
	out.SetAnnotations(notes)
	out.SetFinalizers(got.GetFinalizers())
	out.SetOwnerReferences(got.GetOwnerReferences())
	out.SetResourceVersion(got.GetResourceVersion())
	return r.Update(ctx, out, client.FieldOwner(fieldManager))
}

func empty(scheme *runtime.Scheme, like client.Object) (client.Object, error) {
	made, err := scheme.New(like.GetObjectKind().GroupVersionKind())
	if err != nil {
		return nil, err
	}
	out, ok := made.(client.Object)
	if !ok {
		return nil, fmt.Errorf("%T is no object", made)
	}
	return out, nil
}

// same tells whether an object is what it is to be: labels and annotations at least, all else exactly.
func same(want, have client.Object) bool {
	if !within(want.GetLabels(), have.GetLabels()) || !within(want.GetAnnotations(), have.GetAnnotations()) {
		return false
	}
	switch w := want.(type) {
	case *corev1.Namespace:
		return true
	case *corev1.ResourceQuota:
		h, ok := have.(*corev1.ResourceQuota)
		return ok && equality.Semantic.DeepEqual(w.Spec, h.Spec)
	case *corev1.LimitRange:
		h, ok := have.(*corev1.LimitRange)
		return ok && equality.Semantic.DeepEqual(w.Spec, h.Spec)
	case *networkingv1.NetworkPolicy:
		h, ok := have.(*networkingv1.NetworkPolicy)
		return ok && equality.Semantic.DeepEqual(w.Spec, h.Spec)
	case *rbacv1.RoleBinding:
		h, ok := have.(*rbacv1.RoleBinding)
		return ok && equality.Semantic.DeepEqual(w.Subjects, h.Subjects) && w.RoleRef == h.RoleRef
	case *rbacv1.ClusterRoleBinding:
		h, ok := have.(*rbacv1.ClusterRoleBinding)
		return ok && equality.Semantic.DeepEqual(w.Subjects, h.Subjects) && w.RoleRef == h.RoleRef
	case *rbacv1.ClusterRole:
		h, ok := have.(*rbacv1.ClusterRole)
		return ok && equality.Semantic.DeepEqual(w.Rules, h.Rules)
	case *vmopv1.VirtualMachineClass:
		h, ok := have.(*vmopv1.VirtualMachineClass)
		return ok && equality.Semantic.DeepEqual(w.Spec, h.Spec)
	}
	return false
}

func within(want, have map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// prune deletes what a SupervisorNamespace consisted of and does not any more.
func (r *Reconciler) prune(ctx context.Context, name string, want []client.Object) error {
	wanted := map[string]bool{}
	for _, o := range want {
		wanted[o.GetObjectKind().GroupVersionKind().Kind+"/"+o.GetName()] = true
	}
	var errs []error
	for _, kind := range []struct {
		kind   string
		list   client.ObjectList
		reader client.Reader
		inside bool
	}{
		{"ResourceQuota", &corev1.ResourceQuotaList{}, r.Shared, true},
		{"VirtualMachineClass", &vmopv1.VirtualMachineClassList{}, r.Shared, true},
		{"LimitRange", &corev1.LimitRangeList{}, r.Client, true},
		{"RoleBinding", &rbacv1.RoleBindingList{}, r.Client, true},
		{"NetworkPolicy", &networkingv1.NetworkPolicyList{}, r.Client, true},
		{"ClusterRoleBinding", &rbacv1.ClusterRoleBindingList{}, r.Client, false},
		{"ClusterRole", &rbacv1.ClusterRoleList{}, r.Client, false},
	} {
		options := []client.ListOption{client.MatchingLabels{atoll.SupervisorNamespaceLabel: name}}
		if kind.inside {
			options = append(options, client.InNamespace(name))
		}
		if err := kind.reader.List(ctx, kind.list, options...); err != nil {
			errs = append(errs, fmt.Errorf("listing kind %s: %w", kind.kind, err))
			continue
		}
		errs = append(errs, meta.EachListItem(kind.list, func(o runtime.Object) error {
			obj, ok := o.(client.Object)
			if !ok || wanted[kind.kind+"/"+obj.GetName()] || obj.GetDeletionTimestamp() != nil {
				return nil
			}
			if err := client.IgnoreNotFound(r.Delete(ctx, obj)); err != nil {
				return fmt.Errorf("removing %s %s: %w", kind.kind, obj.GetName(), err)
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// defaultClasses removes VirtualMachineClasses that were there before the spec listed which there are to be.
func (r *Reconciler) defaultClasses(ctx context.Context, in expand.Input) error {
	if in.Spec.VMClasses == nil {
		return nil
	}
	var list vmopv1.VirtualMachineClassList
	if err := r.Shared.List(ctx, &list, client.InNamespace(in.Name), client.HasLabels{expand.DefaultClassLabel}); err != nil {
		return fmt.Errorf("listing VirtualMachineClasses: %w", err)
	}
	var errs []error
	for i := range list.Items {
		c := &list.Items[i]
		if expand.ClassListed(in.Spec, c.Name) || c.DeletionTimestamp != nil {
			continue
		}
		if err := client.IgnoreNotFound(r.Delete(ctx, c)); err != nil {
			errs = append(errs, fmt.Errorf("removing VirtualMachineClass %s: %w", c.Name, err))
		}
	}
	return errors.Join(errs...)
}

// terminating is what the Namespace controller says about a Namespace that is being deleted.
func terminating(ns *corev1.Namespace) []string {
	var out []string
	for _, c := range ns.Status.Conditions {
		if c.Status == corev1.ConditionTrue && c.Message != "" {
			out = append(out, strings.TrimSuffix(c.Message, "."))
		}
	}
	if len(out) == 0 {
		out = append(out, "its contents are being removed")
	}
	return out
}
