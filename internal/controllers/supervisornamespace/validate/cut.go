package validate

import (
	"slices"

	"k8s.io/apimachinery/pkg/api/resource"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/resolve"
)

// Cut makes a spec as narrow as its template where it is wider, so that Within has nothing to say of it: numbers become
// those of the template, lists lose what the template does not have, and one of which nothing is left becomes the
// template's. Both are complete, as in Within.
func Cut(spec, template *atoll.SupervisorNamespaceSpec) {
	cutResources(&spec.Resources, &template.Resources)
	spec.StorageClasses = keep(spec.StorageClasses, template.StorageClasses, func(c atoll.NamespaceStorageClass) bool {
		return slices.ContainsFunc(template.StorageClasses, func(t atoll.NamespaceStorageClass) bool { return t.Name == c.Name })
	})
	for i := range spec.StorageClasses {
		cutStorage(&spec.StorageClasses[i], template.StorageClasses)
		spec.StorageClasses[i].Limit = atMost(spec.StorageClasses[i].Limit, spec.Resources.StorageRequestLimit)
	}
	spec.VMClasses = keep(spec.VMClasses, template.VMClasses, func(r atoll.NamespaceReference) bool { return slices.Contains(template.VMClasses, r) })
	spec.ContentSources = keep(spec.ContentSources, template.ContentSources, func(c atoll.NamespaceContentSource) bool { return slices.Contains(template.ContentSources, c) })
	spec.Zones = keep(spec.Zones, template.Zones, func(r atoll.NamespaceReference) bool { return slices.Contains(template.Zones, r) })
	spec.Hosts = keep(spec.Hosts, template.Hosts, func(h string) bool { return slices.Contains(template.Hosts, h) })
	spec.Images = keep(spec.Images, template.Images, func(p string) bool {
		return slices.ContainsFunc(template.Images, func(t string) bool { return narrower(p, t) })
	})
	cutNetwork(&spec.Network, &template.Network)
	if e := template.Encryption; e.Required && (!spec.Encryption.Required || e.ClassName != "" && spec.Encryption.ClassName != e.ClassName) {
		spec.Encryption = e
	}
	if template.PodRuntime.Policy != atoll.RuntimeRunc {
		spec.PodRuntime.Policy = template.PodRuntime.Policy
	}
	spec.PodRuntime.PrivilegedAllowed = spec.PodRuntime.PrivilegedAllowed && template.PodRuntime.PrivilegedAllowed
	spec.Registry.Quota = bounded(spec.Registry.Quota, template.Registry.Quota)
	if slices.Index(priorities(), spec.RestartPriority) > slices.Index(priorities(), template.RestartPriority) {
		spec.RestartPriority = template.RestartPriority
	}
}

// bounded is a quantity, or its bound if it is none or above it.
func bounded(value, bound *resource.Quantity) *resource.Quantity {
	if bound != nil && (value == nil || value.Cmp(*bound) > 0) {
		return new(bound.DeepCopy())
	}
	return value
}

// atMost is bounded for a quantity that need not be given.
func atMost(value, bound *resource.Quantity) *resource.Quantity {
	if value == nil {
		return nil
	}
	return bounded(value, bound)
}

// keep is a list without what is not allowed. A template without a list allows everything.
func keep[T any](list, template []T, allowed func(T) bool) []T {
	if template == nil {
		return list
	}
	var out []T
	for _, x := range list {
		if allowed(x) {
			out = append(out, x)
		}
	}
	if len(out) == 0 {
		return slices.Clone(template)
	}
	return out
}

func cutResources(r, t *atoll.NamespaceResources) {
	r.CPULimit = bounded(r.CPULimit, t.CPULimit)
	r.MemoryLimit = bounded(r.MemoryLimit, t.MemoryLimit)
	r.StorageRequestLimit = bounded(r.StorageRequestLimit, t.StorageRequestLimit)
	mine, theirs := resolve.Counts(&r.Counts), resolve.Counts(&t.Counts)
	for i := range mine {
		value, bound := *mine[i].Value, *theirs[i].Value
		if bound != nil && (value == nil || *value > *bound) {
			*mine[i].Value = new(*bound)
		}
	}
	reservation := func(value, bound *resource.Quantity) *resource.Quantity {
		if bound == nil {
			return nil
		}
		return atMost(value, bound)
	}
	r.CPUReservation = atMost(reservation(r.CPUReservation, t.CPUReservation), r.CPULimit)
	r.MemoryReservation = atMost(reservation(r.MemoryReservation, t.MemoryReservation), r.MemoryLimit)
	r.CPULimitDefault = atMost(r.CPULimitDefault, r.CPULimit)
	r.MemoryLimitDefault = atMost(r.MemoryLimitDefault, r.MemoryLimit)
	r.CPURequestDefault = atMost(atMost(r.CPURequestDefault, r.CPULimitDefault), r.CPULimit)
	r.MemoryRequestDefault = atMost(atMost(r.MemoryRequestDefault, r.MemoryLimitDefault), r.MemoryLimit)
}

// cutStorage cuts one policy to that of the same name.
func cutStorage(c *atoll.NamespaceStorageClass, template []atoll.NamespaceStorageClass) {
	n := slices.IndexFunc(template, func(t atoll.NamespaceStorageClass) bool { return t.Name == c.Name })
	if n < 0 {
		return // the template has no list
	}
	c.Limit = bounded(c.Limit, template[n].Limit)
	c.VolumeAttributesClasses = slices.DeleteFunc(c.VolumeAttributesClasses, func(v string) bool {
		return !slices.Contains(template[n].VolumeAttributesClasses, v)
	})
}

func cutNetwork(n, t *atoll.NamespaceNetwork) {
	if slices.Index(isolations(), n.Isolation) < slices.Index(isolations(), t.Isolation) {
		n.Isolation = t.Isolation
	}
	cidrs := func(list, was []string) []string {
		switch {
		case was == nil && t.Isolation != atoll.IsolationDenyAll:
			return list
		case was == nil:
			return nil
		}
		return keep(list, was, func(c string) bool { return slices.ContainsFunc(was, func(w string) bool { return contains(w, c) }) })
	}
	n.IngressCIDRs, n.EgressCIDRs = cidrs(n.IngressCIDRs, t.IngressCIDRs), cidrs(n.EgressCIDRs, t.EgressCIDRs)
	if t.Isolation == atoll.IsolationOpen {
		return
	}
	n.FromNamespaces, n.ToNamespaces = exceptions(n.FromNamespaces, t.FromNamespaces), exceptions(n.ToNamespaces, t.ToNamespaces)
}

// exceptions are those that both lists have, nil for none.
func exceptions(list, template []string) []string {
	var out []string
	for _, name := range list {
		if slices.Contains(template, name) {
			out = append(out, name)
		}
	}
	return out
}
