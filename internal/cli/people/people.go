// Package people is `atoll user` and `atoll group`: who may log in to a supervisor, and in which groups they are.
//
// It changes User and Group objects and the Secrets with password hashes through the API server, with the kubeconfig
// of the environment or the administrator's of the data directory, so that it works on the host when nobody knows a
// password any more. Passwords come from standard input or are made here and printed once; what is stored is a hash.
//
// internal/cli gives it the streams and the kubeconfig. What can go wrong: the API server refuses, most often because
// the caller is no administrator; a password is not good enough.
package people

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/identity/directory"
	"atoll.dev/atoll/internal/identity/password"
)

// Config of the commands.
type Config struct {
	command.App
	// Kubeconfig is the file to use, "" for those that kubectl uses.
	Kubeconfig func() (string, error)
	// Passwd is the command with which people change their own password.
	Passwd *cobra.Command
}

// commands is what the commands share.
type commands struct{ Config }

// What the commands are about.
const user, group = "user", "group"

// newClient makes a client for people and groups. Without a kubeconfig it takes those that kubectl takes.
func newClient(kubeconfig string) (client.Client, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	return cluster.Connect(config, api.AddToScheme)
}

func (c *commands) client() (client.Client, error) {
	file, err := c.Kubeconfig()
	if err != nil {
		return nil, err
	}
	return newClient(file)
}

// name checks the name of a user or group that is to be made.
func (c *commands) name(kind, typed string) error {
	if got, ok := directory.LocalName(typed); !ok || got != typed {
		return command.UsageError{Err: fmt.Errorf("%s %q: use up to 63 lower-case letters, digits, '-', '_' and '.', and begin and end with a letter or digit", kind, typed)}
	}
	return nil
}

// explain adds the way out to an answer of the API server.
func explain(err error, kind, name string) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return fmt.Errorf("there is no %s %s", kind, name)
	case apierrors.IsAlreadyExists(err):
		return fmt.Errorf("there is a %s %s already", kind, name)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("only administrators may do this: %w", err)
	}
	return err
}

// chooses a password: a line of standard input, or one that is made here.
func (c *commands) choose(user string, stdin bool) (secret string, made bool, err error) {
	if !stdin {
		secret, err = password.Generate()
		return secret, true, err
	}
	line, err := bufio.NewReader(c.In).ReadString('\n')
	if err != nil && (line == "" || !errors.Is(err, io.EOF)) {
		return "", false, fmt.Errorf("reading the password: %w", err)
	}
	secret = strings.TrimRight(line, "\r\n")
	return secret, false, password.Policy{}.Check(user, secret)
}

// setPassword stores a password of a user.
func setPassword(ctx context.Context, cl client.Client, u *api.User, secret string, mustChange bool) error {
	hash, err := password.Hash(secret)
	if err != nil {
		return err
	}
	return identity.StorePassword(ctx, cl, u, hash, mustChange, time.Now())
}

// complete proposes names of users or groups.
func (c *commands) complete(list func() client.ObjectList) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		cl, err := c.client()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		names := cluster.Names(cmd.Context(), cl, list())
		return slices.DeleteFunc(names, func(n string) bool { return slices.Contains(args, n) }), cobra.ShellCompDirectiveNoFileComp
	}
}

func (c *commands) completeUsers() cobra.CompletionFunc {
	return c.complete(func() client.ObjectList { return &api.UserList{} })
}

func (c *commands) completeGroups() cobra.CompletionFunc {
	return c.complete(func() client.ObjectList { return &api.GroupList{} })
}

// list is the command that lists users or groups: the items of a list as they are, or rows of a table.
func (c *commands) list(kind, short string, list client.ObjectList, items func() any, rows func(context.Context, client.Client) ([][]string, error)) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: short,
		Example: fmt.Sprintf("  atoll %[1]s ls\n  atoll %[1]s ls -o json", kind),
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			if err := cl.List(cmd.Context(), list); err != nil {
				return explain(err, kind, "")
			}
			if output != "table" {
				_ = meta.EachListItem(list, func(o runtime.Object) error {
					if object, ok := o.(client.Object); ok {
						object.SetManagedFields(nil)
					}
					return nil
				})
				return c.Structured(output, items())
			}
			table, err := rows(cmd.Context(), cl)
			if err != nil {
				return err
			}
			c.Table(table)
			return nil
		},
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

// each is a command that does something to each of the named users or groups.
func (c *commands) each(kind, verb, short, done string, names cobra.CompletionFunc, do func(ctx context.Context, cl client.Client, name string) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " <name>...", Short: short,
		Example: fmt.Sprintf("  atoll %s %s %s", kind, verb, map[string]string{user: "anna", group: "developers"}[kind]),
		Args:    command.MoreArgs("name"), ValidArgsFunction: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			var failed error
			for _, name := range args {
				if err := do(cmd.Context(), cl, name); err != nil {
					failed = errors.Join(failed, explain(err, kind, name))
					continue
				}
				c.Printf("%s %s is %s\n", kind, name, done)
			}
			return failed
		},
	}
}
