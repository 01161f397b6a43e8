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

func (c *commands) topCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "top [name]",
		Short: "Show what uses most: the objects of one namespace, or all namespaces",
		Example: `  atoll ns top
  atoll ns top shop`,
		ValidArgsFunction: c.completeNames(false),
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return command.ExactArgs("name")(cmd, args)
			}
			return nil
		},
		RunE: c.with(func(s client.WithWatch, cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				list, err := all(cmd.Context(), s)
				if err != nil {
					return err
				}
				return c.topNamespaces(list, output)
			}
			b, err := c.get(cmd.Context(), s, args[0])
			if err != nil {
				return err
			}
			if output != "table" {
				return c.Structured(output, b.Status.Top)
			}
			if len(b.Status.Top) == 0 {
				c.Tell("nothing in %s uses anything\n", b.Name)
				return nil
			}
			c.top(b, "")
			return nil
		}),
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

// Columns of text beside a bar: the resource, kind, name and numbers.
const topBeside = 72

// top prints the objects that use most, each with its share of the limit, or of all that is used.
func (c *commands) top(b *atoll.SupervisorNamespace, indent string) {
	rows := [][]string{{indent + "RESOURCE", "KIND", "NAME", "USED", "SHARE"}}
	for i := range b.Status.Top {
		t := &b.Status.Top[i]
		row := []string{indent + t.Resource, t.Kind, t.Name, human(t.Resource, &t.Used), ""}
		if u := usage(b, t.Resource); u != nil {
			of, what := u.Limit, "of the limit"
			if of == nil {
				of, what = &u.Used, "of what is used"
			}
			row[4] = fmt.Sprintf("%s %s %s", c.bar(&t.Used, of, c.barWidth(topBeside)), percent(&t.Used, of), what)
		}
		rows = append(rows, row)
	}
	c.columns(rows)
}

// topNamespaces prints namespaces by what they use, each with its share of what all use together.
func (c *commands) topNamespaces(list []atoll.SupervisorNamespace, output string) error {
	type row struct {
		Namespace string            `json:"namespace"`
		Used      map[string]string `json:"used"`
	}
	slices.SortStableFunc(list, func(a, b atoll.SupervisorNamespace) int {
		for _, name := range []string{"memory", "cpu", "storage"} {
			ua, ub := usage(&a, name), usage(&b, name)
			if ua != nil && ub != nil && ua.Used.Cmp(ub.Used) != 0 {
				return ub.Used.Cmp(ua.Used)
			}
		}
		return cmp.Compare(a.Name, b.Name)
	})
	var out []row
	rows := [][]string{{"NAME", "CPU", "MEMORY", "STORAGE"}}
	for i := range list {
		r := row{list[i].Name, map[string]string{}}
		line := []string{list[i].Name}
		for _, name := range []string{"cpu", "memory", "storage"} {
			if u := usage(&list[i], name); u != nil {
				r.Used[name] = u.Used.String()
			}
			line = append(line, c.cell(&list[i], name, leastBar))
		}
		out, rows = append(out, r), append(rows, line)
	}
	if output != "table" {
		return c.Structured(output, out)
	}
	if len(out) == 0 {
		c.Tell("no namespaces that you may see\n")
		return nil
	}
	c.columns(rows)
	return nil
}

// columns is a table whose lines have no spaces at their ends.
func (c *commands) columns(rows [][]string) {
	var out strings.Builder
	text.Table(&out, rows)
	for line := range strings.Lines(out.String()) {
		c.Printf("%s\n", strings.TrimRight(line, " \n"))
	}
}
