package ns

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
)

func (c *commands) describeCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:     "describe <name>",
		Aliases: []string{"show", "get"},
		Short:   "Show a namespace: its limits and what is used of them, people, and what is wrong",
		Example: `  atoll ns describe shop
  atoll ns describe shop -o yaml`,
		Args: command.ExactArgs("name"), ValidArgsFunction: c.completeNames(false),
		RunE: c.with(func(s client.WithWatch, cmd *cobra.Command, args []string) error {
			b, err := c.get(cmd.Context(), s, args[0])
			if err != nil {
				return err
			}
			if done, err := c.structured(output, b); done || err != nil {
				return err
			}
			c.describe(b)
			return nil
		}),
	}
	command.OutputFlag(cmd, &output, "text", "json", "yaml", "name")
	return cmd
}

// line is one line of a description; what is empty is left out.
func (c *commands) line(name, value string) {
	if value != "" {
		c.Printf("%-13s %s\n", name+":", value)
	}
}

func (c *commands) describe(b *atoll.SupervisorNamespace) {
	spec := b.EffectiveSpec()
	c.line("Name", b.Name)
	c.line("Description", spec.Description)
	c.line("Template", spec.ClassName)
	c.line("State", state(b)+", "+text.Age(b.CreationTimestamp.Time)+" old")
	for _, why := range wrong(b) {
		c.line("Problem", why)
	}
	c.line("API server", b.Status.NamespaceEndpointURL)
	c.line("Registry", b.Status.RegistryProject)
	c.line("Pods", pods(spec))
	c.line("Encryption", encrypted(spec))
	c.line("Network", network(spec))
	c.line("Restart", cmp.Or(spec.RestartPriority, "Medium")+" priority (kept for clusters of several hosts; it orders nothing yet)")
	c.line("Hosts", strings.Join(spec.Hosts, ", "))
	c.line("Zones", strings.Join(refs(spec.Zones), ", "))
	c.line("VM classes", orAll(refs(spec.VMClasses), spec.VMClasses == nil))
	c.line("Libraries", orAll(libraries(spec), spec.ContentSources == nil))
	c.line("Images", orAll(spec.Images, spec.Images == nil))
	c.line("Storage", orAll(storage(spec), spec.StorageClasses == nil))
	c.line("Tags", tags(spec))
	c.access(b)
	c.uses(b)
	if len(b.Status.Top) > 0 {
		c.Printf("\nUse most:\n")
		c.top(b, "  ")
	}
}

func orAll(names []string, all bool) string {
	switch {
	case all:
		return "all"
	case len(names) == 0:
		return "none"
	}
	return strings.Join(names, ", ")
}

func refs(list []atoll.NamespaceReference) []string {
	var out []string
	for _, r := range list {
		out = append(out, r.Name)
	}
	return out
}

func storage(spec *atoll.SupervisorNamespaceSpec) []string {
	var out []string
	for _, s := range spec.StorageClasses {
		if s.Limit != nil {
			out = append(out, fmt.Sprintf("%s (%s)", s.Name, text.Size(s.Limit.Value())))
			continue
		}
		out = append(out, s.Name)
	}
	return out
}

func libraries(spec *atoll.SupervisorNamespaceSpec) []string {
	var out []string
	for _, s := range spec.ContentSources {
		if s.Type == namespaceLibrary {
			out = append(out, s.Name+" of the namespace")
			continue
		}
		out = append(out, s.Name)
	}
	return out
}

func pods(spec *atoll.SupervisorNamespaceSpec) string {
	out := "in micro-VMs only"
	if spec.PodRuntime.Policy == atoll.RuntimeRunc {
		out = "in micro-VMs, or under runc"
	}
	if spec.PodRuntime.PrivilegedAllowed {
		return out + ", privileged containers allowed"
	}
	return out + ", no privileged containers"
}

func encrypted(spec *atoll.SupervisorNamespaceSpec) string {
	out := "not required"
	if spec.Encryption.Required {
		out = "required"
	}
	if spec.Encryption.ClassName != "" {
		out += ", by EncryptionClass " + spec.Encryption.ClassName
	}
	return out
}

func network(spec *atoll.SupervisorNamespaceSpec) string {
	n := spec.Network
	out := []string{map[string]string{
		atoll.IsolationIsolated: "isolated from other namespaces", atoll.IsolationDenyAll: "nothing but what is listed",
	}[n.Isolation]}
	if out[0] == "" {
		out[0] = "open"
	}
	for _, l := range []struct {
		what  string
		names []string
	}{{"from", n.FromNamespaces}, {"to", n.ToNamespaces}, {"ingress", n.IngressCIDRs}, {"egress", n.EgressCIDRs}} {
		if len(l.names) > 0 {
			out = append(out, l.what+" "+strings.Join(l.names, " "))
		}
	}
	return strings.Join(out, "; ")
}

func tags(spec *atoll.SupervisorNamespaceSpec) string {
	var out []string
	if len(spec.Registry.ImmutableTags) > 0 {
		out = append(out, "immutable "+strings.Join(spec.Registry.ImmutableTags, " "))
	}
	for _, r := range spec.Registry.Retention {
		out = append(out, fmt.Sprintf("of %s the newest %d are kept", r.Pattern, r.KeepLast))
	}
	return strings.Join(out, "; ")
}

func (c *commands) access(b *atoll.SupervisorNamespace) {
	for _, role := range []string{atoll.RoleOwner, atoll.RoleEdit, atoll.RoleView} {
		c.line(map[string]string{atoll.RoleOwner: "Owners", atoll.RoleEdit: "May edit", atoll.RoleView: "May view"}[role], strings.Join(people(b, role), ", "))
	}
}

// Columns of text beside a bar: the name, the numbers and the reservation.
const usesBeside = 64

// uses prints what is used of each limit.
func (c *commands) uses(b *atoll.SupervisorNamespace) {
	if len(b.Status.Usage) == 0 {
		return
	}
	list := slices.Clone(b.Status.Usage)
	rank := func(name string) int {
		if i := slices.Index([]string{"cpu", "memory", "storage", "registry"}, name); i >= 0 {
			return i
		}
		if strings.HasPrefix(name, "storageclass/") {
			return 10
		}
		return 20
	}
	slices.SortStableFunc(list, func(a, b atoll.NamespaceUsage) int {
		return cmp.Or(cmp.Compare(rank(a.Resource), rank(b.Resource)), cmp.Compare(a.Resource, b.Resource))
	})
	width := c.barWidth(usesBeside)
	var rows [][]string
	for i := range list {
		u := &list[i]
		name := strings.TrimPrefix(u.Resource, "count/")
		row := []string{"  " + name, "", human(u.Resource, &u.Used), ""}
		if u.Limit != nil {
			row[1] = c.bar(&u.Used, u.Limit, width)
			row[2] += " of " + human(u.Resource, u.Limit)
			row[3] = percent(&u.Used, u.Limit)
		} else {
			row[2] += ", no limit"
		}
		if u.Reservation != nil {
			row[3] = strings.TrimSpace(row[3] + " reserved " + human(u.Resource, u.Reservation))
		}
		rows = append(rows, row)
	}
	c.Printf("\nUse:\n")
	c.columns(rows)
}
