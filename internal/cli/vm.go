package cli

import (
	"os"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/vm"
)

// vmCommand is `atoll vm`, which has a package of its own.
func (a *app) vmCommand() *cobra.Command {
	return vm.Command(vm.Config{
		In: os.Stdin, Out: a.out, ErrOut: a.errOut, Getenv: os.Getenv,
		Kubeconfig: func() string {
			t, err := a.tree()
			if err != nil {
				return ""
			}
			if _, err := os.Stat(t.AdminKubeconfig()); err != nil {
				return ""
			}
			return t.AdminKubeconfig()
		},
		Usage:  func(err error) error { return usageError{err} },
		Silent: func(err error) error { return silentError{err} },
	})
}
