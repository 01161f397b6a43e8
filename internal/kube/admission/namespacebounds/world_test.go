package namespacebounds

import (
	"context"
	"errors"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/kubernetes/pkg/apis/core"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

const (
	plainNS   = "plain"
	shopNS    = "shop"
	orphanNS  = "orphan" // labelled, without a SupervisorNamespace
	laterNS   = "later"  // its SupervisorNamespace is not in the cache
	adminName = "sso:administrator@atoll.local"
)

func anna() user.Info {
	return &user.DefaultInfo{Name: "sso:anna@atoll.local", Groups: []string{user.AllAuthenticated}}
}

func administrator() user.Info { return &user.DefaultInfo{Name: adminName} }

// authz lets the administrator do everything, and anna delete her namespace.
type authz struct{}

func (authz) Authorize(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	if a.GetUser().GetName() == adminName || a.GetVerb() == "delete" && a.GetName() == shopNS && a.GetUser().GetName() == anna().GetName() {
		return authorizer.DecisionAllow, "", nil
	}
	return authorizer.DecisionNoOpinion, "", nil
}

// world is a plugin over a cluster of two hosts with some namespaces.
type world struct {
	testing.TB
	*Plugin
}

// newWorld bounds the namespace shop by a spec.
func newWorld(t testing.TB, spec atoll.SupervisorNamespaceSpec, objects ...runtime.Object) *world {
	t.Helper()
	label := map[string]string{atoll.SupervisorNamespaceLabel: "x"}
	client := fake.NewClientset()
	factory := informers.NewSharedInformerFactory(client, 0)
	p := New(NewSource())
	kinds := map[schema.GroupVersionResource]string{
		atoll.SupervisorNamespaces():                                    "SupervisorNamespaceList",
		vmopv1.GroupVersion.WithResource("virtualmachineimages"):        "VirtualMachineImageList",
		vmopv1.GroupVersion.WithResource("clustervirtualmachineimages"): "ClusterVirtualMachineImageList",
	}
	later := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "atoll.dev/v1alpha1", "kind": "SupervisorNamespace", "metadata": map[string]any{"name": laterNS},
		"status": map[string]any{"effective": map[string]any{"images": []any{"registry.atoll.local/later/**"}}},
	}}
	p.SetDynamicClient(dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds, append(objects, later)...))
	p.SetExternalKubeClientSet(client)
	p.SetExternalKubeInformerFactory(factory)
	p.SetAuthorizer(authz{})
	if err := p.ValidateInitialization(); err != nil {
		t.Fatal(err)
	}
	p.SetReadyFunc(func() bool { return true })
	p.source.synced, p.source.boundsSynced = nil, func() bool { return true }
	spec.AccessList = append(spec.AccessList,
		atoll.NamespaceAccess{SubjectType: "User", Subject: "anna", Role: atoll.RoleOwner},
		atoll.NamespaceAccess{SubjectType: "Group", Subject: "devs", Domain: "example.org", Role: atoll.RoleOwner},
		atoll.NamespaceAccess{SubjectType: "User", Subject: "victor", Role: atoll.RoleView})
	add := func(store interface{ Add(any) error }, obj any) {
		if err := store.Add(obj); err != nil {
			t.Fatal(err)
		}
	}
	bounds := &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: shopNS}, Spec: spec}
	add(p.source.bounds.GetStore(), bounds)
	for name, labels := range map[string]map[string]string{plainNS: nil, shopNS: label, orphanNS: label, laterNS: label} {
		add(factory.Core().V1().Namespaces().Informer().GetStore(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
	}
	for name, handler := range map[string]string{"atoll": "atoll", "atoll-vm": "atoll-vm", "runc": "runc", "sneaky": "runc"} {
		add(factory.Node().V1().RuntimeClasses().Informer().GetStore(), &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: handler})
	}
	for name, params := range map[string]map[string]string{"standard": nil, "gold": {"encryption": "corp"}} {
		sc := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Parameters: params}
		if name == "standard" {
			sc.Annotations = map[string]string{defaultClass: "true"}
		}
		add(factory.Storage().V1().StorageClasses().Informer().GetStore(), sc)
	}
	for name, zone := range map[string]string{"host-1": "a", "host-2": "b"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
			corev1.LabelTopologyZone: zone, corev1.LabelHostname: name + ".example",
		}}, Status: corev1.NodeStatus{Allocatable: list4("4", "8Gi")}}
		add(factory.Core().V1().Nodes().Informer().GetStore(), node)
		p.source.ledger.node(node)
	}
	p.source.ledger.reserve(bounds)
	return &world{TB: t, Plugin: p}
}

func list4(cpu, memory string) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
}

// request is one request.
type ask struct {
	obj, old    runtime.Object
	gvk         schema.GroupVersionKind
	gvr         schema.GroupVersionResource
	ns, name    string
	subresource string
	op          admission.Operation
	who         user.Info
	dry         bool
}

func (w *world) send(r ask) error {
	w.Helper()
	if r.who == nil {
		r.who = anna()
	}
	a := admission.NewAttributesRecord(r.obj, r.old, r.gvk, r.ns, r.name, r.gvr, r.subresource, r.op, nil, r.dry, r.who)
	err := w.Admit(context.Background(), a, nil)
	if err == nil {
		err = w.Validate(context.Background(), a, nil)
	}
	if err != nil && !apierrors.IsForbidden(err) {
		w.Errorf("the error is no refusal: %v", err)
	}
	return err
}

// podAsk is a request about a pod.
func podAsk(op admission.Operation, subresource string, pod, old *core.Pod) ask {
	r := ask{obj: pod, gvk: core.Kind("Pod").WithVersion("v1"), gvr: core.Resource("pods").WithVersion("v1"), ns: pod.Namespace, name: pod.Name, op: op, subresource: subresource}
	if old != nil {
		r.old = old
	}
	return r
}

func newPod(ns string, changes ...func(*core.Pod)) *core.Pod {
	class := "atoll"
	pod := &core.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: ns, UID: "u-web"},
		Spec: core.PodSpec{
			RuntimeClassName: &class, SecurityContext: &core.PodSecurityContext{},
			Containers: []core.Container{{Name: "main", Image: "registry.atoll.local/shop/web:1"}},
		},
	}
	for _, c := range changes {
		c(pod)
	}
	return pod
}

// text is the refusal without the start that names the object, which is upstream's.
func text(err error) string {
	if err == nil {
		return "accepted"
	}
	if status, ok := errors.AsType[*apierrors.StatusError](err); ok {
		return status.ErrStatus.Message
	}
	return err.Error()
}
