package cli

import (
	"context"
	"os"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/vm"
	"atoll.dev/atoll/internal/cli/vmimage"
)

// vmCommand is `atoll vm`, which has a package of its own.
func (a *app) vmCommand() *cobra.Command {
	return vm.Command(vm.Config{
		App: a.App, Getenv: os.Getenv,
		Kubeconfig: a.adminKubeconfig,
		Export: func(ctx context.Context, kubeconfig, namespace, image, format, file string) error {
			images := a.vmImages()
			if kubeconfig != "" {
				images.Kubeconfig = func() (string, error) { return kubeconfig, nil }
			}
			return images.Export(ctx, vmimage.ExportOptions{Name: image, Namespace: namespace, Format: format, File: file, Disk: -1})
		},
	})
}
