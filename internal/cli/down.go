package cli

import (
	"errors"
	"os"
	"time"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/down"
)

func (a *app) downCommand() *cobra.Command {
	var purge bool
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop Atoll on this host, pods included",
		Long: `Stops the pods, the cluster and the supervisor, and removes what they left in
the kernel: mounts, interfaces, network namespaces, packet filter tables and
cgroups. The data directory stays, so that a later "atoll up" goes on where this
one ended. Works, as often as needed, on a host where only parts still run.`,
		Example: `  atoll down
  atoll down --purge     # also delete the data directory`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("atoll down must run as root, for example with sudo")
			}
			logger, err := a.logger(a.ErrOut)
			if err != nil {
				return err
			}
			d, err := down.New(down.Config{
				Tree: t, Purge: purge, Grace: grace, Logger: logger,
				Progress: func(line string) { a.Printf("%s\n", line) },
			})
			if err != nil {
				return err
			}
			if err := d.Run(cmd.Context()); err != nil {
				return err
			}
			a.Printf("atoll is down\n")
			return nil
		},
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "also delete the data directory and everything in it")
	cmd.Flags().DurationVar(&grace, "grace", 10*time.Second, "time pods have to end by themselves")
	return cmd
}
