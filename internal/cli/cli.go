// Package cli is the command line of atoll. It is the only reader of flags,
// environment variables and configuration files: everything below gets plain
// values.
//
// It contains no logic of its own beyond turning words into configurations and
// results into text. It is called by cmd/atoll. Errors go to standard error in
// one line that says what to do, with exit code 1; wrong usage has exit code 2.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/disks"
	"atoll.dev/atoll/internal/cli/netpol"
	"atoll.dev/atoll/internal/datadir"
)

// app is what the commands share.
type app struct {
	command.App
	version, dataDir, logFormat string
}

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

// Main runs the command that args name and returns the exit code.
func Main(version string, args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	a := &app{version: version, App: command.App{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}}
	a.Tree = a.tree
	if err := settleProcess(); err != nil {
		fmt.Fprintln(a.ErrOut, "Error:", err)
		return exitFailed
	}
	root := a.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if _, silent := errors.AsType[command.SilentError](err); !silent {
		fmt.Fprintln(a.ErrOut, "Error:", err)
	}
	if _, usage := errors.AsType[command.UsageError](err); usage {
		return exitUsage
	}
	return exitFailed
}

// settleProcess makes the process independent of who started it: system programs
// are found even where PATH is that of an ordinary user, and files get the modes
// they are made with.
func settleProcess() error {
	unix.Umask(0o022)
	path := filepath.SplitList(os.Getenv("PATH"))
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if !slices.Contains(path, dir) {
			path = append(path, dir)
		}
	}
	if err := os.Setenv("PATH", strings.Join(path, string(filepath.ListSeparator))); err != nil {
		return fmt.Errorf("setting PATH: %w", err)
	}
	return nil
}

func (a *app) root() *cobra.Command {
	root := command.Group("atoll", "Kubernetes on this host, with every pod in its own micro-VM", `  atoll preflight            see whether this host can run Atoll
  atoll up --detach          start it in the background
  atoll kubectl get pods -A
  atoll down --purge         remove every trace of it`)
	root.Long = `Atoll turns a Linux host into a Kubernetes cluster in which every ordinary pod
runs in its own QEMU micro-VM.`
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetOut(a.Out)
	root.SetErr(a.ErrOut)
	root.PersistentFlags().StringVar(&a.dataDir, "data-dir", envOr("ATOLL_DATA_DIR", datadir.DefaultRoot),
		"directory of all state (environment: ATOLL_DATA_DIR)")
	root.PersistentFlags().StringVar(&a.logFormat, "log-format", "text", "format of log lines: text or json")
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(
		a.upCommand(), a.downCommand(), a.statusCommand(), a.logsCommand(),
		a.preflightCommand(), a.kubectlCommand(), a.versionCommand(), a.keeperCommand(), a.imageCommand(),
		a.vmCommand(), a.nsCommand(), netpol.Command(a.App, podNetwork), a.registryCommand(),
	)
	root.AddCommand(disks.Commands(a.App)...)
	root.AddCommand(a.peopleCommands()...)
	root.AddCommand(a.roleCommands()...)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	return root
}

// tree is the data directory the user chose.
func (a *app) tree() (datadir.Tree, error) {
	t, err := datadir.New(a.dataDir)
	if err != nil {
		return t, command.UsageError{Err: fmt.Errorf("--data-dir: %w", err)}
	}
	return t, nil
}

// logger writes to w in the chosen format.
func (a *app) logger(w io.Writer) (*slog.Logger, error) {
	switch a.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(w, nil)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, nil)), nil
	}
	return nil, command.UsageError{Err: fmt.Errorf("--log-format %q: use text or json", a.logFormat)}
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// flagError adds to an error about flags which ones there are.
func flagError(cmd *cobra.Command, err error) error {
	if errors.Is(err, pflag.ErrHelp) {
		return err
	}
	var names []string
	add := func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, "--"+f.Name)
		}
	}
	cmd.LocalFlags().VisitAll(add)
	cmd.InheritedFlags().VisitAll(add)
	slices.Sort(names)
	return command.UsageError{Err: fmt.Errorf("%w\nflags of %q: %s", err, cmd.CommandPath(), strings.Join(slices.Compact(names), " "))}
}
