package supervisornamespace

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/managedfields"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/manager"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
)

type registry struct {
	bytes int64
	gone  []string
	fail  error
}

func (r *registry) Usage(context.Context, string) (int64, error) { return r.bytes, nil }
func (r *registry) Forget(name string) error {
	if r.fail == nil {
		r.gone, r.bytes = append(r.gone, name), 0
	}
	return r.fail
}

func newReconciler(t *testing.T, objects ...client.Object) *Reconciler {
	t.Helper()
	scheme, err := manager.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(scheme).WithTypeConverters(managedfields.NewDeducedTypeConverter()).WithStatusSubresource(&atoll.SupervisorNamespace{}, &atoll.SupervisorNamespaceTemplate{}, &corev1.ResourceQuota{}).WithObjects(objects...).Build()
	return &Reconciler{
		Client: c, Shared: c, Live: c, EndpointURL: "https://host:6443", RegistryHost: "registry.atoll.local",
		Network: expand.Network{PodCIDR: netip.MustParsePrefix("10.244.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"), DNS: []netip.Addr{netip.MustParseAddr("10.96.0.10")}, DNSPort: 53},
	}
}

func quantity(s string) *resource.Quantity { return new(resource.MustParse(s)) }

func shop(spec atoll.SupervisorNamespaceSpec) *atoll.SupervisorNamespace {
	return &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "1", Finalizers: []string{atoll.NamespaceFinalizer}}, Spec: spec}
}

// look reconciles as the controller of quotas does its part.
func look(t *testing.T, r *Reconciler) *atoll.SupervisorNamespace {
	t.Helper()
	for range 2 {
		if _, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKey{Name: "shop"}}); err != nil {
			t.Fatal(err)
		}
		var quotas corev1.ResourceQuotaList
		if err := r.List(t.Context(), &quotas); err != nil {
			t.Fatal(err)
		}
		for i := range quotas.Items {
			q := &quotas.Items[i]
			used := corev1.ResourceList{}
			for name := range q.Spec.Hard {
				used[name] = q.Status.Used[name]
			}
			q.Status.Hard, q.Status.Used = q.Spec.Hard, used
			if err := r.Status().Update(t.Context(), q); err != nil {
				t.Fatal(err)
			}
		}
	}
	sn := &atoll.SupervisorNamespace{}
	if err := r.Get(t.Context(), client.ObjectKey{Name: "shop"}, sn); client.IgnoreNotFound(err) != nil {
		t.Fatal(err)
	}
	return sn
}

func wantReady(t *testing.T, sn *atoll.SupervisorNamespace, reason, message string) {
	t.Helper()
	c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceReady)
	if c == nil || c.Reason != reason || !strings.Contains(c.Message, message) || (c.Status == metav1.ConditionTrue) != (reason == atoll.ReasonReady) {
		t.Fatalf("condition %+v", c)
	}
}

func full() atoll.SupervisorNamespaceSpec {
	return atoll.SupervisorNamespaceSpec{
		Resources:  atoll.NamespaceResources{MemoryLimit: quantity("4Gi"), Counts: atoll.NamespaceCounts{Pods: new(int64(3))}},
		VMClasses:  []atoll.NamespaceReference{{Name: "best-effort-small"}},
		AccessList: []atoll.NamespaceAccess{{SubjectType: "User", Subject: "olga", Role: "Owner"}, {SubjectType: "Group", Subject: "devs", Role: "View"}},
		Network:    atoll.NamespaceNetwork{Isolation: "DenyAll"},
	}
}

func get[T client.Object](t *testing.T, r *Reconciler, obj T) T {
	t.Helper()
	if err := r.Get(t.Context(), client.ObjectKeyFromObject(obj), obj); err != nil {
		t.Fatal(err)
	}
	return obj
}

func in(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "shop", Name: name} }

func TestExpansionAndDrift(t *testing.T) {
	r := newReconciler(t, shop(full()))
	sn := look(t, r)
	wantReady(t, sn, atoll.ReasonReady, "")
	if sn.Status.Effective == nil || sn.Status.RegistryProject != "registry.atoll.local/shop" || sn.Status.Memory != "0/4Gi" {
		t.Errorf("status %+v", sn.Status)
	}
	ns := get(t, r, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
	if ns.Labels["pod-security.kubernetes.io/enforce"] != "baseline" || ns.Labels["atoll.dev/vm-classes"] != "none" {
		t.Errorf("labels %v", ns.Labels)
	}
	// Drift of every kind is put right.
	quota := get(t, r, &corev1.ResourceQuota{ObjectMeta: in("shop-quota")})
	quota.Spec.Hard["limits.memory"] = resource.MustParse("1Ti")
	quota.Spec.Hard["count/secrets"] = resource.MustParse("1")
	binding := get(t, r, &rbacv1.RoleBinding{ObjectMeta: in("atoll-owner")})
	binding.Subjects = append(binding.Subjects, rbacv1.Subject{Kind: "User", Name: "sso:mallory@atoll.local"})
	policy := get(t, r, &networkingv1.NetworkPolicy{ObjectMeta: in("atoll-isolation")})
	policy.Spec.PolicyTypes = policy.Spec.PolicyTypes[:1]
	delete(policy.Labels, atoll.SupervisorNamespaceLabel)
	ns.Labels["pod-security.kubernetes.io/enforce"] = "privileged"
	for _, o := range []client.Object{quota, binding, policy, ns} {
		if err := r.Update(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Delete(t.Context(), &corev1.LimitRange{ObjectMeta: in("shop-limits")}); err != nil {
		t.Fatal(err)
	}
	look(t, r)
	quota = get(t, r, &corev1.ResourceQuota{ObjectMeta: in("shop-quota")})
	if len(quota.Spec.Hard) != 2 || quota.Spec.Hard.Name("limits.memory", resource.BinarySI).String() != "4Gi" {
		t.Errorf("quota %+v", quota.Spec.Hard)
	}
	if b := get(t, r, &rbacv1.RoleBinding{ObjectMeta: in("atoll-owner")}); len(b.Subjects) != 1 {
		t.Errorf("subjects %v", b.Subjects)
	}
	if p := get(t, r, &networkingv1.NetworkPolicy{ObjectMeta: in("atoll-isolation")}); len(p.Spec.PolicyTypes) != 2 || p.Labels[atoll.SupervisorNamespaceLabel] != "shop" {
		t.Errorf("policy %+v", p)
	}
	if n := get(t, r, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}); n.Labels["pod-security.kubernetes.io/enforce"] != "baseline" {
		t.Errorf("labels %v", n.Labels)
	}
	get(t, r, &corev1.LimitRange{ObjectMeta: in("shop-limits")})
}

func TestEditing(t *testing.T) {
	def := &vmopv1.VirtualMachineClass{ObjectMeta: in("best-effort-large")}
	def.Labels = map[string]string{expand.DefaultClassLabel: "true"}
	r := newReconciler(t, shop(full()), def)
	sn := look(t, r)
	if err := r.Get(t.Context(), client.ObjectKeyFromObject(def), def); !apierrors.IsNotFound(err) {
		t.Errorf("a default class that is not listed is there: %v", err)
	}
	get(t, r, &vmopv1.VirtualMachineClass{ObjectMeta: in("best-effort-small")})
	get(t, r, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "atoll:namespace:shop"}})
	sn.Spec = atoll.SupervisorNamespaceSpec{AccessList: []atoll.NamespaceAccess{{SubjectType: "User", Subject: "olga", Role: "Edit"}}}
	if err := r.Update(t.Context(), sn); err != nil {
		t.Fatal(err)
	}
	wantReady(t, look(t, r), atoll.ReasonReady, "")
	for _, o := range []client.Object{
		&corev1.ResourceQuota{ObjectMeta: in("shop-quota")}, &corev1.LimitRange{ObjectMeta: in("shop-limits")}, &rbacv1.RoleBinding{ObjectMeta: in("atoll-owner")},
		&networkingv1.NetworkPolicy{ObjectMeta: in("atoll-isolation")}, &vmopv1.VirtualMachineClass{ObjectMeta: in("best-effort-small")},
		&rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "atoll:namespace-owner:shop"}},
	} {
		if err := r.Get(t.Context(), client.ObjectKeyFromObject(o), o); !apierrors.IsNotFound(err) {
			t.Errorf("%T %s is still there: %v", o, o.GetName(), err)
		}
	}
	get(t, r, &rbacv1.RoleBinding{ObjectMeta: in("atoll-edit")})
}

func TestUnknownReferences(t *testing.T) {
	r := newReconciler(t, shop(atoll.SupervisorNamespaceSpec{
		StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold"}}, VMClasses: []atoll.NamespaceReference{{Name: "huge"}},
		Zones: []atoll.NamespaceReference{{Name: "z9"}}, Hosts: []string{"h9"},
	}))
	sn := look(t, r)
	for _, want := range []string{"spec.storageClasses[0]: StorageClass gold does not exist", "spec.vmClasses[0]: VirtualMachineClass huge", "spec.zones[0]: zone z9", "spec.hosts[0]: host h9"} {
		wantReady(t, sn, atoll.ReasonUnknownReference, want)
	}
	if !lacksReference(sn) {
		t.Error("nothing would have it looked at again")
	}
	for _, o := range []client.Object{
		&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "gold"}},
		&vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: atoll.ClassCatalogNamespace, Name: "huge"}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "h9", Labels: map[string]string{corev1.LabelTopologyZone: "z9"}}},
	} {
		if err := r.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	wantReady(t, look(t, r), atoll.ReasonReady, "")
	get(t, r, &vmopv1.VirtualMachineClass{ObjectMeta: in("huge")})
}

func TestPeople(t *testing.T) {
	spec := full()
	spec.AccessList = append(spec.AccessList, atoll.NamespaceAccess{SubjectType: "User", Subject: "x", Domain: "example.com", Role: "View"})
	r := newReconciler(t, shop(spec), &atoll.User{ObjectMeta: metav1.ObjectMeta{Name: "olga"}})
	sn := look(t, r)
	wantReady(t, sn, atoll.ReasonReady, "")
	c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespacePeopleKnown)
	if c == nil || c.Reason != atoll.ReasonUnknownReference || c.Message != "spec.accessList[1]: Group devs does not exist; spec.accessList[2]: no IdentityProvider has domain example.com" {
		t.Fatalf("condition %+v", c)
	}
	issuer := &atoll.IdentityProvider{ObjectMeta: metav1.ObjectMeta{Name: "corp"}, Spec: atoll.IdentityProviderSpec{Domain: "example.com"}}
	group := &atoll.Group{ObjectMeta: metav1.ObjectMeta{Name: "devs"}}
	for _, o := range []client.Object{issuer, group} {
		if !grants(sn, o) {
			t.Errorf("nothing would be looked at for %s", o.GetName())
		}
		if err := r.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	if sn = look(t, r); !meta.IsStatusConditionTrue(sn.Status.Conditions, atoll.NamespacePeopleKnown) {
		t.Errorf("%+v", sn.Status.Conditions)
	}
}

// TestStricterTemplate: what people made by themselves follows its template, unless an administrator has widened it.
func TestStricterTemplate(t *testing.T) {
	template := &atoll.SupervisorNamespaceTemplate{ObjectMeta: metav1.ObjectMeta{Name: "team"}}
	template.Spec.Template.Resources.MemoryLimit = quantity("4Gi")
	mine := shop(atoll.SupervisorNamespaceSpec{ClassName: "team", Resources: atoll.NamespaceResources{MemoryLimit: quantity("3Gi"), MemoryLimitDefault: quantity("2Gi")}})
	mine.Annotations = map[string]string{atoll.SelfServiceAnnotation: "true", atoll.CreatorAnnotation: "sso:olga@atoll.local"}
	r := newReconciler(t, mine, template)
	want := func(limit string, status metav1.ConditionStatus, message string) {
		t.Helper()
		sn := look(t, r)
		wantReady(t, sn, atoll.ReasonReady, "")
		q := get(t, r, &corev1.ResourceQuota{ObjectMeta: in("shop-quota")})
		if got := q.Spec.Hard["limits.memory"]; got.String() != limit || sn.Status.Effective.Resources.MemoryLimit.String() != limit {
			t.Errorf("the limit is %s, not %s", got.String(), limit)
		}
		c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceWithinTemplate)
		if c == nil || c.Status != status || !strings.HasPrefix(c.Message, message) {
			t.Errorf("condition %+v", c)
		}
	}
	want("3Gi", metav1.ConditionTrue, "")
	template.Spec.Template.Resources.MemoryLimit = quantity("1Gi")
	if err := r.Update(t.Context(), template); err != nil {
		t.Fatal(err)
	}
	want("1Gi", metav1.ConditionFalse, `what SupervisorNamespaceTemplate team allows is enforced instead of: spec.resources.memoryLimit: Invalid value: "3Gi": is above that of the template, which is 1Gi. An owner can narrow`)
	get(t, r, mine)
	mine.Annotations[atoll.WidenedAnnotation] = "true"
	if err := r.Update(t.Context(), mine); err != nil {
		t.Fatal(err)
	}
	want("3Gi", metav1.ConditionTrue, "")
}

func TestTemplateTroubleKeepsBounds(t *testing.T) {
	template := &atoll.SupervisorNamespaceTemplate{ObjectMeta: metav1.ObjectMeta{Name: "team"}}
	template.Spec.Template.Resources.MemoryLimit = quantity("1Gi")
	r := newReconciler(t, shop(atoll.SupervisorNamespaceSpec{ClassName: "team"}), template)
	wantReady(t, look(t, r), atoll.ReasonReady, "")
	template.Spec.BasedOn = "team"
	if err := r.Update(t.Context(), template); err != nil {
		t.Fatal(err)
	}
	sn := look(t, r)
	wantReady(t, sn, atoll.ReasonTemplateInvalid, resolve.ErrCycle.Error())
	if sn.Status.Effective.Resources.MemoryLimit.String() != "1Gi" {
		t.Error("what was enforced is gone")
	}
}

func TestAdoption(t *testing.T) {
	r := newReconciler(t, shop(full()), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"team": "a"}}})
	sn := look(t, r)
	wantReady(t, sn, atoll.ReasonNamespaceExists, "atoll.dev/adopt=true")
	if err := r.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "shop-quota"}, &corev1.ResourceQuota{}); !apierrors.IsNotFound(err) {
		t.Fatal("something was put into somebody else's namespace")
	}
	sn.Annotations = map[string]string{atoll.AdoptAnnotation: "true"}
	if err := r.Update(t.Context(), sn); err != nil {
		t.Fatal(err)
	}
	wantReady(t, look(t, r), atoll.ReasonReady, "")
	if ns := get(t, r, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}); ns.Labels["team"] != "a" {
		t.Errorf("labels %v", ns.Labels)
	}
}

func TestSelfMade(t *testing.T) {
	r := newReconciler(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Annotations: map[string]string{
		atoll.TemplateAnnotation: "team", atoll.CreatorAnnotation: "sso:olga@example.com",
	}}}, &atoll.SupervisorNamespaceTemplate{ObjectMeta: metav1.ObjectMeta{Name: "team"}}, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "plain"}})
	sn := look(t, r)
	wantReady(t, sn, atoll.ReasonReady, "")
	if sn.Spec.ClassName != "team" || sn.Annotations[atoll.SelfServiceAnnotation] != "true" || sn.Spec.AccessList[0] != (atoll.NamespaceAccess{SubjectType: "User", Subject: "olga", Domain: "example.com", Role: "Owner"}) {
		t.Errorf("%+v", sn)
	}
	if err := r.selfMade(t.Context(), "plain"); err != nil {
		t.Fatal(err)
	}
	if err := r.Get(t.Context(), client.ObjectKey{Name: "plain"}, sn); !apierrors.IsNotFound(err) {
		t.Error("a plain namespace got bounds")
	}
}

func TestShrinking(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: in("web"), Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Resources: corev1.ResourceRequirements{
		Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("2Gi")},
	}}}}}
	r := newReconciler(t, shop(full()), pod)
	sn := look(t, r)
	if !meta.IsStatusConditionTrue(sn.Status.Conditions, atoll.NamespaceWithinLimits) {
		t.Errorf("%+v", sn.Status.Conditions)
	}
	sn.Spec.Resources.MemoryLimit = quantity("1Gi")
	sn.Spec.Resources.MemoryReservation = quantity("1Gi")
	if err := r.Update(t.Context(), sn); err != nil {
		t.Fatal(err)
	}
	sn = look(t, r)
	if c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceWithinLimits); c.Status != metav1.ConditionFalse || !strings.Contains(c.Message, "memory: 2Gi used, the limit is 1Gi") {
		t.Errorf("%+v", c)
	}
	if c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceReservationsMet); c == nil || c.Status != metav1.ConditionFalse {
		t.Errorf("%+v", c)
	}
	get(t, r, pod)
}

func TestDeletion(t *testing.T) {
	service := &corev1.Service{ObjectMeta: in("web")}
	images := &registry{bytes: 7}
	r := newReconciler(t, shop(full()), service)
	r.Registry = images
	sn := look(t, r)
	if err := r.Delete(t.Context(), sn); err != nil {
		t.Fatal(err)
	}
	sn = look(t, r)
	c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceDeleting)
	if c == nil || c.Reason != "NotEmpty" || !strings.Contains(c.Message, "1 Service (web), 7 bytes of images") {
		t.Fatalf("condition %+v", c)
	}
	get(t, r, &corev1.ResourceQuota{ObjectMeta: in("shop-quota")})
	if err := r.Delete(t.Context(), service); err != nil {
		t.Fatal(err)
	}
	sn.Annotations = map[string]string{atoll.DeleteContentsAnnotation: "true"}
	if err := r.Update(t.Context(), sn); err != nil {
		t.Fatal(err)
	}
	images.fail = errors.New("the disk is full")
	request := ctrl.Request{NamespacedName: client.ObjectKey{Name: "shop"}}
	if _, err := r.Reconcile(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reconcile(t.Context(), request); err == nil || !strings.Contains(err.Error(), "the disk is full") {
		t.Fatalf("error %v", err)
	}
	images.fail = nil
	if sn := look(t, r); sn.Name != "" {
		t.Errorf("still there: %+v", sn)
	}
	if len(images.gone) != 1 {
		t.Errorf("removed projects %v", images.gone)
	}
	if err := r.Get(t.Context(), client.ObjectKey{Name: "atoll:namespace-owner:shop"}, &rbacv1.ClusterRole{}); !apierrors.IsNotFound(err) {
		t.Errorf("the role is still there: %v", err)
	}
}

func TestDeletionLeavesWhatIsNotOurs(t *testing.T) {
	images := &registry{bytes: 7}
	r := newReconciler(t, shop(full()), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
	r.Registry = images
	if err := r.Delete(t.Context(), look(t, r)); err != nil {
		t.Fatal(err)
	}
	if sn := look(t, r); sn.Name != "" || len(images.gone) > 0 {
		t.Errorf("%+v, removed projects %v", sn, images.gone)
	}
	get(t, r, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
}

func TestStuckDeletion(t *testing.T) {
	r := newReconciler(t, shop(full()))
	sn := look(t, r)
	ns := get(t, r, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
	ns.Finalizers = []string{"example.com/hold"}
	if err := r.Update(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	ns.Status.Conditions = []corev1.NamespaceCondition{{Type: corev1.NamespaceFinalizersRemaining, Status: corev1.ConditionTrue, Message: "Some content in the namespace has finalizers remaining: example.com/x in 1 resource instances"}}
	if err := r.Status().Update(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: in("data")}
	claim.Finalizers = []string{"example.com/x"}
	if err := r.Create(t.Context(), claim); err != nil {
		t.Fatal(err)
	}
	sn.Annotations = map[string]string{atoll.DeleteContentsAnnotation: "true"}
	if err := r.Update(t.Context(), sn); err != nil {
		t.Fatal(err)
	}
	for _, o := range []client.Object{sn, claim} {
		if err := r.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	sn = look(t, r)
	c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceDeleting)
	if c == nil || !strings.Contains(c.Message, "example.com/x in 1 resource instances") || !strings.Contains(c.Message, "PersistentVolumeClaim data waits for finalizer example.com/x") {
		t.Errorf("condition %+v", c)
	}
}

func TestTwoAdministrators(t *testing.T) {
	r := newReconciler(t, shop(full()))
	one, other := look(t, r), look(t, r)
	one.Spec.Description = "one"
	if err := r.Update(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	other.Spec.Description = "other"
	if err := r.Update(t.Context(), other); !apierrors.IsConflict(err) {
		t.Errorf("error %v", err)
	}
}
