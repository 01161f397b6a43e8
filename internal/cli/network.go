package cli

import (
	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/netpol"
)

func (a *app) networkCommand() *cobra.Command {
	return netpol.Command(netpol.App{
		Out: a.out, Tree: a.tree, Network: podNetwork, NoArgs: noArgs, OutputFlag: outputFlag, LastLines: lastLines,
		Usage: func(err error) error { return usageError{err} },
	})
}
