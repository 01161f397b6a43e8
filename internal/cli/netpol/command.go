package netpol

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/network/cniconf"
)

// Command is `atoll network`; network says what pods of a data directory are in.
func Command(a command.App, network func(datadir.Tree) cniconf.Network) *cobra.Command {
	return command.Group("network", "See what network policies do on this host", `  atoll network denied -f
  atoll network counters -n shop`, deniedCommand(a), countersCommand(a, network))
}

func deniedCommand(a command.App) *cobra.Command {
	var namespace string
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use:   "denied",
		Short: "Print what network policies have denied",
		Long: `Prints the log of traffic that network policies have denied on this host, of one namespace or of all: when,
by the policies of the receiver (ingress) or of the sender (egress), by which tier, and who it was. What repeats itself
is one line with a count, and a namespace that is denied very much is not logged completely; the counters
("atoll network counters") are complete.`,
		Example: `  atoll network denied -n shop
  atoll network denied -f`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.Tree()
			if err != nil {
				return err
			}
			if namespace != "" && (filepath.Base(namespace) != namespace || namespace == "." || namespace == "..") {
				return command.UsageError{Err: fmt.Errorf("-n: %q is no name of a namespace", namespace)}
			}
			return printDenied(cmd.Context(), a.Out, t.Denied(), namespace, lines, follow)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only of this namespace")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on printing what is added")
	cmd.Flags().IntVar(&lines, "lines", 100, "lines to begin with, of each namespace")
	return cmd
}

func countersCommand(a command.App, network func(datadir.Tree) cniconf.Network) *cobra.Command {
	var namespace, output string
	cmd := &cobra.Command{
		Use:   "counters",
		Short: "Show how often network policies have allowed and denied",
		Long: `Shows for each policy how many connections it has allowed to begin (as often as a rule of it was the one that did),
and for each namespace how many packets were denied. It counts this host since the agent has started.`,
		Example: `  atoll network counters -n shop
  atoll network counters -o json`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.Tree()
			if err != nil {
				return err
			}
			counts, err := count(cmd.Context(), t.PolicyStatus(), network(t), namespace)
			if err != nil {
				return err
			}
			if output != "table" {
				return a.Structured(output, counts.list)
			}
			counts.print(a.Out)
			return nil
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only of this namespace")
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}
