//go:build integration

package server

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/manager"
)

// person is a client of somebody who has logged in.
func person(t *testing.T, kubeconfig, name string) client.Client {
	t.Helper()
	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	rest.Impersonate.UserName, rest.Impersonate.Groups = atoll.SubjectName(name, atoll.LocalDomain), []string{"system:authenticated"}
	scheme, err := manager.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(rest, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func q(s string) *resource.Quantity { return new(resource.MustParse(s)) }

func supervisorNamespace(name string, spec atoll.SupervisorNamespaceSpec) *atoll.SupervisorNamespace {
	return &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
}

func access(subject, role string) atoll.NamespaceAccess {
	return atoll.NamespaceAccess{SubjectType: "User", Subject: subject, Domain: atoll.LocalDomain, Role: role}
}

func isReady(sn *atoll.SupervisorNamespace) bool {
	return meta.IsStatusConditionTrue(sn.Status.Conditions, atoll.NamespaceReady) && sn.Status.ObservedGeneration == sn.Generation
}

// TestSupervisorNamespaces uses SupervisorNamespaces with the real API server and its controllers.
func TestSupervisorNamespaces(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	p := mustStart(t, cfg)
	c := clientOf(t, cfg.AdminKubeconfig)
	t.Run("LifeAndDrift", func(t *testing.T) { checkDrift(t, c) })
	t.Run("Machines", func(t *testing.T) { checkMachineQuota(t, c) })
	t.Run("Refusals", func(t *testing.T) { checkNamespaceRefusals(t, c) })
	t.Run("Roles", func(t *testing.T) { checkRoles(t, c) })
	t.Run("SelfService", func(t *testing.T) { checkSelfService(t, cfg, c) })
	t.Run("Deletion", func(t *testing.T) { checkNamespaceDeletion(t, c) })
	t.Run("Many", func(t *testing.T) { checkMany(t, c) })
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)); err == nil {
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "VmRSS") {
				t.Log(strings.TrimSpace(line))
			}
		}
	}
	p.stop(syscall.SIGTERM)
	if code := p.cmd.ProcessState.ExitCode(); code != 0 || strings.Contains(p.output.String(), "panic: ") {
		t.Errorf("exit code %d:\n%s", code, p.output)
	}
}

func checkDrift(t *testing.T, c client.Client) {
	ctx := t.Context()
	sn := supervisorNamespace("shop", atoll.SupervisorNamespaceSpec{
		Resources: atoll.NamespaceResources{
			CPULimit: q("4"), MemoryLimit: q("2Gi"), StorageRequestLimit: q("10Gi"),
			Counts: atoll.NamespaceCounts{Pods: new(int64(3)), VirtualMachines: new(int64(1)), ConfigMaps: new(int64(5))},
		},
		StorageClasses: []atoll.NamespaceStorageClass{{Name: "atoll", Limit: q("5Gi")}},
		VMClasses:      []atoll.NamespaceReference{{Name: "best-effort-xsmall"}},
		AccessList:     []atoll.NamespaceAccess{access("olga", "Owner"), access("ed", "Edit"), access("vera", "View")},
		Network:        atoll.NamespaceNetwork{Isolation: "Isolated"},
	})
	begin := time.Now()
	if err := c.Create(ctx, sn); err != nil {
		t.Fatal(err)
	}
	sn = eventually(t, c, sn, isReady)
	t.Logf("ready after %s", time.Since(begin).Round(time.Millisecond))
	key := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "shop", Name: name} }
	// A plain pod is admissible, and counted with its overhead.
	pod := &corev1.Pod{ObjectMeta: key("web"), Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "x"}}}}
	eventually(t, c, &corev1.ServiceAccount{ObjectMeta: key("default")}, func(*corev1.ServiceAccount) bool { return true })
	if err := c.Create(ctx, pod); err != nil {
		t.Fatal(err)
	}
	if got := pod.Spec.Containers[0].Resources.Limits.Memory().String(); got != "512Mi" {
		t.Errorf("limit %s", got)
	}
	eventually(t, c, sn, func(sn *atoll.SupervisorNamespace) bool {
		return sn.Status.Memory == "576Mi/2Gi" && len(sn.Status.Top) == 2
	})
	quota := eventually(t, c, &corev1.ResourceQuota{ObjectMeta: key("shop-quota")}, func(q *corev1.ResourceQuota) bool {
		return q.Status.Used.Name("limits.memory", resource.BinarySI).String() == "576Mi"
	})
	// What is there is not written again and again.
	policy := eventually(t, c, &networkingv1.NetworkPolicy{ObjectMeta: key("atoll-isolation")}, func(*networkingv1.NetworkPolicy) bool { return true })
	if policy.Generation != 1 || policy.Labels[atoll.TierLabel] != atoll.TierAdministrator {
		t.Errorf("policy %+v", policy)
	}
	for _, o := range []client.Object{policy, &corev1.LimitRange{ObjectMeta: key("shop-limits")}, &rbacv1.RoleBinding{ObjectMeta: key("atoll-owner")}, &vmopv1.VirtualMachineClass{ObjectMeta: key("best-effort-xsmall")}, quota} {
		if err := c.Get(ctx, client.ObjectKeyFromObject(o), o); err != nil {
			t.Fatal(err)
		}
		for _, f := range o.GetManagedFields() {
			if f.Manager == "atoll-supervisor-namespace" && f.Operation == metav1.ManagedFieldsOperationUpdate {
				t.Errorf("%T %s had to be written twice", o, o.GetName())
			}
		}
	}
	// Drift.
	if err := retry.RetryOnConflict(retry.DefaultBackoff, func() error { // with the controller of quotas
		if err := c.Get(ctx, client.ObjectKeyFromObject(quota), quota); err != nil {
			return err
		}
		quota.Spec.Hard["limits.memory"] = resource.MustParse("1Ti")
		quota.Spec.Hard["count/secrets"] = resource.MustParse("1")
		return c.Update(ctx, quota)
	}); err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(ctx, policy); err != nil {
		t.Fatal(err)
	}
	begin = time.Now()
	eventually(t, c, &corev1.ResourceQuota{ObjectMeta: key("shop-quota")}, func(q *corev1.ResourceQuota) bool {
		_, more := q.Spec.Hard["count/secrets"]
		return !more && q.Spec.Hard.Name("limits.memory", resource.BinarySI).String() == "2Gi"
	})
	eventually(t, c, &networkingv1.NetworkPolicy{ObjectMeta: key("atoll-isolation")}, func(p *networkingv1.NetworkPolicy) bool { return p.UID != policy.UID })
	t.Logf("drift put right after %s", time.Since(begin).Round(time.Millisecond))
	checkConflict(t, c, sn)
	eventually(t, c, sn, func(sn *atoll.SupervisorNamespace) bool {
		w := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceWithinLimits)
		return isReady(sn) && w.Status == metav1.ConditionFalse && strings.Contains(w.Message, "memory: 576Mi used, the limit is 256Mi")
	})
	if err := c.Get(ctx, client.ObjectKeyFromObject(pod), pod); err != nil || pod.DeletionTimestamp != nil {
		t.Errorf("the pod: %v", err)
	}
	second := &corev1.Pod{ObjectMeta: key("second"), Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "x"}}}}
	if err := c.Create(ctx, second); !apierrors.IsForbidden(err) {
		t.Errorf("a pod beyond the quota: %v", err)
	}
}

// checkConflict: of two administrators who edit what they have read, the second one has to look again. Shrinking below
// what is used is accepted.
func checkConflict(t *testing.T, c client.Client, sn *atoll.SupervisorNamespace) {
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error { // the controller writes the status
		one, other := &atoll.SupervisorNamespace{}, &atoll.SupervisorNamespace{}
		for _, o := range []*atoll.SupervisorNamespace{one, other} {
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(sn), o); err != nil {
				return err
			}
		}
		one.Spec.Resources.MemoryLimit = q("256Mi")
		if err := c.Update(t.Context(), one); err != nil {
			return err
		}
		other.Spec.Description = "lost update"
		if err := c.Update(t.Context(), other); !apierrors.IsConflict(err) {
			t.Errorf("error %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// checkMachineQuota: a machine of 24 GiB fits a limit of 24 GiB and the overhead that is stated, and nothing beside it.
func checkMachineQuota(t *testing.T, c client.Client) {
	ctx := t.Context()
	class := &vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: atoll.ClassCatalogNamespace, Name: "big"}}
	class.Spec.Hardware = vmopv1.VirtualMachineClassHardware{Cpus: 2, Memory: resource.MustParse("24Gi")}
	sn := supervisorNamespace("vms", atoll.SupervisorNamespaceSpec{
		VMClasses: []atoll.NamespaceReference{{Name: "big"}},
		Resources: atoll.NamespaceResources{MemoryLimit: q("24768Mi"), Counts: atoll.NamespaceCounts{VirtualMachines: new(int64(1))}},
	})
	if err := c.Create(ctx, sn); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, sn, func(sn *atoll.SupervisorNamespace) bool {
		r := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceReady)
		return r != nil && r.Reason == atoll.ReasonUnknownReference && strings.Contains(r.Message, "spec.vmClasses[0]: VirtualMachineClass big")
	})
	image := &vmopv1.ClusterVirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Name: "vmi-0123456789abcdef0"}}
	for _, o := range []client.Object{class, image} {
		if err := c.Create(ctx, o); err != nil {
			t.Fatal(err)
		}
	}
	image.Status = vmopv1.VirtualMachineImageStatus{
		Name: "debian-12", Type: "OVF", Firmware: "efi",
		Disks:      []vmopv1.VirtualMachineImageDiskInfo{{Name: "disk0", Limit: q("2Gi")}},
		Conditions: []metav1.Condition{{Type: "Ready", Status: metav1.ConditionTrue, Reason: "True", LastTransitionTime: metav1.Now()}},
	}
	if err := c.Status().Update(ctx, image); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, sn, isReady)
	vm := machine("db")
	vm.Namespace, vm.Spec.ClassName = "vms", "big"
	err := wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		return c.Create(ctx, vm) == nil, nil // the webhook's cache has the image in a moment
	})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, c, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "vms", Name: "db"}}, func(p *corev1.Pod) bool { return p.Labels[machinev1.NameLabel] == "db" })
	sn = eventually(t, c, sn, func(sn *atoll.SupervisorNamespace) bool { return sn.Status.Memory == "24768Mi/24768Mi" })
	if len(sn.Status.Top) == 0 || sn.Status.Top[0].Kind != "VirtualMachine" || sn.Status.Top[0].Name != "db" {
		t.Errorf("top %+v", sn.Status.Top)
	}
	more := machine("more")
	more.Namespace, more.Spec.ClassName = "vms", "big"
	if err := c.Create(ctx, more); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "count/virtualmachines.vmoperator.vmware.com") {
		t.Errorf("a second machine: %v", err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "vms", Name: "web"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "x"}}}}
	if err := c.Create(ctx, pod); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "limits.memory") {
		t.Errorf("a pod beside it: %v", err)
	}
}

func checkNamespaceRefusals(t *testing.T, c client.Client) {
	for want, sn := range map[string]*atoll.SupervisorNamespace{
		"system's own":            supervisorNamespace("kube-mine", atoll.SupervisorNamespaceSpec{}),
		"the name must be a DNS":  supervisorNamespace("a.b", atoll.SupervisorNamespaceSpec{}),
		"must not be negative":    supervisorNamespace("x", atoll.SupervisorNamespaceSpec{Resources: atoll.NamespaceResources{CPULimit: q("-1")}}),
		"is above memoryLimit":    supervisorNamespace("x", atoll.SupervisorNamespaceSpec{Resources: atoll.NamespaceResources{MemoryLimit: q("1Gi"), MemoryReservation: q("2Gi")}}),
		"does not exist":          supervisorNamespace("x", atoll.SupervisorNamespaceSpec{ClassName: "none"}),
		"spec.accessList[0].role": supervisorNamespace("x", atoll.SupervisorNamespaceSpec{AccessList: []atoll.NamespaceAccess{access("a", "King")}}),
	} {
		if err := c.Create(t.Context(), sn); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	plain := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "plain"}}
	if err := c.Create(t.Context(), plain); err != nil {
		t.Fatal(err)
	}
	sn := supervisorNamespace("plain", atoll.SupervisorNamespaceSpec{})
	if err := c.Create(t.Context(), sn); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, sn, func(sn *atoll.SupervisorNamespace) bool {
		r := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceReady)
		return r != nil && r.Reason == atoll.ReasonNamespaceExists
	})
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"atoll.dev/adopt":"true"}}}`))
	if err := c.Patch(t.Context(), sn, patch); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, sn, isReady)
}

// checkRoles asks what upstream's tests of VM Operator ask, and about the registry.
func checkRoles(t *testing.T, c client.Client) {
	vmop := "vmoperator.vmware.com"
	type check struct {
		user, verb, group, resource, namespace, name string
		want                                         bool
	}
	var checks []check
	for _, r := range []string{"virtualmachineclasses", "virtualmachineimages", "virtualmachines", "virtualmachineservices", "virtualmachinepublishrequests", "webconsolerequests"} {
		checks = append(checks, check{"vera", "get", vmop, r, "shop", "", true}, check{"vera", "get", vmop, r, "", "", false})
	}
	for _, r := range []string{"virtualmachines", "virtualmachineservices", "virtualmachinepublishrequests", "webconsolerequests"} {
		checks = append(checks, check{"ed", "create", vmop, r, "shop", "", true}, check{"ed", "create", vmop, r, "", "", false}, check{"vera", "create", vmop, r, "shop", "", false},
			check{"olga", "create", vmop, r, "shop", "", true})
	}
	checks = append(checks,
		check{"vera", "get", vmop, "clustervirtualmachineimages", "", "", true},
		check{"vera", "get", "", "secrets", "shop", "", false},
		check{"vera", "get", "registry.atoll.dev", "repositories", "shop", "", true},
		check{"vera", "update", "registry.atoll.dev", "repositories", "shop", "", false},
		check{"ed", "update", "registry.atoll.dev", "repositories", "shop", "", true},
		check{"ed", "update", "registry.atoll.dev", "repositories", "vms", "", false},
		check{"ed", "create", "atoll.dev", "robotaccounts", "shop", "", true},
		check{"ed", "delete", "atoll.dev", "supervisornamespaces", "", "shop", false},
		check{"ed", "get", "atoll.dev", "supervisornamespaces", "", "shop", true},
		check{"olga", "delete", "atoll.dev", "supervisornamespaces", "", "shop", true},
		check{"olga", "delete", "", "namespaces", "shop", "shop", true},
		check{"olga", "update", "atoll.dev", "supervisornamespaces", "", "vms", false},
		check{"olga", "list", "atoll.dev", "supervisornamespaces", "", "", false},
		check{"olga", "update", "", "resourcequotas", "shop", "", false},
		check{"olga", "create", "rbac.authorization.k8s.io", "rolebindings", "shop", "", false},
		check{"mallory", "get", "", "pods", "shop", "", false},
		check{"mallory", "create", "atoll.dev", "supervisornamespaces", "", "", false},
		check{"olga", "create", "atoll.dev", "supervisornamespaces", "", "", true},
		check{"olga", "create", "", "namespaces", "", "", true},
	)
	for _, k := range checks {
		var got bool
		err := wait.PollUntilContextTimeout(t.Context(), 200*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
			review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
				User: atoll.SubjectName(k.user, atoll.LocalDomain), Groups: []string{"system:authenticated"},
				ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: k.verb, Group: k.group, Resource: k.resource, Namespace: k.namespace, Name: k.name},
			}}
			if err := c.Create(ctx, review); err != nil {
				return false, err
			}
			got = review.Status.Allowed
			return got == k.want, nil
		})
		if err != nil {
			t.Errorf("%+v: %v, %v", k, got, err)
		}
	}
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: "system:serviceaccount:shop:default", Groups: []string{"system:serviceaccounts", "system:serviceaccounts:shop", "system:authenticated"},
		ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "get", Group: "registry.atoll.dev", Resource: "repositories", Namespace: "shop"},
	}}
	if err := c.Create(t.Context(), review); err != nil || !review.Status.Allowed {
		t.Errorf("pull by the namespace's service account: %v, %v", review.Status, err)
	}
}

func checkSelfService(t *testing.T, cfg Config, c client.Client) {
	ctx := t.Context()
	olga, mallory := person(t, cfg.AdminKubeconfig, "olga"), person(t, cfg.AdminKubeconfig, "mallory")
	team := &atoll.SupervisorNamespaceTemplate{ObjectMeta: metav1.ObjectMeta{Name: "team"}}
	team.Spec.Template.Resources.MemoryLimit = q("4Gi")
	team.Spec.SelfService = atoll.TemplateSelfService{Enabled: true, MaxPerUser: 2}
	if err := c.Create(ctx, team); err != nil {
		t.Fatal(err)
	}
	if err := mallory.Create(ctx, supervisorNamespace("evil", atoll.SupervisorNamespaceSpec{ClassName: "team"})); !apierrors.IsForbidden(err) {
		t.Errorf("a stranger: %v", err)
	}
	if err := olga.Create(ctx, supervisorNamespace("wide", atoll.SupervisorNamespaceSpec{ClassName: "team", Resources: atoll.NamespaceResources{MemoryLimit: q("8Gi")}})); err == nil || !strings.Contains(err.Error(), "is above that of the template") {
		t.Errorf("wider than the template: %v", err)
	}
	if err := olga.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "quick"}}); err == nil || !strings.Contains(err.Error(), "no default SupervisorNamespaceTemplate") {
		t.Errorf("a plain namespace without a default template: %v", err)
	}
	if err := olga.Create(ctx, supervisorNamespace("mine", atoll.SupervisorNamespaceSpec{ClassName: "team"})); err != nil {
		t.Fatal(err)
	}
	mine := eventually(t, olga, supervisorNamespace("mine", atoll.SupervisorNamespaceSpec{}), isReady)
	if mine.Annotations[atoll.CreatorAnnotation] != "sso:olga@atoll.local" || mine.Status.Effective.Resources.MemoryLimit.String() != "4Gi" {
		t.Errorf("%+v", mine)
	}
	// With a default template, kubectl create namespace does.
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"selfService":{"default":true}}}`))
	if err := c.Patch(ctx, team, patch); err != nil {
		t.Fatal(err)
	}
	if err := olga.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "quick"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, olga, supervisorNamespace("quick", atoll.SupervisorNamespaceSpec{}), isReady)
	allowed := func(do func() error) error { // once the API server has seen the binding
		var err error
		_ = wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, patience, true, func(context.Context) (bool, error) {
			err = do()
			return !apierrors.IsForbidden(err), nil
		})
		return err
	}
	if err := allowed(func() error {
		return olga.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "quick", Name: "x"}})
	}); err != nil {
		t.Errorf("an owner in a new namespace: %v", err)
	}
	if err := olga.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "third"}}); err == nil || !strings.Contains(err.Error(), "allows 2 for each user") {
		t.Errorf("one too many: %v", err)
	}
	if err := allowed(func() error { return olga.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "quick"}}) }); err != nil {
		t.Errorf("deleting an own namespace: %v", err)
	}
	gone(t, c, supervisorNamespace("quick", atoll.SupervisorNamespaceSpec{}))
	eventually(t, c, team, func(x *atoll.SupervisorNamespaceTemplate) bool { return x.Status.Namespaces == 1 })
}

func gone(t *testing.T, c client.Client, obj client.Object) {
	t.Helper()
	err := wait.PollUntilContextTimeout(t.Context(), 200*time.Millisecond, 2*patience, true, func(ctx context.Context) (bool, error) {
		return apierrors.IsNotFound(c.Get(ctx, client.ObjectKeyFromObject(obj), obj)), nil
	})
	if err != nil {
		t.Fatalf("%s: %v, %+v", obj.GetName(), err, obj)
	}
}

func checkNamespaceDeletion(t *testing.T, c client.Client) {
	ctx := t.Context()
	sn := supervisorNamespace("shop", atoll.SupervisorNamespaceSpec{})
	if err := c.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "1 Pod (web)") {
		t.Errorf("deleting the Namespace under it: %v", err)
	}
	if err := c.Delete(ctx, sn); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, sn, func(sn *atoll.SupervisorNamespace) bool {
		d := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceDeleting)
		return d != nil && d.Reason == "NotEmpty" && strings.Contains(d.Message, "1 Pod (web)")
	})
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "held", Finalizers: []string{"example.com/held"}}}
	claim.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}
	claim.Spec.Resources.Requests = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
	if err := c.Create(ctx, claim); err != nil {
		t.Fatal(err)
	}
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"atoll.dev/delete-contents":"true"}}}`))
	if err := c.Patch(ctx, sn, patch); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, sn, func(sn *atoll.SupervisorNamespace) bool {
		d := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceDeleting)
		return d != nil && d.Reason == "NamespaceTerminating" && strings.Contains(d.Message, "PersistentVolumeClaim held waits for finalizer") && strings.Contains(d.Message, "example.com/held in 1 resource instances")
	})
	free := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`))
	if err := c.Patch(ctx, claim, free); err != nil {
		t.Fatal(err)
	}
	gone(t, c, sn)
	gone(t, c, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "atoll:namespace-owner:shop"}})
	gone(t, c, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
}

// checkMany makes many at once.
func checkMany(t *testing.T, c client.Client) {
	const count = 40
	begin := time.Now()
	for i := range count {
		sn := supervisorNamespace(fmt.Sprintf("many-%d", i), atoll.SupervisorNamespaceSpec{
			Resources:  atoll.NamespaceResources{CPULimit: q("4"), MemoryLimit: q("2Gi"), Counts: atoll.NamespaceCounts{Pods: new(int64(3))}},
			AccessList: []atoll.NamespaceAccess{access("olga", "Owner"), access("vera", "View")},
			Network:    atoll.NamespaceNetwork{Isolation: "Isolated"},
		})
		if err := c.Create(t.Context(), sn); err != nil {
			t.Fatal(err)
		}
	}
	err := wait.PollUntilContextTimeout(t.Context(), 200*time.Millisecond, 5*patience, true, func(ctx context.Context) (bool, error) {
		var list atoll.SupervisorNamespaceList
		if err := c.List(ctx, &list); err != nil {
			return false, err
		}
		n := 0
		for i := range list.Items {
			if strings.HasPrefix(list.Items[i].Name, "many-") && isReady(&list.Items[i]) {
				n++
			}
		}
		return n == count, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d ready after %s", count, time.Since(begin).Round(time.Millisecond))
}
