package ns

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/api/resource"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// Words of flags.
const (
	groupPrefix = "group:"
	// nothing takes a limit away, and anything a list of what is allowed.
	nothing, anything = "none", "any"
	namespaceLibrary  = "ContentLibrary"
	clusterLibrary    = "ClusterContentLibrary"
	namespacePrefix   = "namespace:"
)

// setter puts the values of one flag into a spec.
type setter func(spec *atoll.SupervisorNamespaceSpec, values []string) error

// limit is one flag of what a namespace is bounded by.
type limit struct {
	name, usage string
	// many flags may be repeated, or have values separated by commas.
	many bool
	set  setter
}

// limits are the flags that create and edit have in common.
type limits struct {
	list   []limit
	one    map[string]*string
	many   map[string]*[]string
	remove []string
	yes    map[string]*bool
}

// quantity sets a limit.
func quantity(field func(*atoll.SupervisorNamespaceSpec) **resource.Quantity) setter {
	return func(spec *atoll.SupervisorNamespaceSpec, values []string) error {
		if values[0] == nothing {
			*field(spec) = nil
			return nil
		}
		q, err := parse(values[0])
		if err != nil {
			return err
		}
		*field(spec) = q
		return nil
	}
}

func parse(value string) (*resource.Quantity, error) {
	q, err := resource.ParseQuantity(value)
	if err != nil || q.Sign() < 0 {
		return nil, fmt.Errorf("%q is not an amount: write 4, 500m or 16Gi, or %s for no limit", value, nothing)
	}
	return &q, nil
}

// namesOf sets a list of what is allowed; the word any allows everything.
func namesOf[T any](field func(*atoll.SupervisorNamespaceSpec) *[]T, read func(string) (T, error)) setter {
	return func(spec *atoll.SupervisorNamespaceSpec, values []string) error {
		if len(values) == 1 && (values[0] == anything || values[0] == nothing) {
			*field(spec) = nil
			return nil
		}
		var out []T
		for _, v := range values {
			one, err := read(v)
			if err != nil {
				return err
			}
			out = append(out, one)
		}
		*field(spec) = out
		return nil
	}
}

func plain(v string) (string, error) { return v, nil }

func reference(v string) (atoll.NamespaceReference, error) {
	return atoll.NamespaceReference{Name: v}, nil
}

func library(v string) (atoll.NamespaceContentSource, error) {
	if name, ok := strings.CutPrefix(v, namespacePrefix); ok {
		return atoll.NamespaceContentSource{Name: name, Type: namespaceLibrary}, nil
	}
	return atoll.NamespaceContentSource{Name: v, Type: clusterLibrary}, nil
}

func policy(v string) (atoll.NamespaceStorageClass, error) {
	name, size, bounded := strings.Cut(v, "=")
	out := atoll.NamespaceStorageClass{Name: name}
	if !bounded {
		return out, nil
	}
	var err error
	out.Limit, err = parse(size)
	return out, err
}

func retention(v string) (atoll.RegistryRetention, error) {
	pattern, count, ok := strings.Cut(v, "=")
	n, err := strconv.ParseInt(count, 10, 32)
	if !ok || err != nil || n < 1 {
		return atoll.RegistryRetention{}, fmt.Errorf("%q: write PATTERN=NUMBER, like *:dev-*=5", v)
	}
	return atoll.RegistryRetention{Pattern: pattern, KeepLast: int32(n)}, nil
}

// oneOf sets one of a few words, written in any case and with dashes.
func oneOf(field func(*atoll.SupervisorNamespaceSpec) *string, words ...string) setter {
	return func(spec *atoll.SupervisorNamespaceSpec, values []string) error {
		given := strings.ReplaceAll(values[0], "-", "")
		for _, w := range words {
			if strings.EqualFold(w, given) {
				*field(spec) = w
				return nil
			}
		}
		return fmt.Errorf("%q: use one of %s", values[0], strings.Join(words, ", "))
	}
}

// role gives people a role; who has another one loses it.
func role(name string) setter {
	return func(spec *atoll.SupervisorNamespaceSpec, values []string) error {
		for _, v := range values {
			who, err := person(v)
			if err != nil {
				return err
			}
			who.Role = name
			spec.AccessList = append(without(spec.AccessList, who), who)
		}
		return nil
	}
}

// person reads USER, USER@DOMAIN or group:GROUP, with or without the prefix that Kubernetes has them by.
func person(v string) (atoll.NamespaceAccess, error) {
	out := atoll.NamespaceAccess{SubjectType: "User", Domain: atoll.LocalDomain}
	name, group := strings.CutPrefix(v, groupPrefix)
	if group {
		out.SubjectType = "Group"
	}
	name = strings.TrimPrefix(name, atoll.SubjectPrefix)
	subject, domain, foreign := strings.Cut(name, "@")
	if foreign {
		out.Domain = domain
	}
	out.Subject = subject
	if subject == "" || foreign && domain == "" || strings.ContainsAny(subject+domain, ":@ ") {
		return out, fmt.Errorf("%q is nobody: write USER, USER@DOMAIN or %sGROUP", v, groupPrefix)
	}
	return out, nil
}

// without is a list without one user or group.
func without(list []atoll.NamespaceAccess, who atoll.NamespaceAccess) []atoll.NamespaceAccess {
	return slices.DeleteFunc(list, func(a atoll.NamespaceAccess) bool {
		domain := a.Domain
		if domain == "" {
			domain = atoll.LocalDomain
		}
		return a.SubjectType == who.SubjectType && a.Subject == who.Subject && domain == who.Domain
	})
}

// counts sets limits of how many objects there may be.
func counts(spec *atoll.SupervisorNamespaceSpec, values []string) error {
	fields := countFields(&spec.Resources.Counts)
	for _, v := range values {
		name, number, _ := strings.Cut(v, "=")
		field, ok := fields[strings.ToLower(name)]
		if !ok {
			return fmt.Errorf("%q: write RESOURCE=NUMBER with one of %s", v, strings.Join(countNames(), ", "))
		}
		if number == nothing {
			*field = nil
			continue
		}
		n, err := strconv.ParseInt(number, 10, 64)
		if err != nil || n < 0 {
			return fmt.Errorf("%q: %q is not a number; write for example %s=10, or %s=%s for no limit", v, number, name, name, nothing)
		}
		*field = &n
	}
	return nil
}

func countFields(c *atoll.NamespaceCounts) map[string]**int64 {
	return map[string]**int64{
		"pods": &c.Pods, "virtualmachines": &c.VirtualMachines, "vms": &c.VirtualMachines, "services": &c.Services,
		"deployments": &c.Deployments, "daemonsets": &c.DaemonSets, "replicasets": &c.ReplicaSets,
		"replicationcontrollers": &c.ReplicationControllers, "statefulsets": &c.StatefulSets, "jobs": &c.Jobs,
		"configmaps": &c.ConfigMaps, "secrets": &c.Secrets, "persistentvolumeclaims": &c.PersistentVolumeClaims, "pvcs": &c.PersistentVolumeClaims,
		"volumesnapshots": &c.VolumeSnapshots, "virtualmachinesnapshots": &c.VirtualMachineSnapshots, "contentlibraryitems": &c.ContentLibraryItems,
	}
}

func countNames() []string {
	var out []string
	for name := range countFields(&atoll.NamespaceCounts{}) {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// table are all limits by their flags.
func table() []limit {
	type spec = atoll.SupervisorNamespaceSpec
	q := func(name, usage string, field func(*atoll.NamespaceResources) **resource.Quantity) limit {
		return limit{name: name, usage: usage, set: quantity(func(s *spec) **resource.Quantity { return field(&s.Resources) })}
	}
	type res = atoll.NamespaceResources
	type amount = *resource.Quantity
	return []limit{
		q("cpu-limit", "limit of CPU of pods and virtual machines together: 8, 500m", func(r *res) *amount { return &r.CPULimit }),
		q("memory-limit", "limit of memory of pods and virtual machines together: 16Gi", func(r *res) *amount { return &r.MemoryLimit }),
		q("cpu-reservation", "CPU that is kept free for it", func(r *res) *amount { return &r.CPUReservation }),
		q("memory-reservation", "memory that is kept free for it", func(r *res) *amount { return &r.MemoryReservation }),
		q("storage-limit", "limit of the sizes of all volumes together", func(r *res) *amount { return &r.StorageRequestLimit }),
		q("cpu-limit-default", "CPU limit of containers that have none", func(r *res) *amount { return &r.CPULimitDefault }),
		q("cpu-request-default", "CPU request of containers that have none", func(r *res) *amount { return &r.CPURequestDefault }),
		q("memory-limit-default", "memory limit of containers that have none", func(r *res) *amount { return &r.MemoryLimitDefault }),
		q("memory-request-default", "memory request of containers that have none", func(r *res) *amount { return &r.MemoryRequestDefault }),
		{"count", "how many objects there may be, RESOURCE=NUMBER: pods=50,vms=10", true, counts},
		{"storage-class", "storage class it may use, NAME or NAME=LIMIT; " + anything + " is all", true, namesOf(func(s *spec) *[]atoll.NamespaceStorageClass { return &s.StorageClasses }, policy)},
		{"vm-class", "class its virtual machines may have; " + anything + " is all", true, namesOf(func(s *spec) *[]atoll.NamespaceReference { return &s.VMClasses }, reference)},
		{"content-library", "library of the cluster whose images its virtual machines may be made of, or " + namespacePrefix + "NAME; " + anything + " is all", true, namesOf(func(s *spec) *[]atoll.NamespaceContentSource { return &s.ContentSources }, library)},
		{"image", "pattern of container images that its pods may use: registry.atoll.local/shop/**; " + anything + " is all", true, namesOf(func(s *spec) *[]string { return &s.Images }, plain)},
		{"owner", "who owns it: USER or " + groupPrefix + "GROUP, of another domain USER@DOMAIN", true, role(atoll.RoleOwner)},
		{"edit", "who may create and change what is in it: USER or " + groupPrefix + "GROUP", true, role(atoll.RoleEdit)},
		{"view", "who may look at it: USER or " + groupPrefix + "GROUP", true, role(atoll.RoleView)},
		{"zone", "zone it may use; " + anything + " is all", true, namesOf(func(s *spec) *[]atoll.NamespaceReference { return &s.Zones }, reference)},
		{"host", "host it may use; " + anything + " is all", true, namesOf(func(s *spec) *[]string { return &s.Hosts }, plain)},
		{"isolation", "open, isolated (from other namespaces) or deny-all", false, oneOf(func(s *spec) *string { return &s.Network.Isolation }, atoll.IsolationOpen, atoll.IsolationIsolated, atoll.IsolationDenyAll)},
		{"egress", "addresses outside of the cluster that it may reach: 10.0.0.0/8; " + anything + " leaves it to the isolation", true, namesOf(func(s *spec) *[]string { return &s.Network.EgressCIDRs }, plain)},
		{"ingress", "addresses outside of the cluster that may reach it; " + anything + " leaves it to the isolation", true, namesOf(func(s *spec) *[]string { return &s.Network.IngressCIDRs }, plain)},
		{"allow-from", "namespace that may reach it all the same; " + nothing + " is no more", true, namesOf(func(s *spec) *[]string { return &s.Network.FromNamespaces }, plain)},
		{"allow-to", "namespace that it may reach all the same; " + nothing + " is no more", true, namesOf(func(s *spec) *[]string { return &s.Network.ToNamespaces }, plain)},
		{"encryption-class", "EncryptionClass of the namespace that its volumes must be encrypted by; " + nothing + " is any", false, word(func(s *spec) *string { return &s.Encryption.ClassName })},
		{"runtime", "microvm (pods in micro-VMs only), or runc (pods under runc too)", false, oneOf(func(s *spec) *string { return &s.PodRuntime.Policy }, atoll.RuntimeMicroVM, atoll.RuntimeRunc)},
		{"registry-quota", "limit of all its images in the registry together: 20Gi", false, quantity(func(s *spec) **resource.Quantity { return &s.Registry.Quota })},
		{"immutable-tag", "pattern of REPOSITORY:TAG that can be pushed once only; " + nothing + " is none", true, namesOf(func(s *spec) *[]string { return &s.Registry.ImmutableTags }, plain)},
		{"retention", "how many tags of a pattern are kept, PATTERN=NUMBER: *:dev-*=5; " + nothing + " keeps all", true, namesOf(func(s *spec) *[]atoll.RegistryRetention { return &s.Registry.Retention }, retention)},
		{"restart-priority", "what is to start first after a host has failed, kept for clusters of several hosts: lowest, low, medium, high or highest", false, oneOf(func(s *spec) *string { return &s.RestartPriority }, "Lowest", "Low", "Medium", "High", "Highest")},
		{"description", "what it is for", false, word(func(s *spec) *string { return &s.Description })},
	}
}

// word sets a text; the word none empties it.
func word(field func(*atoll.SupervisorNamespaceSpec) *string) setter {
	return func(spec *atoll.SupervisorNamespaceSpec, values []string) error {
		*field(spec) = values[0]
		if values[0] == nothing {
			*field(spec) = ""
		}
		return nil
	}
}

// switches are the flags that are yes or no.
func switches() map[string]struct {
	usage string
	field func(*atoll.SupervisorNamespaceSpec) *bool
} {
	type spec = atoll.SupervisorNamespaceSpec
	return map[string]struct {
		usage string
		field func(*spec) *bool
	}{
		"encryption-required": {"refuse volumes that are not encrypted", func(s *spec) *bool { return &s.Encryption.Required }},
		"privileged":          {"allow privileged containers", func(s *spec) *bool { return &s.PodRuntime.PrivilegedAllowed }},
	}
}

// add puts the flags on a command.
func (l *limits) add(cmd *cobra.Command) {
	l.list, l.one, l.many, l.yes = table(), map[string]*string{}, map[string]*[]string{}, map[string]*bool{}
	for _, f := range l.list {
		if f.many {
			l.many[f.name] = cmd.Flags().StringSlice(f.name, nil, f.usage)
		} else {
			l.one[f.name] = cmd.Flags().String(f.name, "", f.usage)
		}
	}
	for name, s := range switches() {
		l.yes[name] = cmd.Flags().Bool(name, false, s.usage)
	}
}

// given tells whether any of the flags was given.
func (l *limits) given(cmd *cobra.Command) bool {
	changed := func(name string) bool { return cmd.Flags().Changed(name) }
	return slices.ContainsFunc(l.list, func(f limit) bool { return changed(f.name) }) ||
		changed("encryption-required") || changed("privileged") || len(l.remove) > 0
}

// apply changes a spec as the flags say.
func (l *limits) apply(cmd *cobra.Command, spec *atoll.SupervisorNamespaceSpec) error {
	for _, f := range l.list {
		if !cmd.Flags().Changed(f.name) {
			continue
		}
		values := []string(nil)
		if f.many {
			values = *l.many[f.name]
		} else {
			values = []string{*l.one[f.name]}
		}
		if len(values) == 0 {
			return fmt.Errorf("--%s has no value; see --help", f.name)
		}
		if err := f.set(spec, values); err != nil {
			return fmt.Errorf("--%s: %w", f.name, err)
		}
	}
	for name, s := range switches() {
		if cmd.Flags().Changed(name) {
			*s.field(spec) = *l.yes[name]
		}
	}
	for _, v := range l.remove {
		who, err := person(v)
		if err != nil {
			return fmt.Errorf("--remove-access: %w", err)
		}
		before := len(spec.AccessList)
		if spec.AccessList = without(spec.AccessList, who); len(spec.AccessList) == before {
			return fmt.Errorf("--remove-access: %s has no role in it", v)
		}
	}
	return nil
}
