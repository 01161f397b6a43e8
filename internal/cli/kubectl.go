package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	componentcli "k8s.io/component-base/cli"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/plugin"

	"atoll.dev/atoll/internal/datadir"
)

func (a *app) kubectlCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "kubectl [kubectl arguments]",
		Short: "Run kubectl against this cluster",
		Long: `Runs the kubectl that is built in. Unless --kubeconfig or KUBECONFIG says
otherwise it uses the administrator's kubeconfig of the data directory. All
arguments but --data-dir are kubectl's.`,
		Example: `  atoll kubectl get pods -A
  atoll kubectl run box --image=busybox -it --rm -- sh
  atoll kubectl --help`,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, args := takeDataDir(args)
			if dir != "" {
				a.dataDir = dir
			}
			t, err := a.tree()
			if err != nil {
				return err
			}
			if len(args) > 0 && args[0] == "atoll" { // what a plugin kubectl-atoll would be
				dir := a.dataDir
				root := a.root()
				root.SetArgs(append([]string{"--data-dir", dir}, args[1:]...))
				return root.ExecuteContext(cmd.Context())
			}
			return runKubectl(t, args)
		},
	}
}

// runKubectl leaves the rest of the process to kubectl, which exits by itself
// when it fails.
func runKubectl(t datadir.Tree, args []string) error {
	if os.Getenv("KUBECONFIG") == "" {
		if _, err := os.Stat(t.AdminKubeconfig()); err == nil {
			if err := os.Setenv("KUBECONFIG", t.AdminKubeconfig()); err != nil {
				return fmt.Errorf("choosing the kubeconfig: %w", err)
			}
		}
	}
	streams := genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}
	cmd := kubectl.NewDefaultKubectlCommandWithArgs(kubectl.KubectlOptions{
		PluginHandler: kubectl.NewDefaultPluginHandler(plugin.ValidPluginFilenamePrefixes),
		Arguments:     append([]string{"kubectl"}, args...),
		ConfigFlags: genericclioptions.NewConfigFlags(true).WithDeprecatedPasswordFlag().
			WithDiscoveryBurst(300).WithDiscoveryQPS(50.0).WithWarningPrinter(streams),
		IOStreams: streams,
	})
	cmd.SetArgs(args)
	if err := componentcli.RunNoErrOutput(cmd); err != nil {
		return err
	}
	return nil
}

// takeDataDir removes --data-dir from kubectl's arguments.
func takeDataDir(args []string) (dir string, rest []string) {
	for i := 0; i < len(args); i++ {
		value, joined := strings.CutPrefix(args[i], "--data-dir=")
		switch {
		case args[i] == "--":
			return dir, append(rest, args[i:]...)
		case joined:
			dir = value
		case args[i] == "--data-dir" && i+1 < len(args):
			i++
			dir = args[i]
		default:
			rest = append(rest, args[i])
		}
	}
	return dir, rest
}
