package resolve

import (
	"errors"
	"reflect"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

func quantity(s string) *resource.Quantity { return new(resource.MustParse(s)) }

func template(name, base string, spec atoll.SupervisorNamespaceSpec) *atoll.SupervisorNamespaceTemplate {
	return &atoll.SupervisorNamespaceTemplate{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       atoll.SupervisorNamespaceTemplateSpec{BasedOn: base, Template: spec},
	}
}

func find(list ...*atoll.SupervisorNamespaceTemplate) Templates {
	return func(name string) *atoll.SupervisorNamespaceTemplate {
		if i := slices.IndexFunc(list, func(t *atoll.SupervisorNamespaceTemplate) bool { return t.Name == name }); i >= 0 {
			return list[i]
		}
		return nil
	}
}

func TestChain(t *testing.T) {
	templates := find(template("a", "b", atoll.SupervisorNamespaceSpec{}), template("b", "c", atoll.SupervisorNamespaceSpec{}),
		template("c", "a", atoll.SupervisorNamespaceSpec{}), template("d", "nothing", atoll.SupervisorNamespaceSpec{}))
	if _, err := Chain("a", templates); !errors.Is(err, ErrCycle) || err.Error() != "templates are based on each other: a -> b -> c -> a" {
		t.Errorf("error %v", err)
	}
	if _, err := Chain("d", templates); !errors.Is(err, ErrUnknown) {
		t.Errorf("error %v", err)
	}
	if chain, err := Chain("", templates); err != nil || chain != nil {
		t.Errorf("%v, %v", chain, err)
	}
}

func TestEffective(t *testing.T) {
	base := template("base", "", atoll.SupervisorNamespaceSpec{
		Description: "base",
		Resources: atoll.NamespaceResources{
			CPULimit: quantity("8"), MemoryLimit: quantity("16Gi"), MemoryLimitDefault: quantity("1Gi"), MemoryRequestDefault: quantity("1Gi"),
			MemoryReservation: quantity("4Gi"), Counts: atoll.NamespaceCounts{Pods: new(int64(50)), Services: new(int64(5))},
		},
		StorageClasses: []atoll.NamespaceStorageClass{{Name: "gold", Limit: quantity("100Gi")}},
		AccessList:     []atoll.NamespaceAccess{{SubjectType: "Group", Subject: "auditors", Domain: "atoll.local", Role: "View"}},
		Network:        atoll.NamespaceNetwork{Isolation: "Isolated"},
		Encryption:     atoll.NamespaceEncryption{Required: true},
		Registry:       atoll.NamespaceRegistry{ImmutableTags: []string{"*:v*"}},
	})
	middle := template("middle", "base", atoll.SupervisorNamespaceSpec{
		Resources: atoll.NamespaceResources{CPULimit: quantity("4")}, VMClasses: []atoll.NamespaceReference{{Name: "small"}},
	})
	spec := &atoll.SupervisorNamespaceSpec{
		ClassName: "middle",
		Resources: atoll.NamespaceResources{
			MemoryLimit: quantity("512Mi"), StorageRequestLimit: quantity("10Gi"), Counts: atoll.NamespaceCounts{Pods: new(int64(10))},
		},
		AccessList: []atoll.NamespaceAccess{{SubjectType: "User", Subject: "olga", Role: "Owner"}},
	}
	before := spec.DeepCopy()
	got, err := Effective(spec, find(base, middle))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(spec, before) {
		t.Error("the spec was changed")
	}
	r := got.Resources
	for _, c := range []struct{ what, got, want string }{
		{"cpuLimit", r.CPULimit.String(), "4"},
		{"memoryLimit", r.MemoryLimit.String(), "512Mi"},
		{"memoryLimitDefault", r.MemoryLimitDefault.String(), "512Mi"},
		{"memoryRequestDefault", r.MemoryRequestDefault.String(), "512Mi"},
		{"memoryReservation", r.MemoryReservation.String(), "512Mi"},
		{"storage class", got.StorageClasses[0].Limit.String(), "10Gi"},
		{"isolation", got.Network.Isolation, "Isolated"},
		{"policy", got.PodRuntime.Policy, "MicroVM"},
		{"priority", got.RestartPriority, "Medium"},
		{"description", got.Description, "base"},
		{"class", got.VMClasses[0].Name, "small"},
		{"domain", got.AccessList[0].Domain, "atoll.local"},
		{"auditors", got.AccessList[1].Subject, "auditors"},
		{"tags", got.Registry.ImmutableTags[0], "*:v*"},
	} {
		if c.got != c.want {
			t.Errorf("%s is %q, not %q", c.what, c.got, c.want)
		}
	}
	if *r.Counts.Pods != 10 || *r.Counts.Services != 5 || !got.Encryption.Required {
		t.Errorf("%+v", got)
	}
}
