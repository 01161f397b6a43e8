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
	"fmt"
	"time"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	"atoll.dev/atoll/internal/cli/command"
)

// Config is what the command line hands over.
type Config struct {
	command.App
	// Kubeconfig is the file to use when neither flag nor environment names one; "" is kubectl's own default.
	Kubeconfig func() string
	// Getenv says where a person's own files are.
	Getenv func(string) string
	// Export writes an image of a namespace into a file, whose name says the format if that is empty.
	Export func(ctx context.Context, kubeconfig, namespace, image, format, file string) error
}

// commands is what the commands share.
type commands struct {
	Config
	flags *cluster.Flags
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

// Command is `atoll vm`.
func Command(cfg Config) *cobra.Command {
	c := &commands{Config: cfg, now: time.Now}
	c.connect = c.dial
	return c.command()
}

func (c *commands) command() *cobra.Command {
	cmd := command.Group("vm", "Make and use virtual machines", `  atoll vm create box --image debian-12
  atoll vm ls
  atoll vm ssh box`,
		c.listCommand(), c.createCommand(), c.describeCommand(), c.eventsCommand(), c.deleteCommand(),
		c.startCommand(), c.stopCommand(), c.restartCommand(), c.suspendCommand(),
		c.consoleCommand(), c.vncCommand(), c.sshCommand(),
		c.snapshotCommand(), c.snapshotsCommand(), c.revertCommand(),
		c.resizeCommand(), c.cloneCommand(), c.publishCommand(), c.exportCommand(),
	)
	cmd.Aliases = []string{"vms"}
	c.flags = &cluster.Flags{Getenv: c.Getenv, Kubeconfig: c.Kubeconfig}
	c.flags.AddFlags(cmd, true)
	return cmd
}

// dial connects with the caller's kubeconfig.
func (c *commands) dial() (*session, error) {
	config, err := c.flags.Config()
	if err != nil {
		return nil, err
	}
	namespace, _, err := c.flags.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return nil, fmt.Errorf("choosing the namespace: %w", err)
	}
	cl, err := cluster.Connect(config, vmopv1.AddToScheme, imageregistry.AddToScheme)
	if err != nil {
		return nil, err
	}
	return &session{WithWatch: cl, config: config, namespace: namespace}, nil
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
		return true, c.Structured(format, object)
	case "name":
		c.Printf("virtualmachine.vmoperator.vmware.com/%s\n", object.GetName())
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
