package validate

import (
	"cmp"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
)

// Within says where a spec is wider than its template. Both are complete: spec is the effective one, template is what
// the template says with all it is based on, and with the defaults.
func Within(spec, template *atoll.SupervisorNamespaceSpec, at *field.Path) field.ErrorList {
	b := bounds{}
	b.resources(&spec.Resources, &template.Resources, at.Child("resources"))
	b.storage(spec, template, at.Child("storageClasses"))
	subset(&b, "vmClasses", spec.VMClasses, template.VMClasses, at, refName)
	subset(&b, "contentSources", spec.ContentSources, template.ContentSources, at, func(c atoll.NamespaceContentSource) string { return c.Type + "/" + c.Name })
	subset(&b, "zones", spec.Zones, template.Zones, at, refName)
	subset(&b, "hosts", spec.Hosts, template.Hosts, at, func(s string) string { return s })
	if template.Images != nil {
		for i, p := range spec.Images {
			if !slices.ContainsFunc(template.Images, func(t string) bool { return narrower(p, t) }) {
				b.add(at.Child("images").Index(i), p, "is wider than what the template allows: "+strings.Join(template.Images, ", "))
			}
		}
	}
	b.network(&spec.Network, &template.Network, at.Child("network"))
	if template.Encryption.Required && (!spec.Encryption.Required || template.Encryption.ClassName != "" && spec.Encryption.ClassName != template.Encryption.ClassName) {
		b.add(at.Child("encryption"), spec.Encryption.ClassName, fmt.Sprintf("the template demands encryption by class %q", template.Encryption.ClassName))
	}
	if spec.PodRuntime.Policy == atoll.RuntimeRunc && template.PodRuntime.Policy != atoll.RuntimeRunc {
		b.add(at.Child("podRuntime", "policy"), spec.PodRuntime.Policy, "the template allows micro-VMs only")
	}
	if spec.PodRuntime.PrivilegedAllowed && !template.PodRuntime.PrivilegedAllowed {
		b.add(at.Child("podRuntime", "privilegedAllowed"), true, "the template does not allow privileged containers")
	}
	b.most(at.Child("registry", "quota"), spec.Registry.Quota, template.Registry.Quota, false)
	if slices.Index(priorities(), spec.RestartPriority) > slices.Index(priorities(), template.RestartPriority) {
		b.add(at.Child("restartPriority"), spec.RestartPriority, "is above that of the template, which is "+template.RestartPriority)
	}
	return b.errs
}

func priorities() []string { return []string{"Lowest", "Low", "Medium", "High", "Highest"} }

// isolations are the modes, the strictest last.
func isolations() []string {
	return []string{atoll.IsolationOpen, atoll.IsolationIsolated, atoll.IsolationDenyAll}
}

type bounds struct{ errs field.ErrorList }

func (b *bounds) add(at *field.Path, value any, why string) {
	b.errs = append(b.errs, field.Invalid(at, value, why))
}

// most wants a quantity not to be above another. Without the other one there is no bound, or with none allowed nothing
// may be given.
func (b *bounds) most(at *field.Path, value, bound *resource.Quantity, noneAllowed bool) {
	switch {
	case bound == nil && noneAllowed && value != nil && !value.IsZero():
		b.add(at, value.String(), "the template has none: leave it out")
	case bound != nil && value == nil:
		b.add(at, "", "the template has "+bound.String())
	case bound != nil && value.Cmp(*bound) > 0:
		b.add(at, value.String(), "is above that of the template, which is "+bound.String())
	}
}

func (b *bounds) resources(r, t *atoll.NamespaceResources, at *field.Path) {
	b.most(at.Child("cpuLimit"), r.CPULimit, t.CPULimit, false)
	b.most(at.Child("memoryLimit"), r.MemoryLimit, t.MemoryLimit, false)
	b.most(at.Child("storageRequestLimit"), r.StorageRequestLimit, t.StorageRequestLimit, false)
	if r.CPUReservation != nil {
		b.most(at.Child("cpuReservation"), r.CPUReservation, t.CPUReservation, true)
	}
	if r.MemoryReservation != nil {
		b.most(at.Child("memoryReservation"), r.MemoryReservation, t.MemoryReservation, true)
	}
	mine, theirs := resolve.Counts(&r.Counts), resolve.Counts(&t.Counts)
	for i, c := range mine {
		value, bound := *c.Value, *theirs[i].Value
		if bound != nil && (value == nil || *value > *bound) {
			given := int64(-1)
			if value != nil {
				given = *value
			}
			b.add(at.Child("counts", c.Field), given, fmt.Sprintf("is above that of the template, which is %d", *bound))
		}
	}
}

func (b *bounds) storage(spec, template *atoll.SupervisorNamespaceSpec, at *field.Path) {
	if template.StorageClasses == nil {
		return
	}
	for i, c := range spec.StorageClasses {
		n := slices.IndexFunc(template.StorageClasses, func(t atoll.NamespaceStorageClass) bool { return t.Name == c.Name })
		if n < 0 {
			b.add(at.Index(i), c.Name, "is not in the template, which has "+strings.Join(names(template.StorageClasses, func(c atoll.NamespaceStorageClass) string { return c.Name }), ", "))
			continue
		}
		b.most(at.Index(i).Child("limit"), c.Limit, template.StorageClasses[n].Limit, false)
		for j, v := range c.VolumeAttributesClasses {
			if allowed := template.StorageClasses[n].VolumeAttributesClasses; !slices.Contains(allowed, v) {
				b.add(at.Index(i).Child("volumeAttributesClasses").Index(j), v, "is not in the template, which has "+cmp.Or(strings.Join(allowed, ", "), "none"))
			}
		}
	}
}

// subset wants every name of a list to be in the template's, if that has a list.
func subset[T any](b *bounds, child string, list, template []T, at *field.Path, name func(T) string) {
	if template == nil {
		return
	}
	allowed := names(template, name)
	for i, x := range list {
		if !slices.Contains(allowed, name(x)) {
			b.add(at.Child(child).Index(i), name(x), "is not in the template, which has "+strings.Join(allowed, ", "))
		}
	}
}

// narrower tells whether everything that p stands for is for certain what t stands for, too.
func narrower(p, t string) bool {
	if p == t {
		return true
	}
	if prefix, deep := strings.CutSuffix(t, "/**"); deep && !strings.ContainsAny(prefix, `*?[\`) {
		return strings.HasPrefix(p, prefix+"/")
	}
	if strings.ContainsAny(p, `*?[\`) {
		return false
	}
	ok, err := path.Match(t, p)
	return ok && err == nil
}

func (b *bounds) network(n, t *atoll.NamespaceNetwork, at *field.Path) {
	if slices.Index(isolations(), n.Isolation) < slices.Index(isolations(), t.Isolation) {
		b.add(at.Child("isolation"), n.Isolation, "is wider than that of the template, which is "+t.Isolation)
	}
	for _, d := range []struct {
		name       string
		cidrs, was []string
	}{{"ingressCIDRs", n.IngressCIDRs, t.IngressCIDRs}, {"egressCIDRs", n.EgressCIDRs, t.EgressCIDRs}} {
		if d.was == nil && t.Isolation != atoll.IsolationDenyAll {
			continue // anything outside of the cluster
		}
		for i, c := range d.cidrs {
			if !slices.ContainsFunc(d.was, func(w string) bool { return contains(w, c) }) {
				b.add(at.Child(d.name).Index(i), c, fmt.Sprintf("is not within the template's: %s", strings.Join(d.was, ", ")))
			}
		}
	}
	if t.Isolation == atoll.IsolationOpen {
		return
	}
	for _, d := range []struct {
		name       string
		names, was []string
	}{{"fromNamespaces", n.FromNamespaces, t.FromNamespaces}, {"toNamespaces", n.ToNamespaces, t.ToNamespaces}} {
		for i, ns := range d.names {
			if !slices.Contains(d.was, ns) {
				b.add(at.Child(d.name).Index(i), ns, "is not an exception that the template has")
			}
		}
	}
}

func contains(outer, inner string) bool {
	o, err := netip.ParsePrefix(outer)
	if err != nil {
		return false
	}
	i, err := netip.ParsePrefix(inner)
	return err == nil && o.Bits() <= i.Bits() && o.Contains(i.Addr())
}
