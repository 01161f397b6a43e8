// Package ns is `atoll ns`: SupervisorNamespaces for people, made of the same API that kubectl uses.
//
// It reads and writes SupervisorNamespaces and their templates with the caller's own kubeconfig and permissions, and
// shows what is used of each limit. It bounds nothing itself, and needs no rights on the host. internal/cli adds Command
// to the command line; `kubectl atoll ns` is the same.
//
// What can go wrong: an object is missing or may not be changed, which the error names with the way out; somebody else
// has changed it meanwhile, which is tried again where flags say what to change and told where an editor does; or
// something takes long, which every command that waits explains with what the conditions say.
package ns

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	"atoll.dev/atoll/internal/cli/command"
)

// Config is what the command line hands over.
type Config struct {
	command.App
	// Kubeconfig is the file to use when neither flag nor environment names one; "" is kubectl's own default.
	Kubeconfig func() string
	Getenv     func(string) string
	// Edit lets a person change a file, with $EDITOR.
	Edit func(ctx context.Context, path string) error
}

// commands is what the commands share.
type commands struct {
	Config
	flags *cluster.Flags
	now   func() time.Time
	// connect makes the session, and width is that of the terminal; tests replace them.
	connect func() (client.WithWatch, error)
	width   func() int
}

// Command is `atoll ns`.
func Command(cfg Config) *cobra.Command {
	c := &commands{Config: cfg, now: time.Now}
	c.connect, c.width = c.dial, c.terminal
	return c.command()
}

func (c *commands) command() *cobra.Command {
	cmd := command.Group("ns", "Bound namespaces: limits, storage, classes, people, network", `  atoll ns create shop --cpu-limit 8 --memory-limit 16Gi --owner anna
  atoll ns ls
  atoll ns describe shop
  atoll ns edit shop --memory-limit 32Gi`,
		c.listCommand(), c.createCommand(), c.describeCommand(), c.editCommand(), c.deleteCommand(), c.topCommand(), c.templateCommand())
	cmd.Aliases = []string{"namespace", "namespaces"}
	cmd.Long = `A SupervisorNamespace is a namespace with what an administrator bounds it by: limits of CPU, memory and storage over
pods and virtual machines together, who may do what in it, and which storage, classes, images, hosts and networks it has.`
	c.flags = &cluster.Flags{Getenv: c.Getenv, Kubeconfig: c.Kubeconfig}
	c.flags.AddFlags(cmd, false)
	return cmd
}

// dial connects with the caller's kubeconfig.
func (c *commands) dial() (client.WithWatch, error) {
	config, err := c.flags.Config()
	if err != nil {
		return nil, err
	}
	return cluster.Connect(config, vmopv1.AddToScheme, atoll.AddToScheme)
}

// with runs f with a connection.
func (c *commands) with(f func(client.WithWatch, *cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		s, err := c.connect()
		if err != nil {
			return err
		}
		return f(s, cmd, args)
	}
}

// structured prints an object as JSON, YAML or name and tells whether it did.
func (c *commands) structured(format string, b *atoll.SupervisorNamespace) (bool, error) {
	switch format {
	case "json", "yaml":
		typed(b)
		return true, c.Structured(format, b)
	case "name":
		c.Printf("supervisornamespace.atoll.dev/%s\n", b.Name)
		return true, nil
	}
	return false, nil
}

// typed fills in what the client leaves out of an object, and drops what nobody reads.
func typed(b *atoll.SupervisorNamespace) {
	b.SetGroupVersionKind(atoll.GroupVersion().WithKind("SupervisorNamespace"))
	b.ManagedFields = nil
}

// get reads a SupervisorNamespace. An error says how to see which there are.
func (c *commands) get(ctx context.Context, s client.Client, name string) (*atoll.SupervisorNamespace, error) {
	b := &atoll.SupervisorNamespace{}
	err := s.Get(ctx, client.ObjectKey{Name: name}, b)
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("no SupervisorNamespace %q; `atoll ns ls` lists them: %w", name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("reading SupervisorNamespace %s: %w", name, err)
	}
	return b, nil
}

// lookEvery is how often a command that waits looks.
const lookEvery = 500 * time.Millisecond

// waiting are the flags of commands that wait.
type waiting struct {
	wait    bool
	timeout time.Duration
}

func (w *waiting) add(cmd *cobra.Command, what string) {
	cmd.Flags().BoolVar(&w.wait, "wait", true, "wait until "+what)
	cmd.Flags().DurationVar(&w.timeout, "timeout", 5*time.Minute, "how long to wait; what was begun goes on after it")
}

// await looks until it is done, and says what it waits for when that changes.
func (c *commands) await(ctx context.Context, name string, w waiting, look func(context.Context) (done bool, how string, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	said := ""
	err := wait.PollUntilContextCancel(ctx, lookEvery, true, func(ctx context.Context) (bool, error) {
		done, how, err := look(ctx)
		if err != nil && cluster.Temporary(err) {
			how, err = err.Error(), nil
		}
		if err != nil || done {
			return done, err
		}
		if how != "" && how != said {
			c.Tell("%s: %s\n", name, how)
			said = how
		}
		return false, nil
	})
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%s is not done after %s: %s; it goes on, see `atoll ns describe %s`", name, w.timeout, cmp.Or(said, "nothing is known"), name)
	}
	return err
}
