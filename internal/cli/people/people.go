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
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity"
	"atoll.dev/atoll/internal/identity/directory"
	"atoll.dev/atoll/internal/identity/password"
)

// Config of the commands.
type Config struct {
	In          io.Reader
	Out, ErrOut io.Writer
	// Kubeconfig is the file to use, "" for those that kubectl uses.
	Kubeconfig func() (string, error)
	// Usage marks errors of the user's own making.
	Usage func(error) error
	// Passwd is the command with which people change their own password.
	Passwd *cobra.Command
}

// command is what the commands share.
type command struct{ cfg Config }

// NewClient makes a client for people and groups. Without a kubeconfig it takes those that kubectl takes.
func NewClient(kubeconfig string) (client.Client, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, api.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	return client.New(config, client.Options{Scheme: scheme})
}

func (c *command) client() (client.Client, error) {
	file, err := c.cfg.Kubeconfig()
	if err != nil {
		return nil, err
	}
	return NewClient(file)
}

// printf prints a result.
func (c *command) printf(format string, args ...any) { _, _ = fmt.Fprintf(c.cfg.Out, format, args...) }

// group makes a command that only has commands.
func (c *command) group(use, short, example string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Example: example,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			var names []string
			for _, sub := range cmd.Commands() {
				names = append(names, sub.Name())
			}
			return c.cfg.Usage(fmt.Errorf("unknown command %q\ncommands of %q: %s", args[0], cmd.CommandPath(), strings.Join(names, " ")))
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(commands...)
	return cmd
}

// wants checks the number of arguments: exactly the named ones, or with more at least one of the last.
func (c *command) wants(more bool, names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) || more && len(args) > len(names) {
			return nil
		}
		return c.cfg.Usage(fmt.Errorf("%q wants <%s>, got %d arguments; see %q", cmd.CommandPath(), strings.Join(names, "> <"), len(args), cmd.CommandPath()+" --help"))
	}
}

// output checks -o.
func (c *command) output(value string) error {
	if !slices.Contains([]string{"table", "json", "yaml"}, value) {
		return c.cfg.Usage(fmt.Errorf("--output %q: use table, json, yaml", value))
	}
	return nil
}

// name checks the name of a user or group that is to be made.
func (c *command) name(kind, typed string) error {
	if got, ok := directory.LocalName(typed); !ok || got != typed {
		return c.cfg.Usage(fmt.Errorf("%s %q: use up to 63 lower-case letters, digits, '-', '_' and '.', and begin and end with a letter or digit", kind, typed))
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
func (c *command) choose(user string, stdin bool) (secret string, made bool, err error) {
	if !stdin {
		secret, err = password.Generate()
		return secret, true, err
	}
	line, err := bufio.NewReader(c.cfg.In).ReadString('\n')
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
func (c *command) complete(list client.ObjectList, names func() []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		cl, err := c.client()
		if err != nil || cl.List(cmd.Context(), list) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return slices.DeleteFunc(names(), func(n string) bool { return slices.Contains(args, n) }), cobra.ShellCompDirectiveNoFileComp
	}
}

func (c *command) completeUsers() cobra.CompletionFunc {
	list := &api.UserList{}
	return c.complete(list, func() []string {
		var out []string
		for _, u := range list.Items {
			out = append(out, u.Name)
		}
		return out
	})
}

func (c *command) completeGroups() cobra.CompletionFunc {
	list := &api.GroupList{}
	return c.complete(list, func() []string {
		var out []string
		for _, g := range list.Items {
			out = append(out, g.Name)
		}
		return out
	})
}
