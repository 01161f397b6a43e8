package ns

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
)

func (c *commands) templateCommand() *cobra.Command {
	cmd := command.Group("template", "Templates that namespaces are made from", `  atoll ns template ls`, c.templateListCommand())
	cmd.Aliases = []string{"templates"}
	return cmd
}

func (c *commands) templateListCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"},
		Short: "List templates, and who may make namespaces from them",
		Example: `  atoll ns template ls
  kubectl get svnstemplate small -o yaml`,
		RunE: c.with(func(s client.WithWatch, cmd *cobra.Command, _ []string) error {
			list := &atoll.SupervisorNamespaceTemplateList{}
			if err := s.List(cmd.Context(), list); err != nil {
				return fmt.Errorf("listing SupervisorNamespaceTemplates: %w", err)
			}
			slices.SortFunc(list.Items, func(a, b atoll.SupervisorNamespaceTemplate) int { return cmp.Compare(a.Name, b.Name) })
			return c.printTemplates(list, output)
		}),
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml", "name")
	return cmd
}

func (c *commands) printTemplates(list *atoll.SupervisorNamespaceTemplateList, output string) error {
	switch output {
	case "json", "yaml":
		list.SetGroupVersionKind(atoll.GroupVersion().WithKind("SupervisorNamespaceTemplateList"))
		for i := range list.Items {
			list.Items[i].SetGroupVersionKind(atoll.GroupVersion().WithKind("SupervisorNamespaceTemplate"))
			list.Items[i].ManagedFields = nil
		}
		return c.Structured(output, list)
	case "name":
		for _, t := range list.Items {
			c.Printf("supervisornamespacetemplate.atoll.dev/%s\n", t.Name)
		}
		return nil
	}
	if len(list.Items) == 0 {
		c.Tell("no templates; an administrator makes a SupervisorNamespaceTemplate with kubectl\n")
		return nil
	}
	rows := [][]string{{"NAME", "CPU", "MEMORY", "STORAGE", "BASED ON", "SELF-SERVICE", "NAMESPACES", "AGE"}}
	for i := range list.Items {
		t := &list.Items[i]
		r := t.Spec.Template.Resources
		rows = append(rows, []string{
			t.Name, amount("cpu", r.CPULimit), amount("memory", r.MemoryLimit), amount("storage", r.StorageRequestLimit),
			cmp.Or(t.Spec.BasedOn, "-"), selfService(t), strconv.Itoa(int(t.Status.Namespaces)), text.Age(t.CreationTimestamp.Time),
		})
	}
	c.columns(rows)
	return nil
}

func amount(name string, q *resource.Quantity) string {
	if q == nil {
		return "-"
	}
	return human(name, q)
}

// selfService says who may make namespaces from a template.
func selfService(t *atoll.SupervisorNamespaceTemplate) string {
	s := t.Spec.SelfService
	if !s.Enabled {
		return "no"
	}
	out := []string{"owners"}
	for _, who := range s.Subjects {
		name := who.Subject
		if who.SubjectType == "Group" {
			name = groupPrefix + name
		}
		out = append(out, name)
	}
	text := strings.Join(out, ",")
	if s.MaxPerUser > 0 {
		text += fmt.Sprintf(" (%d each)", s.MaxPerUser)
	}
	if s.Default {
		text += " default"
	}
	return text
}
