package people

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/identity/directory"
	"atoll.dev/atoll/internal/identity/password"
)

// UserCommand is `atoll user`.
func UserCommand(cfg Config) *cobra.Command {
	c := &commands{Config: cfg}
	each := func(verb, short, done string, do func(context.Context, client.Client, *api.User) error) *cobra.Command {
		return c.each(user, verb, short, done, c.completeUsers(), func(ctx context.Context, cl client.Client, name string) error {
			u := &api.User{}
			if err := cl.Get(ctx, client.ObjectKey{Name: name}, u); err != nil {
				return err
			}
			return do(ctx, cl, u)
		})
	}
	cmd := command.Group(user, "Manage who may log in", `  atoll user create anna --full-name "Anna Berg" --group developers
  atoll user ls
  atoll user reset-password administrator`,
		c.userCreate(), c.userList(), c.userReset(),
		each("disable", "Refuse a user's logins and end the sessions", "disabled", disable(true)),
		each("enable", "Let a disabled user log in again", "enabled", disable(false)),
		each("unlock", "Forget a user's failed logins", "unlocked", func(ctx context.Context, cl client.Client, u *api.User) error {
			return identity.Unlock(ctx, cl, u.Name)
		}),
		each("revoke", "End all sessions of a user; new logins are possible", "logged out everywhere", identity.Revoke),
		each("delete", "Delete a user; what the user made stays", "deleted", deleteUser),
	)
	if cfg.Passwd != nil {
		cmd.AddCommand(cfg.Passwd)
	}
	return cmd
}

func (c *commands) userCreate() *cobra.Command {
	var fullName string
	var groups []string
	var stdin, mustChange bool
	cmd := &cobra.Command{
		Use:   "create <name>",
		Short: "Make a local user with a password",
		Long: `Makes the user NAME@atoll.local. Without --password-stdin a password is made and printed once. The user must change the
password at the first login, unless --must-change=false.`,
		Example: `  atoll user create anna --full-name "Anna Berg" --group developers
  atoll user create ci --must-change=false --password-stdin <password-file`,
		Args: command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			if err := c.name("user", name); err != nil {
				return err
			}
			secret, made, err := c.choose(name, stdin)
			if err != nil {
				return command.UsageError{Err: err}
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			for _, g := range groups {
				if err := cl.Get(ctx, client.ObjectKey{Name: g}, &api.Group{}); err != nil {
					return explain(err, "group", g)
				}
			}
			u := &api.User{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: api.UserSpec{FullName: fullName, MustChangePassword: mustChange}}
			if err := cl.Create(ctx, u); err != nil {
				return explain(err, "user", name)
			}
			if err := setPassword(ctx, cl, u, secret, mustChange); err != nil {
				return fmt.Errorf("the user has no password yet: %w; try again with: atoll user reset-password %s", err, name)
			}
			for _, g := range groups {
				if err := changeGroup(ctx, cl, g, func(spec *api.GroupSpec) error { spec.Members = with(spec.Members, name); return nil }); err != nil {
					return explain(err, "group", g)
				}
			}
			c.printPassword(fmt.Sprintf("user %s is made", name), secret, made)
			return nil
		},
	}
	cmd.Flags().StringVar(&fullName, "full-name", "", "name of the person")
	cmd.Flags().StringSliceVar(&groups, "group", nil, "group to add the user to; may be repeated")
	cmd.Flags().BoolVar(&stdin, "password-stdin", false, "read the password from standard input")
	cmd.Flags().BoolVar(&mustChange, "must-change", true, "have the user change the password at the first login")
	if err := cmd.RegisterFlagCompletionFunc("group", c.completeGroups()); err != nil {
		panic(err) // the lines above define it
	}
	return cmd
}

// printPassword says what was done, and shows a password that was made here: the only time.
func (c *commands) printPassword(what, secret string, made bool) {
	c.Printf("%s\n", what)
	if made {
		c.Printf("password (shown this once): %s\n", secret)
	}
}

func (c *commands) userReset() *cobra.Command {
	var stdin, mustChange bool
	cmd := &cobra.Command{
		Use:   "reset-password <name>",
		Short: "Give a user another password; it ends the user's sessions",
		Long: `Sets another password: one that is made and printed once, or that of --password-stdin. It also takes off a lock. On the
host of the supervisor this is the way out when nobody knows the administrator's password.`,
		Example: `  atoll user reset-password administrator
  atoll user reset-password anna --must-change=false --password-stdin <password-file`,
		Args: command.ExactArgs("name"), ValidArgsFunction: c.completeUsers(),
		RunE: func(cmd *cobra.Command, args []string) error {
			secret, made, err := c.choose(args[0], stdin)
			if err != nil {
				return command.UsageError{Err: err}
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			u := &api.User{}
			if err := cl.Get(ctx, client.ObjectKey{Name: args[0]}, u); err != nil {
				return explain(err, "user", args[0])
			}
			if err := setPassword(ctx, cl, u, secret, mustChange); err != nil {
				return explain(err, "user", args[0])
			}
			if err := identity.Unlock(ctx, cl, u.Name); err != nil {
				return explain(err, "user", args[0])
			}
			c.printPassword(fmt.Sprintf("user %s has another password", u.Name), secret, made)
			return nil
		},
	}
	cmd.Flags().BoolVar(&stdin, "password-stdin", false, "read the password from standard input")
	cmd.Flags().BoolVar(&mustChange, "must-change", true, "have the user change the password at the next login")
	return cmd
}

func disable(value bool) func(context.Context, client.Client, *api.User) error {
	return func(ctx context.Context, cl client.Client, u *api.User) error {
		before := u.DeepCopy()
		u.Spec.Disabled = value
		return cl.Patch(ctx, u, client.MergeFrom(before))
	}
}

// deleteUser removes the user from its groups, too: another one of the name must not be in them.
func deleteUser(ctx context.Context, cl client.Client, u *api.User) error {
	var groups api.GroupList
	if err := cl.List(ctx, &groups); err != nil {
		return err
	}
	for _, g := range groups.Items {
		if !slices.Contains(g.Spec.Members, u.Name) {
			continue
		}
		err := changeGroup(ctx, cl, g.Name, func(spec *api.GroupSpec) error { spec.Members = without(spec.Members, u.Name); return nil })
		if client.IgnoreNotFound(err) != nil { // a group that is gone by now has no members
			return err
		}
	}
	return cl.Delete(ctx, u)
}

func (c *commands) userList() *cobra.Command {
	list := &api.UserList{}
	return c.list(user, "List users, their groups and their state", list, func() any { return list.Items }, func(ctx context.Context, cl client.Client) ([][]string, error) {
		var groups api.GroupList
		if err := cl.List(ctx, &groups); err != nil {
			return nil, explain(err, group, "")
		}
		return userRows(list.Items, groups.Items, time.Now()), nil
	})
}

func userRows(users []api.User, groups []api.Group, now time.Time) [][]string {
	rows := [][]string{{"NAME", "FULL NAME", "STATE", "GROUPS", "LAST LOGIN", "PASSWORD AGE"}}
	ago := func(at *metav1.Time) string {
		if at == nil {
			return "-"
		}
		return text.Age(at.Time)
	}
	for _, u := range users {
		rows = append(rows, []string{
			u.Name, cmp.Or(u.Spec.FullName, "-"), state(u, now), cmp.Or(strings.Join(directory.GroupsOf(groups, u.Name), ","), "-"),
			ago(u.Status.LastLogin), ago(u.Status.PasswordChanged),
		})
	}
	return rows
}

// state is a word about a user.
func state(u api.User, now time.Time) string {
	switch locked := u.Status.LockedUntil; {
	case u.Spec.Disabled:
		return "Disabled"
	case locked != nil && now.Before(locked.Time):
		return "Locked until " + locked.UTC().Format("15:04:05Z")
	case u.Status.PasswordChanged == nil:
		return "No password"
	case u.Spec.MustChangePassword:
		return "Must change password"
	}
	return "Active"
}

// EnsureAdministrator makes the first administrator of a cluster and returns the password, which nobody can have
// again. Where there is or was one it returns "".
func EnsureAdministrator(ctx context.Context, cl client.Client) (string, error) {
	marker := firstMarker()
	if err := cl.Get(ctx, client.ObjectKeyFromObject(marker), marker); client.IgnoreNotFound(err) != nil || err == nil {
		return "", err
	}
	u := &api.User{ObjectMeta: metav1.ObjectMeta{Name: api.FirstAdministrator}, Spec: api.UserSpec{FullName: "First administrator"}}
	if err := cl.Create(ctx, u); err != nil {
		// One without a password is left by a start that was cut short.
		if err := cl.Get(ctx, client.ObjectKeyFromObject(u), u); err != nil {
			return "", err
		}
	}
	secret := ""
	if u.Status.PasswordChanged == nil {
		made, err := password.Generate()
		if err != nil {
			return "", err
		}
		if err := setPassword(ctx, cl, u, made, false); err != nil {
			return "", err
		}
		secret = made
	}
	return secret, client.IgnoreAlreadyExists(cl.Create(ctx, firstMarker()))
}

// administratorWithin is how long making the first administrator may take.
const administratorWithin = time.Minute

// ShowAdministrator makes the first administrator of a new cluster and prints the password, the only time.
func ShowAdministrator(ctx context.Context, kubeconfig string, out io.Writer) {
	ctx, cancel := context.WithTimeout(ctx, administratorWithin)
	defer cancel()
	cl, err := newClient(kubeconfig)
	var secret string
	if err == nil {
		secret, err = EnsureAdministrator(ctx, cl)
	}
	switch {
	case errors.Is(err, context.Canceled):
	case err != nil:
		_, _ = fmt.Fprintf(out, "The first administrator could not be made: %v\nTry again with: atoll up\n", err)
	case secret != "":
		_, _ = fmt.Fprintf(out, "\nThe first administrator is %s@%s. This is the only time the password is shown:\n  %s\n", api.FirstAdministrator, api.LocalDomain, secret)
	}
}

// changeGroup changes the spec of a group, again when somebody else did at the same time.
func changeGroup(ctx context.Context, cl client.Client, name string, change func(*api.GroupSpec) error) error {
	return retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		g := &api.Group{}
		if err := cl.Get(ctx, client.ObjectKey{Name: name}, g); err != nil {
			return err
		}
		before := g.DeepCopy()
		if err := change(&g.Spec); err != nil {
			return err
		}
		if len(before.Spec.Members) == len(g.Spec.Members) && len(before.Spec.Groups) == len(g.Spec.Groups) {
			return nil
		}
		return cl.Update(ctx, g)
	})
}
