package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/tail"
)

func (a *app) logsCommand() *cobra.Command {
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use:   "logs <service>",
		Short: "Print the log of a service of this host",
		Long:  "Prints the end of a service's log: up, containerd, pool, server, agent or keeper.",
		Example: `  atoll logs server
  atoll logs agent -f -n 20`,
		Args: command.ExactArgs("service"),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			if filepath.Base(args[0]) != args[0] {
				return command.UsageError{Err: fmt.Errorf("%q is not the name of a service", args[0])}
			}
			f, err := os.Open(t.Log(args[0]))
			if errors.Is(err, os.ErrNotExist) {
				return command.UsageError{Err: fmt.Errorf("no log of %q; there are: %s", args[0], logNames(t.Logs()))}
			}
			if err != nil {
				return fmt.Errorf("opening the log: %w", err)
			}
			defer f.Close()
			return tail.Print(cmd.Context(), a.Out, f, lines, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on printing what is added")
	cmd.Flags().IntVarP(&lines, "lines", "n", 100, "lines to begin with")
	return cmd
}

func logNames(dir string) string {
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil || len(files) == 0 {
		return "none yet"
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".log")
	}
	slices.Sort(files)
	return strings.Join(files, " ")
}
