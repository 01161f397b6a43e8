// Package vm is `atoll vm`: virtual machines for people, made of the same API that kubectl uses.
//
// It reads and writes VirtualMachines and what belongs to them with the caller's own kubeconfig and permissions,
// and opens consoles through the API server. It runs no virtual machine and needs no rights on the host. internal/cli
// adds Command to the command line; `kubectl atoll vm` is the same.
//
// What can go wrong: an object is missing or may not be changed, which the error names with the way out; or
// something takes long, which every command that waits explains with what the conditions say.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/text"
)

// Config is what the command line hands over.
type Config struct {
	In          io.Reader
	Out, ErrOut io.Writer
	// Kubeconfig is the file to use when neither flag nor environment names one; "" is kubectl's own default.
	Kubeconfig func() string
	// Getenv and Home say where a person's own files are.
	Getenv func(string) string
	// Export writes an image of a namespace into a file, whose name says the format if that is empty.
	Export func(ctx context.Context, kubeconfig, namespace, image, format, file string) error
	// Usage marks an error as the user's own, Silent as one that has been told already.
	Usage, Silent func(error) error
}

// commands is what the commands share.
type commands struct {
	Config
	flags *genericclioptions.ConfigFlags
	// now is the clock.
	now func() time.Time
	// connect makes the session; tests replace it.
	connect func() (*session, error)
}

// session is a connection to the API server.
type session struct {
	client.WithWatch
	config    *rest.Config
	namespace string
}

// errNoCluster is wrapped when there is nothing to talk to.
var errNoCluster = errors.New("no cluster is known; is it up (`atoll status`), or does --kubeconfig name another one?")

// Command is `atoll vm`.
func Command(cfg Config) *cobra.Command {
	c := &commands{Config: cfg, now: time.Now}
	c.connect = c.dial
	return c.command()
}

func (c *commands) command() *cobra.Command {
	flags := genericclioptions.NewConfigFlags(true)
	c.flags = &genericclioptions.ConfigFlags{
		Namespace: flags.Namespace, Context: flags.Context, KubeConfig: flags.KubeConfig,
		Impersonate: flags.Impersonate, ImpersonateGroup: flags.ImpersonateGroup,
	}
	cmd := &cobra.Command{
		Use:     "vm",
		Aliases: []string{"vms"},
		Short:   "Make and use virtual machines",
		Example: `  atoll vm create box --image debian-12
  atoll vm ls
  atoll vm ssh box`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			return c.unknown(cmd, args[0])
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.flags.AddFlags(cmd.PersistentFlags())
	cmd.AddCommand(
		c.listCommand(), c.createCommand(), c.describeCommand(), c.eventsCommand(), c.deleteCommand(),
		c.startCommand(), c.stopCommand(), c.restartCommand(), c.suspendCommand(),
		c.consoleCommand(), c.vncCommand(), c.sshCommand(),
		c.snapshotCommand(), c.snapshotsCommand(), c.revertCommand(),
		c.resizeCommand(), c.cloneCommand(), c.publishCommand(), c.exportCommand(),
	)
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
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, vmopv1.AddToScheme, imageregistry.AddToScheme} {
		if err := add(s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// dial connects with the caller's kubeconfig.
func (c *commands) dial() (*session, error) {
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
	namespace, _, err := c.flags.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return nil, fmt.Errorf("choosing the namespace: %w", err)
	}
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	cl, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("reaching the API server: %w", err)
	}
	return &session{WithWatch: cl, config: config, namespace: namespace}, nil
}

func (c *commands) printf(format string, args ...any) {
	// There is nobody to tell when the terminal is gone.
	_, _ = fmt.Fprintf(c.Out, format, args...)
}

// tell writes for people, beside the output.
func (c *commands) tell(format string, args ...any) { _, _ = fmt.Fprintf(c.ErrOut, format, args...) }

// output adds -o with the formats that every list has.
func (c *commands) output(cmd *cobra.Command, into *string, formats ...string) {
	cmd.Flags().StringVarP(into, "output", "o", formats[0], "output format: "+strings.Join(formats, ", "))
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if !slices.Contains(formats, *into) {
			return c.Usage(fmt.Errorf("--output %q: use %s", *into, strings.Join(formats, ", ")))
		}
		return nil
	}
	c.complete(cmd, "output", func(*session, *cobra.Command) []string { return formats })
}

// names wants arguments by name, the last of which may be given several times when it ends in "...".
func (c *commands) names(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		many := len(names) > 0 && strings.HasSuffix(names[len(names)-1], "...")
		if len(args) == len(names) || many && len(args) > len(names) {
			return nil
		}
		if len(names) == 0 {
			return c.Usage(fmt.Errorf("%q takes no arguments, got %q; see %q", cmd.CommandPath(), args[0], cmd.CommandPath()+" --help"))
		}
		return c.Usage(fmt.Errorf("%q wants <%s>, got %d arguments; see %q",
			cmd.CommandPath(), strings.Join(names, "> <"), len(args), cmd.CommandPath()+" --help"))
	}
}

// with runs f with a connection.
func (c *commands) with(f func(*session, *cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		s, err := c.connect()
		if err != nil {
			return err
		}
		return f(s, cmd, args)
	}
}

// structured prints objects as JSON, YAML or names and tells whether it did.
func (c *commands) structured(format string, object client.Object) (bool, error) {
	switch format {
	case "json", "yaml":
		typed(object)
		return true, text.Structured(c.Out, format, object)
	case "name":
		c.printf("virtualmachine.vmoperator.vmware.com/%s\n", object.GetName())
		return true, nil
	}
	return false, nil
}

// typed fills in what the client leaves out of an object, and drops what nobody reads.
func typed(object client.Object) {
	if _, ok := object.(*vmopv1.VirtualMachine); ok {
		object.GetObjectKind().SetGroupVersionKind(vmopv1.GroupVersion.WithKind("VirtualMachine"))
	}
	object.SetManagedFields(nil)
}

// interactive tells whether somebody watches.
func (c *commands) interactive() bool { return text.IsTerminal(c.ErrOut) }

// stdin is the terminal that the command was called from, nil when it is none.
func (c *commands) stdin() *os.File {
	f, ok := c.In.(*os.File)
	if !ok || !text.IsTerminal(f) {
		return nil
	}
	return f
}
