package validate

import (
	"net/netip"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
)

func quantity(s string) *resource.Quantity { return new(resource.MustParse(s)) }

type spec = atoll.SupervisorNamespaceSpec

func TestSpec(t *testing.T) {
	net := Network{Inside: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}
	for _, c := range []struct {
		name, want string
		change     func(*spec)
	}{
		{"nothing", "", func(*spec) {}},
		{"negative", "spec.resources.cpuLimit: Invalid value: \"-1\": must not be negative", func(s *spec) { s.Resources.CPULimit = quantity("-1") }},
		{"reservation", "spec.resources.memoryReservation", func(s *spec) {
			s.Resources.MemoryLimit, s.Resources.MemoryReservation = quantity("1Gi"), quantity("2Gi")
		}},
		{"default", "spec.resources.cpuLimitDefault: Invalid value: \"2\": is above cpuLimit, which is 1", func(s *spec) {
			s.Resources.CPULimit, s.Resources.CPULimitDefault = quantity("1"), quantity("2")
		}},
		{"request", "spec.resources.memoryRequestDefault", func(s *spec) {
			s.Resources.MemoryLimitDefault, s.Resources.MemoryRequestDefault = quantity("1Gi"), quantity("2Gi")
		}},
		{"request without default", "spec.resources.memoryRequestDefault", func(s *spec) {
			s.Resources.MemoryLimit, s.Resources.MemoryRequestDefault = quantity("1Gi"), quantity("2Gi")
		}},
		{"storage", "spec.storageClasses[0].limit", func(s *spec) {
			s.Resources.StorageRequestLimit, s.StorageClasses = quantity("1Gi"), []atoll.NamespaceStorageClass{{Name: "gold", Limit: quantity("2Gi")}}
		}},
		{"count", "spec.resources.counts.podCount", func(s *spec) { s.Resources.Counts.Pods = new(int64(-1)) }},
		{"empty list", "spec.vmClasses: Invalid value: \"[]\"", func(s *spec) { s.VMClasses = []atoll.NamespaceReference{} }},
		{"twice", "spec.hosts[1]: Duplicate", func(s *spec) { s.Hosts = []string{"a", "a"} }},
		{"pattern", "spec.images[0]", func(s *spec) { s.Images = []string{"registry/[a"} }},
		{"stars", "spec.images[0]", func(s *spec) { s.Images = []string{"registry/a**"} }},
		{"access", "spec.accessList[1]: Duplicate", func(s *spec) {
			s.AccessList = []atoll.NamespaceAccess{{SubjectType: "User", Subject: "a", Role: "Edit"}, {SubjectType: "User", Subject: "a", Domain: "atoll.local", Role: "View"}}
		}},
		{"range", "spec.network.egressCIDRs[0]: Invalid value: \"10.0.0.0\"", func(s *spec) { s.Network.EgressCIDRs = []string{"10.0.0.0"} }},
		{"bits", "write 192.0.2.0/24", func(s *spec) { s.Network.IngressCIDRs = []string{"192.0.2.1/24"} }},
		{"inside", "is inside of the cluster", func(s *spec) { s.Network.IngressCIDRs = []string{"10.244.3.0/24"} }},
		{"tags", "spec.registry.immutableTags[0]", func(s *spec) { s.Registry.ImmutableTags = []string{"v*"} }},
		{"retention", "spec.registry.retention[0].keepLast", func(s *spec) { s.Registry.Retention = []atoll.RegistryRetention{{Pattern: "*:*"}} }},
		{"encryption", "spec.encryption.className", func(s *spec) { s.Encryption.ClassName = "x" }},
		{"namespace", "spec.network.fromNamespaces[0]", func(s *spec) { s.Network.FromNamespaces = []string{"A"} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &spec{}
			c.change(s)
			check(t, Spec(s, field.NewPath("spec"), net), c.want)
		})
	}
}

func check(t *testing.T, errs field.ErrorList, want string) {
	t.Helper()
	if want == "" && len(errs) > 0 || want != "" && (len(errs) == 0 || !strings.Contains(errs.ToAggregate().Error(), want)) {
		t.Errorf("errors %v", errs)
	}
}

func TestName(t *testing.T) {
	for name, good := range map[string]bool{"shop": true, "default": false, "library": false, "kube-x": false, "atoll-system": false, "Shop": false, "a.b": false, strings.Repeat("x", 64): false} {
		if errs := Name(name); (len(errs) == 0) != good {
			t.Errorf("%s: %v", name, errs)
		}
	}
}

func TestWithin(t *testing.T) {
	template := spec{
		Resources: atoll.NamespaceResources{
			CPULimit: quantity("4"), MemoryReservation: quantity("1Gi"), MemoryLimit: quantity("8Gi"),
			Counts: atoll.NamespaceCounts{Pods: new(int64(10))},
		},
		StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold", Limit: quantity("10Gi")}},
		VMClasses:      []atoll.NamespaceReference{{Name: "small"}},
		Images:         []string{"registry.atoll.local/shop/**"},
		Zones:          []atoll.NamespaceReference{{Name: "z1"}},
		Network:        atoll.NamespaceNetwork{Isolation: "Isolated", EgressCIDRs: []string{"192.0.2.0/24"}, FromNamespaces: []string{"ops"}},
		Encryption:     atoll.NamespaceEncryption{Required: true},
		Registry:       atoll.NamespaceRegistry{Quota: quantity("1Gi")},
	}
	resolve.Default(&template)
	for _, c := range []struct {
		name, want string
		change     func(*spec)
	}{
		{"same", "", func(*spec) {}},
		{"less", "", func(s *spec) {
			s.Resources.CPULimit, s.Resources.Counts.Pods = quantity("1"), new(int64(1))
			s.Images, s.Network.Isolation, s.Network.EgressCIDRs = []string{"registry.atoll.local/shop/web:*"}, "DenyAll", []string{"192.0.2.128/25"}
		}},
		{"cpu", "spec.resources.cpuLimit", func(s *spec) { s.Resources.CPULimit = quantity("5") }},
		{"cpu reservation", "the template has none", func(s *spec) { s.Resources.CPUReservation = quantity("1") }},
		{"memory reservation", "spec.resources.memoryReservation", func(s *spec) { s.Resources.MemoryReservation = quantity("2Gi") }},
		{"pods", "spec.resources.counts.podCount", func(s *spec) { s.Resources.Counts.Pods = new(int64(11)) }},
		{"class", "spec.vmClasses[0]", func(s *spec) { s.VMClasses = []atoll.NamespaceReference{{Name: "large"}} }},
		{"storage", "spec.storageClasses[0]", func(s *spec) { s.StorageClasses = []atoll.NamespaceStorageClass{{Name: "silver"}} }},
		{"storage limit", "spec.storageClasses[0].limit", func(s *spec) { s.StorageClasses = []atoll.NamespaceStorageClass{{Name: "gold"}} }},
		{"images", "spec.images[0]", func(s *spec) { s.Images = []string{"registry.atoll.local/**"} }},
		{"zone", "spec.zones[0]", func(s *spec) { s.Zones = []atoll.NamespaceReference{{Name: "z2"}} }},
		{"isolation", "spec.network.isolation", func(s *spec) { s.Network.Isolation = "Open" }},
		{"egress", "spec.network.egressCIDRs[0]", func(s *spec) { s.Network.EgressCIDRs = []string{"192.0.0.0/16"} }},
		{"from", "spec.network.fromNamespaces[0]", func(s *spec) { s.Network.FromNamespaces = []string{"other"} }},
		{"encryption", "spec.encryption", func(s *spec) { s.Encryption.Required = false }},
		{"runc", "spec.podRuntime.policy", func(s *spec) { s.PodRuntime.Policy = "Runc" }},
		{"privileged", "spec.podRuntime.privilegedAllowed", func(s *spec) { s.PodRuntime.PrivilegedAllowed = true }},
		{"registry", "spec.registry.quota", func(s *spec) { s.Registry.Quota = quantity("2Gi") }},
		{"priority", "spec.restartPriority", func(s *spec) { s.RestartPriority = "Highest" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := template.DeepCopy()
			c.change(s)
			check(t, Within(s, &template, field.NewPath("spec")), c.want)
		})
	}
}
