// Package expand says which objects a SupervisorNamespace consists of.
//
// It is pure: what the spec says goes in, with what its template says and the defaults (package resolve), and what is
// known of the cluster; objects come out, complete, each with atoll.SupervisorNamespaceLabel. The controller of
// SupervisorNamespaces applies them and removes labelled objects that are not among them.
//
//	NS-quota             ResourceQuota: limits of CPU and memory, of all volumes together, counts
//	NS-storagequota      ResourceQuota: the storage classes that may be used, each with its limit
//	NS-limits            LimitRange: what containers get that say nothing
//	atoll-owner, -edit, -view, -registry-pull    RoleBindings
//	atoll-isolation      NetworkPolicy of the tier administrator
//	VirtualMachineClasses, where the spec lists them
//	atoll:namespace:NS, atoll:namespace-owner:NS ClusterRoles and their bindings: the SupervisorNamespace itself
//
// A VirtualMachine is a pod with limits, so that one ResourceQuota bounds pods and machines together, with what they
// cost beside (the overhead of their RuntimeClass). Where CPU or memory is limited, Kubernetes refuses containers that
// have no limit; so they get one: DefaultCPULimit and DefaultMemoryLimit, or less where the namespace has less.
package expand

import (
	"math"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
	"atoll.dev/atoll/internal/controllers/virtualmachineclass"
)

// What a container gets in a namespace with a limit if neither it nor the namespace says anything.
const (
	DefaultCPULimit      = "500m"
	DefaultCPURequest    = "50m"
	DefaultMemoryLimit   = "512Mi"
	DefaultMemoryRequest = "64Mi"
)

// Names that others know.
const (
	// HostAccessLabel is what internal/kube/admission/podruntime reads.
	HostAccessLabel   = "atoll.dev/host-access"
	hostAccessAllowed = "allowed"
	hostAccessDenied  = "denied"
	// VSphereClusterLabel is on every namespace of vSphere.
	vSphereClusterLabel = "vSphereClusterID"
	vSphereCluster      = "domain-c1"
	provideAll          = "all"
	podSecurity         = "pod-security.kubernetes.io/"
	// DefaultClassLabel is on VirtualMachineClasses that every namespace gets that lists none.
	DefaultClassLabel = virtualmachineclass.DefaultLabel
	storageSuffix     = ".storageclass.storage.k8s.io/requests.storage"
)

// Input is what objects are made of.
type Input struct {
	Name string
	// Creator is who made a SupervisorNamespace by themselves, "" for one of an administrator's.
	Creator string
	// Spec is the effective one.
	Spec    *atoll.SupervisorNamespaceSpec
	Network Network
	// Classes are those of Spec.VMClasses that are known.
	Classes map[string]vmopv1.VirtualMachineClassSpec
	// Owner is the SupervisorNamespace, for objects outside of the Namespace.
	Owner metav1.OwnerReference
}

// Namespace is the Namespace.
func Namespace(in Input) *corev1.Namespace {
	ns := &corev1.Namespace{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: in.Name, Labels: labels(in.Name), Annotations: map[string]string{atoll.RestartPriorityAnnotation: in.Spec.RestartPriority}},
	}
	if in.Creator != "" { // self-service counts the Namespace by these, whatever becomes of the SupervisorNamespace
		ns.Annotations[atoll.CreatorAnnotation], ns.Annotations[atoll.TemplateAnnotation] = in.Creator, in.Spec.ClassName
	}
	level, host := "baseline", hostAccessDenied
	if in.Spec.PodRuntime.PrivilegedAllowed {
		level = "privileged"
	}
	if in.Spec.PodRuntime.Policy == atoll.RuntimeRunc {
		level, host = "privileged", hostAccessAllowed
	}
	ns.Labels[podSecurity+"enforce"] = level
	ns.Labels[podSecurity+"warn"] = level
	ns.Labels[HostAccessLabel] = host
	ns.Labels[vSphereClusterLabel] = vSphereCluster
	ns.Labels[virtualmachineclass.ProvideLabel] = provideAll
	if in.Spec.VMClasses != nil {
		ns.Labels[virtualmachineclass.ProvideLabel] = virtualmachineclass.ProvideNone
	}
	return ns
}

// Objects are all others.
func Objects(in Input) []client.Object {
	var out []client.Object
	if q := quota(in); q != nil {
		out = append(out, q)
	}
	if q := storageQuota(in); q != nil {
		out = append(out, q)
	}
	if l := limitRange(in); l != nil {
		out = append(out, l)
	}
	out = append(out, access(in)...)
	if p := isolation(in); p != nil {
		out = append(out, p)
	}
	return append(out, classes(in)...)
}

func labels(name string) map[string]string {
	return map[string]string{atoll.SupervisorNamespaceLabel: name}
}

// meta is that of an object in the Namespace.
func (in Input) meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: in.Name, Name: name, Labels: labels(in.Name)}
}

// QuotaName and StorageQuotaName are the names that VMware gives.
func QuotaName(namespace string) string { return namespace + "-quota" }

// StorageQuotaName is the quota of storage classes.
func StorageQuotaName(namespace string) string { return namespace + "-storagequota" }

func quota(in Input) *corev1.ResourceQuota {
	hard := corev1.ResourceList{}
	r := in.Spec.Resources
	for name, limit := range map[corev1.ResourceName]*resource.Quantity{
		corev1.ResourceLimitsCPU:       r.CPULimit,
		corev1.ResourceLimitsMemory:    r.MemoryLimit,
		corev1.ResourceRequestsStorage: r.StorageRequestLimit,
	} {
		if limit != nil {
			hard[name] = *limit
		}
	}
	for _, c := range resolve.Counts(&r.Counts) {
		if *c.Value != nil {
			hard[corev1.ResourceName(c.Quota)] = *resource.NewQuantity(**c.Value, resource.DecimalSI)
		}
	}
	return newQuota(in, QuotaName(in.Name), hard)
}

func storageQuota(in Input) *corev1.ResourceQuota {
	hard := corev1.ResourceList{}
	for _, c := range in.Spec.StorageClasses {
		limit := *resource.NewQuantity(math.MaxInt64, resource.DecimalSI) // VMware's way to say none
		if c.Limit != nil {
			limit = *c.Limit
		}
		hard[StorageQuotaKey(c.Name)] = limit
	}
	return newQuota(in, StorageQuotaName(in.Name), hard)
}

// StorageQuotaKey is what a ResourceQuota calls the sizes of volumes of a storage class.
func StorageQuotaKey(class string) corev1.ResourceName {
	return corev1.ResourceName(class + storageSuffix)
}

func newQuota(in Input, name string, hard corev1.ResourceList) *corev1.ResourceQuota {
	if len(hard) == 0 {
		return nil
	}
	return &corev1.ResourceQuota{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ResourceQuota"},
		ObjectMeta: in.meta(name),
		Spec:       corev1.ResourceQuotaSpec{Hard: hard},
	}
}

func limitRange(in Input) *corev1.LimitRange {
	r := in.Spec.Resources
	item := corev1.LimitRangeItem{Type: corev1.LimitTypeContainer, Default: corev1.ResourceList{}, DefaultRequest: corev1.ResourceList{}}
	for _, d := range []struct {
		name              corev1.ResourceName
		bound             *resource.Quantity
		limit, request    *resource.Quantity
		limitIf, requests string
	}{
		{corev1.ResourceCPU, r.CPULimit, r.CPULimitDefault, r.CPURequestDefault, DefaultCPULimit, DefaultCPURequest},
		{corev1.ResourceMemory, r.MemoryLimit, r.MemoryLimitDefault, r.MemoryRequestDefault, DefaultMemoryLimit, DefaultMemoryRequest},
	} {
		limit, request := d.limit, d.request
		if limit == nil && d.bound != nil {
			limit = most(resource.MustParse(d.limitIf), request)
			limit = cut(limit, d.bound)
		}
		if request == nil && limit != nil {
			request = cut(new(resource.MustParse(d.requests)), limit)
		}
		if limit != nil {
			item.Default[d.name] = *limit
		}
		if request != nil {
			item.DefaultRequest[d.name] = *request
		}
	}
	if len(item.Default)+len(item.DefaultRequest) == 0 {
		return nil
	}
	return &corev1.LimitRange{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "LimitRange"},
		ObjectMeta: in.meta(in.Name + "-limits"),
		Spec:       corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{item}},
	}
}

// most is the greater of both.
func most(a resource.Quantity, b *resource.Quantity) *resource.Quantity {
	if b != nil && b.Cmp(a) > 0 {
		return new(b.DeepCopy())
	}
	return &a
}

// cut is the smaller of both.
func cut(a, bound *resource.Quantity) *resource.Quantity {
	if bound != nil && bound.Cmp(*a) < 0 {
		return new(bound.DeepCopy())
	}
	return a
}

// classes are the VirtualMachineClasses of a namespace that lists them.
func classes(in Input) []client.Object {
	var out []client.Object
	for _, ref := range in.Spec.VMClasses {
		spec, known := in.Classes[ref.Name]
		if !known {
			continue
		}
		c := &vmopv1.VirtualMachineClass{
			TypeMeta:   metav1.TypeMeta{APIVersion: vmopv1.GroupVersion.String(), Kind: "VirtualMachineClass"},
			ObjectMeta: in.meta(ref.Name),
			Spec:       *spec.DeepCopy(),
		}
		if slices.ContainsFunc(virtualmachineclass.Defaults(in.Name), func(d *vmopv1.VirtualMachineClass) bool { return d.Name == ref.Name }) {
			c.Labels[DefaultClassLabel] = "true" // so that it comes back when the list goes
		}
		out = append(out, c)
	}
	return out
}

// ClassListed tells whether a namespace offers a VirtualMachineClass.
func ClassListed(spec *atoll.SupervisorNamespaceSpec, name string) bool {
	return spec.VMClasses == nil || slices.Contains(spec.VMClasses, atoll.NamespaceReference{Name: name})
}
