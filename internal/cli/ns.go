package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/ns"
)

// nsCommand is `atoll ns`, which has a package of its own.
func (a *app) nsCommand() *cobra.Command {
	return ns.Command(ns.Config{
		App: a.App, Getenv: os.Getenv,
		Kubeconfig: a.adminKubeconfig,
		Edit:       a.edit,
	})
}

// adminKubeconfig is that of the supervisor on this host, "" where there is none or it may not be read.
func (a *app) adminKubeconfig() string {
	t, err := a.tree()
	if err != nil {
		return ""
	}
	f, err := os.Open(t.AdminKubeconfig())
	if err != nil {
		return ""
	}
	_ = f.Close()
	return t.AdminKubeconfig()
}

// errNoEditor says how to have an editor.
var errNoEditor = errors.New("no editor: set EDITOR, or change it by flags (see --help)")

// edit opens a file in the editor of who is at the terminal. The variable may hold arguments, as with kubectl.
func (a *app) edit(ctx context.Context, path string) error {
	editor := envOr("KUBE_EDITOR", envOr("EDITOR", ""))
	if editor == "" {
		for _, name := range []string{"vi", "nano"} {
			if found, err := exec.LookPath(name); err == nil {
				editor = found
				break
			}
		}
	}
	if editor == "" {
		return errNoEditor
	}
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", editor+` "$1"`, "sh", path)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, a.ErrOut
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running %s: %w", editor, err)
	}
	return nil
}
