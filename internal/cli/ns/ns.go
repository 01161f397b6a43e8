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
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/text"
)

// Config is what the command line hands over.
type Config struct {
	In          io.Reader
	Out, ErrOut io.Writer
	// Kubeconfig is the file to use when neither flag nor environment names one; "" is kubectl's own default.
	Kubeconfig func() string
	Getenv     func(string) string
	// Edit lets a person change a file, with $EDITOR.
	Edit func(ctx context.Context, path string) error
	// Usage marks an error as the user's own.
	Usage func(error) error
}

// commands is what the commands share.
type commands struct {
	Config
	flags *genericclioptions.ConfigFlags
	now   func() time.Time
	// connect makes the session, and width is that of the terminal; tests replace them.
	connect func() (client.WithWatch, error)
	width   func() int
}

// errNoCluster is wrapped when there is nothing to talk to.
var errNoCluster = errors.New("no cluster is known; is it up (`atoll status`), or does --kubeconfig name another one?")

// Command is `atoll ns`.
func Command(cfg Config) *cobra.Command {
	c := &commands{Config: cfg, now: time.Now}
	c.connect, c.width = c.dial, c.terminal
	return c.command()
}

func (c *commands) command() *cobra.Command {
	flags := genericclioptions.NewConfigFlags(true)
	c.flags = &genericclioptions.ConfigFlags{
		Context: flags.Context, KubeConfig: flags.KubeConfig, Impersonate: flags.Impersonate, ImpersonateGroup: flags.ImpersonateGroup,
	}
	cmd := &cobra.Command{
		Use:     "ns",
		Aliases: []string{"namespace", "namespaces"},
		Short:   "Bound namespaces: limits, storage, classes, people, network",
		Long: `A SupervisorNamespace is a namespace with what an administrator bounds it by: limits of CPU, memory and storage over
pods and virtual machines together, who may do what in it, and which storage, classes, images, hosts and networks it has.`,
		Example: `  atoll ns create shop --cpu-limit 8 --memory-limit 16Gi --owner anna
  atoll ns ls
  atoll ns describe shop
  atoll ns edit shop --memory-limit 32Gi`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			return c.unknown(cmd, args[0])
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.flags.AddFlags(cmd.PersistentFlags())
	cmd.AddCommand(c.listCommand(), c.createCommand(), c.describeCommand(), c.editCommand(), c.deleteCommand(), c.topCommand(), c.templateCommand())
	return cmd
}

func (c *commands) unknown(cmd *cobra.Command, got string) error {
	var names []string
	for _, sub := range cmd.Commands() {
		names = append(names, sub.Name())
	}
	hint := ""
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(got); len(near) > 0 {
		hint = fmt.Sprintf(" (did you mean %s?)", strings.Join(near, " or "))
	}
	return c.Usage(fmt.Errorf("unknown command %q%s\ncommands of %q: %s", got, hint, cmd.CommandPath(), strings.Join(names, " ")))
}

// newScheme knows the kinds that the commands use.
func newScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, vmopv1.AddToScheme, atoll.AddToScheme} {
		if err := add(s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// dial connects with the caller's kubeconfig.
func (c *commands) dial() (client.WithWatch, error) {
	if *c.flags.KubeConfig == "" && c.Getenv("KUBECONFIG") == "" {
		if file := c.Kubeconfig(); file != "" {
			c.flags.KubeConfig = &file
		}
	}
	config, err := c.flags.ToRESTConfig()
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", errNoCluster, err)
	}
	config.QPS = -1
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	cl, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("reaching the API server: %w", err)
	}
	return cl, nil
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

func (c *commands) printf(format string, args ...any) {
	// There is nobody to tell when the terminal is gone.
	_, _ = fmt.Fprintf(c.Out, format, args...)
}

// tell writes for people, beside the output.
func (c *commands) tell(format string, args ...any) { _, _ = fmt.Fprintf(c.ErrOut, format, args...) }

// output adds -o with the formats that a command knows.
func (c *commands) output(cmd *cobra.Command, into *string, formats ...string) {
	cmd.Flags().StringVarP(into, "output", "o", formats[0], "output format: "+strings.Join(formats, ", "))
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if !slices.Contains(formats, *into) {
			return c.Usage(fmt.Errorf("--output %q: use %s", *into, strings.Join(formats, ", ")))
		}
		return nil
	}
	c.complete(cmd, "output", func(context.Context, client.WithWatch) []string { return formats })
}

// oneName wants the name of a namespace.
func (c *commands) oneName(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return c.Usage(fmt.Errorf("%q wants <name>, got %d arguments; see %q", cmd.CommandPath(), len(args), cmd.CommandPath()+" --help"))
	}
	return nil
}

// structured prints an object as JSON, YAML or name and tells whether it did.
func (c *commands) structured(format string, b *atoll.SupervisorNamespace) (bool, error) {
	switch format {
	case "json", "yaml":
		typed(b)
		return true, text.Structured(c.Out, format, b)
	case "name":
		c.printf("supervisornamespace.atoll.dev/%s\n", b.Name)
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
		if err != nil && temporary(err) {
			how, err = err.Error(), nil
		}
		if err != nil || done {
			return done, err
		}
		if how != "" && how != said {
			c.tell("%s: %s\n", name, how)
			said = how
		}
		return false, nil
	})
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%s is not done after %s: %s; it goes on, see `atoll ns describe %s`", name, w.timeout, cmp.Or(said, "nothing is known"), name)
	}
	return err
}

// temporary tells whether the API server may answer soon.
func temporary(err error) bool {
	return apierrors.IsTimeout(err) || apierrors.IsServerTimeout(err) || apierrors.IsTooManyRequests(err) || apierrors.IsServiceUnavailable(err) ||
		apierrors.IsInternalError(err)
}

// stdin is the terminal that the command was called from, nil when it is none.
func (c *commands) stdin() *os.File {
	f, ok := c.In.(*os.File)
	if !ok || !text.IsTerminal(f) {
		return nil
	}
	return f
}
