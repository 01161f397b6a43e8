// Package validate says what is wrong with a spec of a SupervisorNamespace or of a template.
//
// It is pure and looks at the spec alone. What the cluster may get later (classes, content libraries, hosts, people) is
// for the controller to name in a condition. Every error names the field and the way out. A list that is given but empty
// is refused, since it could be taken for "nothing" and for "everything".
package validate

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
)

// Network is what addresses inside of the cluster are.
type Network struct {
	Inside []netip.Prefix
}

// Name refuses names of the system's own namespaces.
func Name(name string) field.ErrorList {
	at := field.NewPath("metadata", "name")
	var errs field.ErrorList
	for _, problem := range validation.IsDNS1123Label(name) {
		errs = append(errs, field.Invalid(at, name, "becomes the name of the Namespace: "+problem))
	}
	if atoll.SystemNamespace(name) {
		errs = append(errs, field.Invalid(at, name, "is the name of one of the system's own namespaces (default, library, kube-*, atoll-*, vmware-system-*): choose another"))
	}
	return errs
}

// Spec looks at a spec. What comes from a template is in it already where the whole is to be checked.
func Spec(spec *atoll.SupervisorNamespaceSpec, at *field.Path, net Network) field.ErrorList {
	var errs field.ErrorList
	errs = append(errs, resources(&spec.Resources, at.Child("resources"))...)
	errs = append(errs, lists(spec, at)...)
	errs = append(errs, storage(spec, at)...)
	errs = append(errs, accessList(spec.AccessList, at.Child("accessList"))...)
	errs = append(errs, network(&spec.Network, at.Child("network"), net)...)
	errs = append(errs, registry(&spec.Registry, at.Child("registry"))...)
	if !spec.Encryption.Required && spec.Encryption.ClassName != "" {
		errs = append(errs, field.Invalid(at.Child("encryption", "className"), spec.Encryption.ClassName, "has no effect unless encryption.required is true: set that, or leave this out"))
	}
	return errs
}

// pair is a quantity and one that it must not be above.
type pair struct {
	name  string
	value *resource.Quantity
	bound string
	most  *resource.Quantity
}

func resources(r *atoll.NamespaceResources, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	for _, p := range []pair{
		{"cpuLimit", r.CPULimit, "", nil},
		{"memoryLimit", r.MemoryLimit, "", nil},
		{"storageRequestLimit", r.StorageRequestLimit, "", nil},
		{"cpuReservation", r.CPUReservation, "cpuLimit", r.CPULimit},
		{"memoryReservation", r.MemoryReservation, "memoryLimit", r.MemoryLimit},
		{"cpuLimitDefault", r.CPULimitDefault, "cpuLimit", r.CPULimit},
		{"memoryLimitDefault", r.MemoryLimitDefault, "memoryLimit", r.MemoryLimit},
		{"cpuRequestDefault", r.CPURequestDefault, "cpuLimitDefault", r.CPULimitDefault},
		{"cpuRequestDefault", r.CPURequestDefault, "cpuLimit", r.CPULimit},
		{"memoryRequestDefault", r.MemoryRequestDefault, "memoryLimitDefault", r.MemoryLimitDefault},
		{"memoryRequestDefault", r.MemoryRequestDefault, "memoryLimit", r.MemoryLimit},
	} {
		switch {
		case p.value == nil:
		case p.value.Sign() < 0:
			errs = append(errs, field.Invalid(at.Child(p.name), p.value.String(), "must not be negative"))
		case p.most != nil && p.value.Cmp(*p.most) > 0:
			errs = append(errs, field.Invalid(at.Child(p.name), p.value.String(), fmt.Sprintf("is above %s, which is %s: lower this or raise that", p.bound, p.most)))
		}
	}
	for _, d := range []pair{{name: "cpuLimitDefault", value: r.CPULimitDefault}, {name: "memoryLimitDefault", value: r.MemoryLimitDefault}} {
		if d.value != nil && d.value.IsZero() {
			errs = append(errs, field.Invalid(at.Child(d.name), "0", "no container could run with it: leave it out, or give more"))
		}
	}
	for _, c := range resolve.Counts(&r.Counts) {
		if v := *c.Value; v != nil && *v < 0 {
			errs = append(errs, field.Invalid(at.Child("counts", c.Field), *v, "must not be negative"))
		}
	}
	return dedupe(errs)
}

// dedupe keeps the first error of each field.
func dedupe(errs field.ErrorList) field.ErrorList {
	var out field.ErrorList
	for _, e := range errs {
		if !slices.ContainsFunc(out, func(o *field.Error) bool { return o.Field == e.Field }) {
			out = append(out, e)
		}
	}
	return out
}

// lists refuses lists that are empty, names that nothing can have, and repetitions.
func lists(spec *atoll.SupervisorNamespaceSpec, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	check := func(child string, given bool, names []string, syntax func(string) []string) {
		here := at.Child(strings.Split(child, ".")[0])
		for _, more := range strings.Split(child, ".")[1:] {
			here = here.Child(more)
		}
		if given && len(names) == 0 {
			errs = append(errs, field.Invalid(here, "[]", "an empty list is ambiguous: leave it out to bound nothing, or name at least one"))
		}
		for i, name := range names {
			if slices.Contains(names[:i], name) {
				errs = append(errs, field.Duplicate(here.Index(i), name))
			}
			for _, problem := range syntax(name) {
				errs = append(errs, field.Invalid(here.Index(i), name, problem))
			}
		}
	}
	check("storageClasses", spec.StorageClasses != nil, names(spec.StorageClasses, func(c atoll.NamespaceStorageClass) string { return c.Name }), subdomain)
	check("vmClasses", spec.VMClasses != nil, names(spec.VMClasses, refName), subdomain)
	check("contentSources", spec.ContentSources != nil, names(spec.ContentSources, func(c atoll.NamespaceContentSource) string { return c.Name }), subdomain)
	check("zones", spec.Zones != nil, names(spec.Zones, refName), validation.IsValidLabelValue)
	check("hosts", spec.Hosts != nil, spec.Hosts, subdomain)
	check("images", spec.Images != nil, spec.Images, pattern)
	check("network.fromNamespaces", spec.Network.FromNamespaces != nil, spec.Network.FromNamespaces, validation.IsDNS1123Label)
	check("network.toNamespaces", spec.Network.ToNamespaces != nil, spec.Network.ToNamespaces, validation.IsDNS1123Label)
	return errs
}

func names[T any](list []T, name func(T) string) []string {
	var out []string
	for _, x := range list {
		out = append(out, name(x))
	}
	return out
}

func refName(r atoll.NamespaceReference) string { return r.Name }

func subdomain(s string) []string { return validation.IsDNS1123Subdomain(s) }

// pattern says what is wrong with a pattern of names.
func pattern(p string) []string {
	if p == "" || strings.TrimSpace(p) != p {
		return []string{"must not be empty or have spaces around it"}
	}
	for part := range strings.SplitSeq(p, "/") {
		if strings.Contains(part, "**") && part != "**" {
			return []string{"** stands for whole parts between slashes only, as in registry.atoll.local/shop/**"}
		}
		if part == "**" {
			continue
		}
		if _, err := path.Match(part, ""); err != nil {
			return []string{"is no pattern (path.Match): " + err.Error()}
		}
	}
	return nil
}

func storage(spec *atoll.SupervisorNamespaceSpec, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	total := spec.Resources.StorageRequestLimit
	for i, c := range spec.StorageClasses {
		here := at.Child("storageClasses").Index(i).Child("limit")
		switch {
		case c.Limit == nil:
		case c.Limit.Sign() < 0:
			errs = append(errs, field.Invalid(here, c.Limit.String(), "must not be negative"))
		case total != nil && c.Limit.Cmp(*total) > 0:
			errs = append(errs, field.Invalid(here, c.Limit.String(), fmt.Sprintf("is above resources.storageRequestLimit, which is %s: lower this or raise that", total)))
		}
	}
	return errs
}

func accessList(list []atoll.NamespaceAccess, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	seen := map[string]int{}
	for i, a := range list {
		domain := a.Domain
		if domain == "" {
			domain = atoll.LocalDomain
		}
		if strings.ContainsAny(domain, "@: \t\n") {
			errs = append(errs, field.Invalid(at.Index(i).Child("domain"), domain, "must be the name of a domain, such as "+atoll.LocalDomain))
		}
		who := a.SubjectType + " " + a.Subject + "@" + domain
		if before, ok := seen[who]; ok {
			errs = append(errs, field.Duplicate(at.Index(i), fmt.Sprintf("%s is in entry %d already with role %s: keep one of them", who, before, list[before].Role)))
			continue
		}
		seen[who] = i
	}
	return errs
}

func network(n *atoll.NamespaceNetwork, at *field.Path, net Network) field.ErrorList {
	var errs field.ErrorList
	for _, list := range []struct {
		name  string
		cidrs []string
	}{{"ingressCIDRs", n.IngressCIDRs}, {"egressCIDRs", n.EgressCIDRs}} {
		if list.cidrs != nil && len(list.cidrs) == 0 {
			errs = append(errs, field.Invalid(at.Child(list.name), "[]", "an empty list is ambiguous: leave it out, or set isolation DenyAll to allow nothing"))
		}
		for i, c := range list.cidrs {
			if problem := cidr(c, net); problem != "" {
				errs = append(errs, field.Invalid(at.Child(list.name).Index(i), c, problem))
			}
			if slices.Contains(list.cidrs[:i], c) {
				errs = append(errs, field.Duplicate(at.Child(list.name).Index(i), c))
			}
		}
	}
	return errs
}

func cidr(text string, net Network) string {
	prefix, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		return "must be a range of addresses such as 192.0.2.0/24"
	case prefix != prefix.Masked():
		return fmt.Sprintf("has bits set behind its length: write %s", prefix.Masked())
	}
	for _, inside := range net.Inside {
		if inside.Contains(prefix.Addr()) && prefix.Bits() >= inside.Bits() {
			return fmt.Sprintf("is inside of the cluster (%s): use fromNamespaces and toNamespaces for that", inside)
		}
	}
	return ""
}

func registry(r *atoll.NamespaceRegistry, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	if r.Quota != nil && r.Quota.Sign() < 0 {
		errs = append(errs, field.Invalid(at.Child("quota"), r.Quota.String(), "must not be negative"))
	}
	for i, p := range r.ImmutableTags {
		for _, problem := range tagPattern(p) {
			errs = append(errs, field.Invalid(at.Child("immutableTags").Index(i), p, problem))
		}
	}
	for i, rule := range r.Retention {
		here := at.Child("retention").Index(i)
		for _, problem := range tagPattern(rule.Pattern) {
			errs = append(errs, field.Invalid(here.Child("pattern"), rule.Pattern, problem))
		}
		if rule.KeepLast < 1 {
			errs = append(errs, field.Invalid(here.Child("keepLast"), rule.KeepLast, "must be at least 1"))
		}
	}
	return errs
}

func tagPattern(p string) []string {
	if strings.Count(p, ":") != 1 || strings.HasPrefix(p, ":") || strings.HasSuffix(p, ":") {
		return []string{"must be a pattern of repository:tag, such as app/*:v*"}
	}
	if _, err := path.Match(p, ""); err != nil {
		return []string{"is no pattern (path.Match): " + err.Error()}
	}
	return nil
}
