package people

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
	"atoll.dev/atoll/internal/identity/directory"
)

// GroupCommand is `atoll group`.
func GroupCommand(cfg Config) *cobra.Command {
	c := &commands{Config: cfg}
	return command.Group(group, "Manage groups of users", `  atoll group create developers
  atoll group add developers anna ben
  atoll group ls`,
		c.groupCreate(), c.groupList(), c.groupChange("add", "Add users or groups to a group", "added to", with),
		c.groupChange("remove", "Take users or groups out of a group", "taken out of", without), c.groupDelete())
}

// with is the list with the name in it, without the list without it.
func with(list []string, name string) []string {
	if slices.Contains(list, name) {
		return list
	}
	return append(list, name)
}

func without(list []string, name string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(n string) bool { return n == name })
}

func (c *commands) groupCreate() *cobra.Command {
	var members []string
	cmd := &cobra.Command{
		Use: "create <name>", Short: "Make a group",
		Example: `  atoll group create developers --member anna --member ben`,
		Args:    command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.name("group", args[0]); err != nil {
				return err
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			for _, m := range members {
				if err := cl.Get(cmd.Context(), client.ObjectKey{Name: m}, &api.User{}); err != nil {
					return explain(err, "user", m)
				}
			}
			g := &api.Group{ObjectMeta: metav1.ObjectMeta{Name: args[0]}, Spec: api.GroupSpec{Members: members}}
			if err := cl.Create(cmd.Context(), g); err != nil {
				return explain(err, "group", args[0])
			}
			c.Printf("group %s is made\n", args[0])
			return nil
		},
	}
	cmd.Flags().StringSliceVar(&members, "member", nil, "user in it; may be repeated")
	if err := cmd.RegisterFlagCompletionFunc("member", c.completeUsers()); err != nil {
		panic(err) // the line above defines it
	}
	return cmd
}

// groupChange is add and remove.
func (c *commands) groupChange(verb, short, done string, change func([]string, string) []string) *cobra.Command {
	var groups []string
	cmd := &cobra.Command{
		Use: verb + " <group> [user]...", Short: short,
		Long:    short + `. Whoever is in a group that is in another one is in that, too. It counts within seconds, for those who are logged in as well.`,
		Example: fmt.Sprintf("  atoll group %[1]s developers anna ben\n  atoll group %[1]s staff --group developers", verb),
		Args:    command.MoreArgs("group"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return c.completeGroups()(cmd, args, toComplete)
			}
			return c.completeUsers()(cmd, args[1:], toComplete)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			name, users := args[0], args[1:]
			if len(users)+len(groups) == 0 {
				return command.UsageError{Err: errors.New("name the users, or groups with --group")}
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			if verb == "add" {
				if err := checkAdded(cmd.Context(), cl, name, users, groups); err != nil {
					return err
				}
			}
			err = changeGroup(cmd.Context(), cl, name, func(spec *api.GroupSpec) error {
				for _, u := range users {
					spec.Members = change(spec.Members, u)
				}
				for _, g := range groups {
					spec.Groups = change(spec.Groups, g)
				}
				return nil
			})
			if err != nil {
				return explain(err, "group", name)
			}
			for _, who := range slices.Concat(users, groups) {
				c.Printf("%s is %s group %s\n", who, done, name)
			}
			return nil
		},
	}
	cmd.Flags().StringSliceVar(&groups, "group", nil, "group instead of a user; may be repeated")
	if err := cmd.RegisterFlagCompletionFunc("group", c.completeGroups()); err != nil {
		panic(err) // the line above defines it
	}
	return cmd
}

// checkAdded refuses names that are nobody's, and circles.
func checkAdded(ctx context.Context, cl client.Client, name string, users, groups []string) error {
	for _, u := range users {
		if err := cl.Get(ctx, client.ObjectKey{Name: u}, &api.User{}); err != nil {
			return explain(err, "user", u)
		}
	}
	var all api.GroupList
	if err := cl.List(ctx, &all); err != nil {
		return explain(err, "group", name)
	}
	for _, g := range groups {
		if !slices.ContainsFunc(all.Items, func(one api.Group) bool { return one.Name == g }) {
			return fmt.Errorf("there is no group %s", g)
		}
		if directory.Reaches(all.Items, g, name) {
			return fmt.Errorf("group %s is in group %s already, perhaps by way of others; they cannot be in each other", name, g)
		}
	}
	return nil
}

func (c *commands) groupDelete() *cobra.Command {
	return c.each(group, "delete", "Delete groups; their users stay", "deleted", c.completeGroups(), func(ctx context.Context, cl client.Client, name string) error {
		if name == api.AdministratorsGroup {
			return fmt.Errorf("group %s stays: it is bound to the rights of administrators; take users out of it instead", name)
		}
		return cl.Delete(ctx, &api.Group{ObjectMeta: metav1.ObjectMeta{Name: name}})
	})
}

func (c *commands) groupList() *cobra.Command {
	list := &api.GroupList{}
	return c.list(group, "List groups and who is in them", list, func() any { return list.Items }, func(context.Context, client.Client) ([][]string, error) {
		rows := [][]string{{"NAME", "MEMBERS", "GROUPS", "AGE"}}
		for _, g := range list.Items {
			rows = append(rows, []string{
				g.Name, cmp.Or(strings.Join(g.Spec.Members, ","), "-"), cmp.Or(strings.Join(g.Spec.Groups, ","), "-"), text.Age(g.CreationTimestamp.Time),
			})
		}
		return rows, nil
	})
}

// firstMarker says that the first administrator has been made.
func firstMarker() *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: api.IdentityNamespace, Name: "first-administrator"},
		Data:       map[string]string{"user": api.FirstAdministrator},
	}
}
