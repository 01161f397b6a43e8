// Package resolve says what a SupervisorNamespace is bounded by, once its template has been taken into account.
//
// What the spec does not say comes from the template that it names, and what that does not say from the one it is based
// on. Who has access is the union of all of them, and so are immutable tags; encryption that one demands is demanded, and
// privileged containers that one allows are allowed. A default, a reservation or the limit of a storage class that comes
// from a template is cut to the limits of the spec, which may be lower.
//
// It is pure; the controller and the webhooks of SupervisorNamespaces call it. What can go wrong: a template that is not
// there, and templates that are based on each other.
package resolve

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// Errors of templates.
var (
	ErrUnknown = errors.New("unknown template")
	ErrCycle   = errors.New("templates are based on each other")
)

// Templates finds a template by name, nil when there is none.
type Templates func(name string) *atoll.SupervisorNamespaceTemplate

// Chain lists a template and those that it is based on, the nearest first.
func Chain(name string, find Templates) ([]*atoll.SupervisorNamespaceTemplate, error) {
	var out []*atoll.SupervisorNamespaceTemplate
	var names []string
	for name != "" {
		if slices.Contains(names, name) {
			return nil, fmt.Errorf("%w: %s", ErrCycle, strings.Join(append(names, name), " -> "))
		}
		names = append(names, name)
		t := find(name)
		if t == nil {
			return nil, fmt.Errorf("%w: SupervisorNamespaceTemplate %q does not exist", ErrUnknown, name)
		}
		out = append(out, t)
		name = t.Spec.BasedOn
	}
	return out, nil
}

// Template is what a template says with all that it is based on, without defaults.
func Template(name string, find Templates) (*atoll.SupervisorNamespaceSpec, error) {
	chain, err := Chain(name, find)
	if err != nil {
		return nil, err
	}
	out := &atoll.SupervisorNamespaceSpec{}
	for _, t := range chain {
		merge(out, &t.Spec.Template)
	}
	return out, nil
}

// Effective is a spec with what comes from its template, and with all defaults.
func Effective(spec *atoll.SupervisorNamespaceSpec, find Templates) (*atoll.SupervisorNamespaceSpec, error) {
	out := spec.DeepCopy()
	if spec.ClassName != "" {
		base, err := Template(spec.ClassName, find)
		if err != nil {
			return nil, err
		}
		merge(out, base)
	}
	Default(out)
	return out, nil
}

// Default fills in what a spec must say.
func Default(spec *atoll.SupervisorNamespaceSpec) {
	setDefault(&spec.Network.Isolation, atoll.IsolationOpen)
	setDefault(&spec.PodRuntime.Policy, atoll.RuntimeMicroVM)
	setDefault(&spec.RestartPriority, "Medium")
	for i := range spec.ContentSources {
		setDefault(&spec.ContentSources[i].Type, "ClusterContentLibrary")
	}
	for i := range spec.AccessList {
		setDefault(&spec.AccessList[i].Domain, atoll.LocalDomain)
	}
}

func setDefault(value *string, otherwise string) {
	if *value == "" {
		*value = otherwise
	}
}

// merge fills in from base what out does not say.
func merge(out, base *atoll.SupervisorNamespaceSpec) {
	base = base.DeepCopy()
	setDefault(&out.Description, base.Description)
	mergeResources(&out.Resources, &base.Resources)
	if out.StorageClasses == nil {
		out.StorageClasses = base.StorageClasses
		for i := range out.StorageClasses {
			out.StorageClasses[i].Limit = least(out.StorageClasses[i].Limit, out.Resources.StorageRequestLimit)
		}
	}
	if out.VMClasses == nil {
		out.VMClasses = base.VMClasses
	}
	if out.ContentSources == nil {
		out.ContentSources = base.ContentSources
	}
	if out.Images == nil {
		out.Images = base.Images
	}
	for _, a := range base.AccessList {
		if !slices.Contains(out.AccessList, a) {
			out.AccessList = append(out.AccessList, a)
		}
	}
	if out.Zones == nil {
		out.Zones = base.Zones
	}
	if out.Hosts == nil {
		out.Hosts = base.Hosts
	}
	mergeNetwork(&out.Network, &base.Network)
	out.Encryption.Required = out.Encryption.Required || base.Encryption.Required
	setDefault(&out.Encryption.ClassName, base.Encryption.ClassName)
	setDefault(&out.PodRuntime.Policy, base.PodRuntime.Policy)
	out.PodRuntime.PrivilegedAllowed = out.PodRuntime.PrivilegedAllowed || base.PodRuntime.PrivilegedAllowed
	out.Registry.Quota = first(out.Registry.Quota, base.Registry.Quota)
	for _, p := range base.Registry.ImmutableTags {
		if !slices.Contains(out.Registry.ImmutableTags, p) {
			out.Registry.ImmutableTags = append(out.Registry.ImmutableTags, p)
		}
	}
	if out.Registry.Retention == nil {
		out.Registry.Retention = base.Registry.Retention
	}
	setDefault(&out.RestartPriority, base.RestartPriority)
}

func mergeNetwork(out, base *atoll.NamespaceNetwork) {
	setDefault(&out.Isolation, base.Isolation)
	if out.IngressCIDRs == nil {
		out.IngressCIDRs = base.IngressCIDRs
	}
	if out.EgressCIDRs == nil {
		out.EgressCIDRs = base.EgressCIDRs
	}
	if out.FromNamespaces == nil {
		out.FromNamespaces = base.FromNamespaces
	}
	if out.ToNamespaces == nil {
		out.ToNamespaces = base.ToNamespaces
	}
}

func mergeResources(out, base *atoll.NamespaceResources) {
	out.CPULimit = first(out.CPULimit, base.CPULimit)
	out.MemoryLimit = first(out.MemoryLimit, base.MemoryLimit)
	out.StorageRequestLimit = first(out.StorageRequestLimit, base.StorageRequestLimit)
	out.CPUReservation = first(out.CPUReservation, least(base.CPUReservation, out.CPULimit))
	out.MemoryReservation = first(out.MemoryReservation, least(base.MemoryReservation, out.MemoryLimit))
	out.CPULimitDefault = first(out.CPULimitDefault, least(base.CPULimitDefault, out.CPULimit))
	out.MemoryLimitDefault = first(out.MemoryLimitDefault, least(base.MemoryLimitDefault, out.MemoryLimit))
	out.CPURequestDefault = first(out.CPURequestDefault, least(base.CPURequestDefault, first(out.CPULimitDefault, out.CPULimit)))
	out.MemoryRequestDefault = first(out.MemoryRequestDefault, least(base.MemoryRequestDefault, first(out.MemoryLimitDefault, out.MemoryLimit)))
	mine, theirs := Counts(&out.Counts), Counts(&base.Counts)
	for i := range mine {
		if *mine[i].Value == nil {
			*mine[i].Value = *theirs[i].Value
		}
	}
}

// Count is one bound of a number of objects.
type Count struct {
	// Field is its name in the spec.
	Field string
	// Resource is the resource that is counted, for people.
	Resource string
	// Quota is its name in a ResourceQuota.
	Quota string
	Value **int64
}

// Counts lists the fields of counts, always in the same order.
func Counts(c *atoll.NamespaceCounts) []Count {
	return []Count{
		{"podCount", "pods", "pods", &c.Pods},
		{"virtualMachineCount", "virtualmachines", "count/virtualmachines.vmoperator.vmware.com", &c.VirtualMachines},
		{"serviceCount", "services", "count/services", &c.Services},
		{"deploymentCount", "deployments", "count/deployments.apps", &c.Deployments},
		{"daemonSetCount", "daemonsets", "count/daemonsets.apps", &c.DaemonSets},
		{"replicaSetCount", "replicasets", "count/replicasets.apps", &c.ReplicaSets},
		{"replicationControllerCount", "replicationcontrollers", "count/replicationcontrollers", &c.ReplicationControllers},
		{"statefulSetCount", "statefulsets", "count/statefulsets.apps", &c.StatefulSets},
		{"jobCount", "jobs", "count/jobs.batch", &c.Jobs},
		{"configMapCount", "configmaps", "count/configmaps", &c.ConfigMaps},
		{"secretCount", "secrets", "count/secrets", &c.Secrets},
		{"persistentVolumeClaimCount", "persistentvolumeclaims", "count/persistentvolumeclaims", &c.PersistentVolumeClaims},
		{"volumeSnapshotCount", "volumesnapshots", "count/volumesnapshots.snapshot.storage.k8s.io", &c.VolumeSnapshots},
		{"virtualMachineSnapshotCount", "virtualmachinesnapshots", "count/virtualmachinesnapshots.vmoperator.vmware.com", &c.VirtualMachineSnapshots},
		{"contentLibraryItemCount", "contentlibraryitems", "count/contentlibraryitems.imageregistry.vmware.com", &c.ContentLibraryItems},
	}
}

func first(a, b *resource.Quantity) *resource.Quantity {
	if a != nil {
		return a
	}
	return b
}

// least is a, cut to most.
func least(a, most *resource.Quantity) *resource.Quantity {
	if a != nil && most != nil && most.Cmp(*a) < 0 {
		return new(most.DeepCopy())
	}
	return a
}
