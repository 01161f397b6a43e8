package cli

import (
	"os"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/registry"
	"atoll.dev/atoll/internal/cli/up"
)

// registryCommand is about the cluster's registry. It uses the kubeconfig of the environment, or the administrator's of
// the data directory.
func (a *app) registryCommand() *cobra.Command {
	return registry.Config{
		App: a.App,
		Where: func() (string, string, error) {
			if kubeconfig := os.Getenv("KUBECONFIG"); kubeconfig != "" {
				return kubeconfig, "", nil
			}
			t, err := a.tree()
			return t.AdminKubeconfig(), up.PortalOf(t), err
		},
	}.Command()
}
