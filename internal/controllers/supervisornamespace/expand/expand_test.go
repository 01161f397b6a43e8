package expand

import (
	"net/netip"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	"sigs.k8s.io/yaml"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
	"atoll.dev/atoll/internal/controllers/virtualmachineclass"
	"atoll.dev/atoll/internal/testkit/golden"
)

func quantity(s string) *resource.Quantity { return new(resource.MustParse(s)) }

func input(spec atoll.SupervisorNamespaceSpec) Input {
	resolve.Default(&spec)
	classes := map[string]vmopv1.VirtualMachineClassSpec{}
	for _, c := range virtualmachineclass.Defaults("shop") {
		classes[c.Name] = c.Spec
	}
	return Input{
		Name: "shop", Spec: &spec, Classes: classes,
		Owner: metav1.OwnerReference{APIVersion: "atoll.dev/v1alpha1", Kind: "SupervisorNamespace", Name: "shop", UID: "1"},
		Network: Network{
			PodCIDR: netip.MustParsePrefix("10.244.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"),
			DNS: []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("10.244.0.1")}, DNSPort: 53,
		},
	}
}

func text(t *testing.T, in Input) string {
	t.Helper()
	var out strings.Builder
	for _, o := range append([]any{Namespace(in)}, anys(in)...) {
		doc, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		out.WriteString("---\n" + string(doc))
	}
	return out.String()
}

func anys(in Input) []any {
	var out []any
	for _, o := range Objects(in) {
		out = append(out, o)
	}
	return out
}

func TestGoldenObjects(t *testing.T) {
	for name, spec := range map[string]atoll.SupervisorNamespaceSpec{
		"nothing": {},
		"full": {
			Resources: atoll.NamespaceResources{
				CPULimit: quantity("8"), MemoryLimit: quantity("24Gi"), StorageRequestLimit: quantity("1Ti"), CPULimitDefault: quantity("1"),
				Counts: atoll.NamespaceCounts{Pods: new(int64(100)), VirtualMachines: new(int64(4)), Deployments: new(int64(10)), PersistentVolumeClaims: new(int64(0)), VolumeSnapshots: new(int64(6)), VirtualMachineSnapshots: new(int64(3)), ContentLibraryItems: new(int64(2))},
			},
			StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold", Limit: quantity("500Gi")}, {Name: "silver"}},
			VMClasses:      []atoll.NamespaceReference{{Name: "best-effort-small"}, {Name: "unknown"}},
			AccessList: []atoll.NamespaceAccess{
				{SubjectType: "User", Subject: "olga", Role: "Owner"},
				{SubjectType: "Group", Subject: "devs", Role: "Edit"},
				{SubjectType: "User", Subject: "vera", Domain: "example.com", Role: "View"},
			},
			Network:         atoll.NamespaceNetwork{Isolation: "Isolated", FromNamespaces: []string{"web", "ops"}, EgressCIDRs: []string{"192.0.2.0/24"}},
			RestartPriority: "High",
		},
		"closed": {
			Network:    atoll.NamespaceNetwork{Isolation: "DenyAll"},
			PodRuntime: atoll.NamespacePodRuntime{Policy: "Runc"},
		},
		"egress": {
			Network:    atoll.NamespaceNetwork{EgressCIDRs: []string{"0.0.0.0/0"}},
			PodRuntime: atoll.NamespacePodRuntime{PrivilegedAllowed: true},
		},
	} {
		t.Run(name, func(t *testing.T) { golden.Compare(t, name+".yaml", text(t, input(spec))) })
	}
}

// What somebody made by themselves is counted by its Namespace, too.
func TestNamespaceOfSelfService(t *testing.T) {
	spec := &atoll.SupervisorNamespaceSpec{ClassName: "team"}
	notes := Namespace(Input{Name: "mine", Creator: "sso:olga@atoll.local", Spec: spec}).Annotations
	if notes[atoll.CreatorAnnotation] != "sso:olga@atoll.local" || notes[atoll.TemplateAnnotation] != "team" {
		t.Errorf("annotations %v", notes)
	}
	if notes = Namespace(Input{Name: "shop", Spec: spec}).Annotations; notes[atoll.TemplateAnnotation] != "" {
		t.Errorf("annotations of an administrator's %v", notes)
	}
}

// TestPlainPodsFit: where CPU or memory is limited, a container that says nothing gets what fits.
func TestPlainPodsFit(t *testing.T) {
	for _, c := range []struct{ cpu, memory, limitDefault, requestDefault, want, request string }{
		{"", "1Gi", "", "", "512Mi", "64Mi"},
		{"", "128Mi", "", "", "128Mi", "64Mi"},
		{"", "32Mi", "", "", "32Mi", "32Mi"},
		{"", "8Gi", "", "1Gi", "1Gi", "1Gi"},
		{"", "8Gi", "2Gi", "", "2Gi", "64Mi"},
	} {
		r := atoll.NamespaceResources{MemoryLimit: quantity(c.memory)}
		if c.limitDefault != "" {
			r.MemoryLimitDefault = quantity(c.limitDefault)
		}
		if c.requestDefault != "" {
			r.MemoryRequestDefault = quantity(c.requestDefault)
		}
		item := limitRange(input(atoll.SupervisorNamespaceSpec{Resources: r})).Spec.Limits[0]
		if item.Default.Memory().String() != c.want || item.DefaultRequest.Memory().String() != c.request {
			t.Errorf("%+v: limit %s, request %s", c, item.Default.Memory(), item.DefaultRequest.Memory())
		}
		if _, limited := item.Default[corev1.ResourceCPU]; limited {
			t.Errorf("%+v: CPU is limited", c)
		}
	}
}

// TestMachineFitsWithOverhead: a machine of 24 GiB fits a limit of 24 GiB and what internal/kube/bootstrap states as its
// overhead, by the function that a ResourceQuota counts with, and no byte less.
func TestMachineFitsWithOverhead(t *testing.T) {
	overhead := resource.MustParse("192Mi")
	pod := &corev1.Pod{Spec: corev1.PodSpec{
		Overhead: corev1.ResourceList{corev1.ResourceMemory: overhead},
		Containers: []corev1.Container{{Resources: corev1.ResourceRequirements{
			Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("24Gi")},
		}}},
	}}
	used := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})[corev1.ResourceMemory]
	limit := resource.MustParse("24Gi")
	limit.Add(overhead)
	hard := quota(input(atoll.SupervisorNamespaceSpec{Resources: atoll.NamespaceResources{MemoryLimit: &limit}})).Spec.Hard[corev1.ResourceLimitsMemory]
	if used.Cmp(hard) != 0 {
		t.Errorf("%s of %s", used.String(), hard.String())
	}
}
