package cli

import (
	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/netpol"
)

func (a *app) networkCommand() *cobra.Command {
	return netpol.Command(netpol.App{
		Out: a.out, Tree: a.tree, Network: podNetwork, NoArgs: command.NoArgs, OutputFlag: command.OutputFlag, LastLines: lastLines,
		Usage: func(err error) error { return command.UsageError{Err: err} },
	})
}
