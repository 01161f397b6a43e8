package ns

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
)

func (c *commands) listCommand() *cobra.Command {
	var output, selector string
	cmd := &cobra.Command{
		Use:     "ls [name]...",
		Aliases: []string{"list"},
		Short:   "List namespaces with what they use of their limits",
		Long: `Lists namespaces with what they use of their limits: all for administrators, and for others those that they have a role
in. What is wrong with one is below the list.`,
		Example: `  atoll ns ls
  atoll ns ls shop bank -o wide
  atoll ns ls -o name`,
		ValidArgsFunction: c.completeNames(true),
		RunE: c.with(func(s client.WithWatch, cmd *cobra.Command, args []string) error {
			parsed, err := labels.Parse(selector)
			if err != nil {
				return command.UsageError{Err: fmt.Errorf("--selector: %w", err)}
			}
			list, err := all(cmd.Context(), s)
			if err != nil {
				return err
			}
			known := map[string]bool{}
			list = slices.DeleteFunc(list, func(b atoll.SupervisorNamespace) bool {
				known[b.Name] = true
				return len(args) > 0 && !slices.Contains(args, b.Name) || !parsed.Matches(labels.Set(b.Labels))
			})
			for _, name := range args {
				if !known[name] {
					return fmt.Errorf("no SupervisorNamespace %q; `atoll ns ls` lists them", name)
				}
			}
			return c.printList(list, output)
		}),
	}
	command.OutputFlag(cmd, &output, "table", "wide", "json", "yaml", "name")
	cmd.Flags().StringVarP(&selector, "selector", "l", "", "only those with these labels: team=web,tier!=front")
	return cmd
}

// all lists the SupervisorNamespaces that the caller may read, by name.
func all(ctx context.Context, s client.WithWatch) ([]atoll.SupervisorNamespace, error) {
	list := &atoll.SupervisorNamespaceList{}
	err := s.List(ctx, list)
	if apierrors.IsForbidden(err) {
		list.Items, err = own(ctx, s)
	}
	if err != nil {
		return nil, fmt.Errorf("listing SupervisorNamespaces: %w", err)
	}
	slices.SortFunc(list.Items, func(a, b atoll.SupervisorNamespace) int { return cmp.Compare(a.Name, b.Name) })
	return list.Items, nil
}

// own reads the SupervisorNamespaces that the caller's roles name one by one.
func own(ctx context.Context, s client.WithWatch) ([]atoll.SupervisorNamespace, error) {
	review := &authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: metav1.NamespaceDefault}}
	if err := s.Create(ctx, review); err != nil {
		return nil, fmt.Errorf("asking what you may read: %w", err)
	}
	var out []atoll.SupervisorNamespace
	seen := map[string]bool{}
	for _, rule := range review.Status.ResourceRules {
		if !slices.Contains(rule.APIGroups, atoll.GroupName) || !slices.Contains(rule.Resources, "supervisornamespaces") || !slices.Contains(rule.Verbs, "get") {
			continue
		}
		for _, name := range rule.ResourceNames {
			if seen[name] {
				continue
			}
			seen[name] = true
			var b atoll.SupervisorNamespace
			err := s.Get(ctx, client.ObjectKey{Name: name}, &b)
			if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
				continue // gone since
			}
			if err != nil {
				return nil, err
			}
			out = append(out, b)
		}
	}
	return out, nil
}

func (c *commands) printList(list []atoll.SupervisorNamespace, output string) error {
	switch output {
	case "json", "yaml":
		out := &atoll.SupervisorNamespaceList{Items: list}
		out.SetGroupVersionKind(atoll.GroupVersion().WithKind("SupervisorNamespaceList"))
		for i := range list {
			typed(&list[i])
		}
		return c.Structured(output, out)
	case "name":
		for i := range list {
			if _, err := c.structured(output, &list[i]); err != nil {
				return err
			}
		}
		return nil
	}
	if len(list) == 0 {
		c.Tell("no namespaces that you may see; `atoll ns create NAME` makes one\n")
		return nil
	}
	c.table(list, output == "wide")
	return nil
}

// Columns of text beside the bars of a list: three of "1.5 GiB/100 GiB", the name, the state, the age, and the gaps.
const listBeside, listBars = 88, 3

// table prints namespaces, and what is wrong with them below.
func (c *commands) table(list []atoll.SupervisorNamespace, wide bool) {
	head := []string{"NAME", "STATE", "CPU", "MEMORY", "STORAGE", "AGE"}
	if wide {
		head = append(head, "ISOLATION", "RUNTIME", "TEMPLATE", "REGISTRY", "OWNERS")
	}
	width := min(max((c.width()-listBeside)/listBars, 6), 12)
	rows, problems := [][]string{head}, []string(nil)
	for i := range list {
		b := &list[i]
		row := []string{b.Name, state(b)}
		for _, name := range []string{"cpu", "memory", "storage"} {
			row = append(row, c.cell(b, name, width))
		}
		row = append(row, text.Age(b.CreationTimestamp.Time))
		if wide {
			row = append(row, cmp.Or(b.EffectiveSpec().Network.Isolation, atoll.IsolationOpen), runtimeOf(b), cmp.Or(b.Spec.ClassName, "-"), c.cell(b, "registry", width),
				cmp.Or(strings.Join(people(b, atoll.RoleOwner), ","), "-"))
		}
		rows = append(rows, row)
		for _, why := range wrong(b) {
			problems = append(problems, b.Name+": "+why)
		}
	}
	c.Table(rows)
	if len(problems) > 0 {
		c.Tell("\n%s\n", strings.Join(problems, "\n"))
	}
}

// cell is the use of one resource in a table.
func (c *commands) cell(b *atoll.SupervisorNamespace, name string, width int) string {
	u := usage(b, name)
	switch {
	case u == nil:
		return "-"
	case u.Limit == nil:
		return human(name, &u.Used)
	}
	return fmt.Sprintf("%s %s/%s", c.bar(&u.Used, u.Limit, width), human(name, &u.Used), human(name, u.Limit))
}

// state is how a namespace is, in one word.
func state(b *atoll.SupervisorNamespace) string {
	switch ready := meta.FindStatusCondition(b.Status.Conditions, atoll.NamespaceReady); {
	case b.DeletionTimestamp != nil:
		return "Deleting"
	case ready == nil:
		return "New"
	case ready.Status != metav1.ConditionTrue:
		return "NotReady"
	case meta.IsStatusConditionFalse(b.Status.Conditions, atoll.NamespaceWithinLimits):
		return "OverLimit"
	}
	return "Ready"
}

// wrong says what is not as it should be.
func wrong(b *atoll.SupervisorNamespace) []string {
	var out []string
	if d := meta.FindStatusCondition(b.Status.Conditions, atoll.NamespaceDeleting); b.DeletionTimestamp != nil && d != nil {
		out = append(out, "deleting: "+d.Message)
	}
	for _, kind := range []string{atoll.NamespaceReady, atoll.NamespaceWithinLimits, atoll.NamespaceReservationsMet} {
		if cond := meta.FindStatusCondition(b.Status.Conditions, kind); cond != nil && cond.Status == metav1.ConditionFalse {
			out = append(out, cmp.Or(cond.Message, cond.Reason))
		}
	}
	return out
}

// people are the names of who has a role, groups with "group:" before them.
func people(b *atoll.SupervisorNamespace, role string) []string {
	var out []string
	for _, a := range b.EffectiveSpec().AccessList {
		if a.Role != role {
			continue
		}
		name := a.Subject
		if a.Domain != "" && a.Domain != atoll.LocalDomain {
			name += "@" + a.Domain
		}
		if a.SubjectType == "Group" {
			name = groupPrefix + name
		}
		out = append(out, name)
	}
	return out
}

func runtimeOf(b *atoll.SupervisorNamespace) string {
	runtime := b.EffectiveSpec().PodRuntime
	out := cmp.Or(runtime.Policy, atoll.RuntimeMicroVM)
	if runtime.PrivilegedAllowed {
		out += "+privileged"
	}
	return out
}
