package cli

import (
	"os"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/login"
	"atoll.dev/atoll/internal/cli/people"
	"atoll.dev/atoll/internal/datadir/pki"
)

// loginConfig is what logging in gets of the environment.
func (a *app) loginConfig() login.Config {
	home, _ := os.UserHomeDir() // "" is said when it matters
	return login.Config{
		App: a.App, Getenv: os.Getenv, Home: home,
		Authority: func() ([]byte, error) {
			t, err := a.tree()
			if err != nil {
				return nil, err
			}
			return os.ReadFile(pki.Files{Dir: t.PKI()}.CACert(pki.ClusterCA))
		},
	}
}

// peopleCommands are login, logout, whoami, user and group.
func (a *app) peopleCommands() []*cobra.Command {
	cfg := people.Config{
		App: a.App,
		Kubeconfig: func() (string, error) {
			t, err := a.tree()
			if err != nil {
				return "", err
			}
			f, err := os.Open(t.AdminKubeconfig())
			if os.Getenv("KUBECONFIG") != "" || err != nil {
				return "", nil // that of the person
			}
			return t.AdminKubeconfig(), f.Close()
		},
		Passwd: login.PasswdCommand(a.loginConfig()),
	}
	return append(login.Commands(a.loginConfig()), people.UserCommand(cfg), people.GroupCommand(cfg))
}
