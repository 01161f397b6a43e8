package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/assets"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/detach"
	"atoll.dev/atoll/internal/cli/people"
	"atoll.dev/atoll/internal/cli/up"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/preflight"
	"atoll.dev/atoll/internal/supervise"
)

// upFlags are the flags of `atoll up`.
type upFlags struct {
	detach     bool
	background bool
	timeout    time.Duration
	settings   up.Settings
}

func (a *app) upCommand() *cobra.Command {
	var f upFlags
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start a cluster on this host",
		Long: `Checks the host, then starts containerd, the warm pool of micro-VMs, the control
plane and the node agent, and keeps them running. In the foreground, Ctrl-C
stops them; pods go on and are taken over by the next start.

With --detach it keeps running in the background (as the systemd unit
atoll.service, started at boot; without systemd under a keeper process) and the
command returns when the node is Ready. Doing it again is fine; new flags or a
new binary take effect then.

Choices are remembered in the data directory: a later start without flags makes
the same ones.`,
		Example: `  atoll up --detach
  atoll up --data-dir /srv/atoll --node-ip 192.168.1.10 --pool-size 8
  atoll up --kernel /boot/vmlinuz-6.1.0-56-cloud-amd64`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			settings, err := a.settings(cmd, t, f.settings)
			if err != nil {
				return err
			}
			if f.background {
				return a.upBackground(cmd.Context(), t, settings)
			}
			if err := requirePreflight(cmd.Context(), t, settings, a.note); err != nil {
				return err
			}
			if f.detach {
				return a.upDetached(cmd.Context(), t, settings, f.timeout)
			}
			return a.upForeground(cmd.Context(), t, settings)
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&f.detach, "detach", "d", false, "keep running in the background, return when the node is Ready")
	flags.BoolVar(&f.background, "background", false, "be the background process of --detach")
	if err := flags.MarkHidden("background"); err != nil {
		panic(err) // the line above defines it
	}
	flags.DurationVar(&f.timeout, "timeout", 5*time.Minute, "how long --detach waits for the node to be Ready")
	flags.StringVar(&f.settings.NodeName, "node-name", "", "name of the Node (default: the host's name)")
	flags.StringVar(&f.settings.NodeIP, "node-ip", "", "IPv4 address of this host (default: that of the default route)")
	flags.IntVar(&f.settings.PoolSize, "pool-size", 0, "micro-VMs to keep ready, 0 to 64 (default 4)")
	flags.IntVar(&f.settings.MaxPods, "max-pods", 0, "pods this node accepts, 1 to 1000 (default 500)")
	flags.StringSliceVar(&f.settings.TLSSANs, "tls-san", nil, "further name or address of the API server and the portal; may be repeated")
	flags.IntVar(&f.settings.PortalPort, "portal-port", 0, "port that people log in at and push images to (default 443)")
	flags.StringVar(&f.settings.LoadBalancerRange, "load-balancer-range", "", "addresses for load balancers whose ports are taken on this host's own address (default 10.97.0.0/24)")
	flags.StringVar(&f.settings.Accelerator, "accelerator", "", "auto, kvm or tcg (default auto: kvm if it runs the pod kernel)")
	kernelFlag(cmd, &f.settings.Kernel)
	return cmd
}

// settings merges, in rising order, the defaults, what the data directory
// remembers and the flags.
func (a *app) settings(cmd *cobra.Command, t datadir.Tree, flags up.Settings) (up.Settings, error) {
	s, err := up.Defaults()
	if err != nil {
		return s, err
	}
	known, err := up.LoadSettings(t.Settings(), &s)
	if err != nil {
		return s, err
	}
	old := s
	set := cmd.Flags().Changed
	if set("node-name") {
		s.NodeName = flags.NodeName
	}
	if set("node-ip") {
		s.NodeIP = flags.NodeIP
	}
	if set("pool-size") {
		s.PoolSize = flags.PoolSize
	}
	if set("max-pods") {
		s.MaxPods = flags.MaxPods
	}
	if set("tls-san") {
		s.TLSSANs = flags.TLSSANs
	}
	if set("portal-port") {
		s.PortalPort = flags.PortalPort
	}
	if set("load-balancer-range") {
		s.LoadBalancerRange = flags.LoadBalancerRange
	}
	if set("accelerator") {
		s.Accelerator = flags.Accelerator
	}
	if s.Kernel, err = chosenKernel(cmd, s.Kernel, flags.Kernel); err != nil {
		return s, err
	}
	if set("log-format") {
		s.LogFormat = a.logFormat
	}
	a.logFormat = s.LogFormat
	if err := s.Validate(); err != nil {
		return s, command.UsageError{Err: err}
	}
	if known && s.NodeName != old.NodeName {
		return s, command.UsageError{Err: fmt.Errorf("--node-name %s: the cluster in %s has the node %s; a node cannot be renamed, use another --data-dir",
			s.NodeName, t.Root(), old.NodeName)}
	}
	return s, nil
}

// note prints a preflight result that does not keep Atoll from running.
func (a *app) note(r preflight.Result) {
	a.Printf("%s: %s: %s\n", r.Level, r.Name, r.Detail)
	if r.Fix != "" {
		a.Printf("      %s\n", r.Fix)
	}
}

// upForeground runs the supervisor with progress on the terminal and its log
// in the data directory.
func (a *app) upForeground(ctx context.Context, t datadir.Tree, s up.Settings) error {
	if err := t.Create(); err != nil {
		return fmt.Errorf("preparing the data directory: %w", err)
	}
	log, err := supervise.OpenLog(t.Log("up"))
	if err != nil {
		return err
	}
	defer log.Close()
	a.Printf("starting atoll %s on %s, logs in %s\n", a.version, t.Root(), t.Logs())
	ready := false
	return a.runSupervisor(ctx, t, s, log, nil, func(line string) {
		a.Printf("%s\n", line)
		if !ready && strings.HasPrefix(line, "node ") {
			ready = true
			people.ShowAdministrator(ctx, t.AdminKubeconfig(), a.Out)
			a.printHowTo(t)
		}
	})
}

// servicesNice makes the session of the services weigh nine times what one weighs by default: against the pods of
// a host with two processors five to one.
const servicesNice = -10

// upBackground is what systemd or the keeper runs: the log goes to standard
// error, which is a file.
func (a *app) upBackground(ctx context.Context, t datadir.Tree, s up.Settings) error {
	logger, err := a.logger(a.ErrOut)
	if err != nil {
		return err
	}
	note := func(r preflight.Result) {
		logger.Info("preflight", "check", r.Name, "level", r.Level, "detail", r.Detail)
	}
	if err := requirePreflight(ctx, t, s, note); err != nil {
		return err
	}
	// Guests that take all processors must not keep the services from theirs, which is little.
	if err := process.SetSessionNice(os.Getpid(), servicesNice); err != nil {
		logger.Warn("services run with the priority of a guest", "error", err)
	}
	return a.runSupervisor(ctx, t, s, a.ErrOut, detach.New(t, logger).Watch, nil)
}

func (a *app) runSupervisor(ctx context.Context, t datadir.Tree, s up.Settings, log io.Writer, keeper func(context.Context) error, progress func(string)) error {
	logger, err := a.logger(log)
	if err != nil {
		return err
	}
	set, err := assets.Embedded()
	if err != nil {
		return err
	}
	u, err := up.New(up.Config{
		Tree: t, Settings: s, Assets: set, Version: a.version, Logger: logger, Progress: progress, Keeper: keeper,
	})
	if err != nil {
		return err
	}
	return u.Run(ctx)
}

// upDetached starts the background supervisor, or one with other settings or
// another binary instead of it, and follows it until the node is Ready.
func (a *app) upDetached(ctx context.Context, t datadir.Tree, s up.Settings, timeout time.Duration) error {
	if _, err := assets.Embedded(); err != nil {
		return err
	}
	if err := t.Create(); err != nil {
		return fmt.Errorf("preparing the data directory: %w", err)
	}
	old := up.Settings{}
	known, err := up.LoadSettings(t.Settings(), &old)
	if err != nil {
		return err
	}
	if err := s.Save(t.Settings()); err != nil {
		return err
	}
	d := detach.New(t, slog.New(slog.DiscardHandler))
	newBinary, err := d.InstallBinary()
	if err != nil {
		return err
	}
	if newBinary || (known && !old.Equal(s)) {
		if err := a.stopSupervisor(ctx, t); err != nil {
			return err
		}
	}
	a.Printf("starting atoll %s on %s in the background, logs in %s\n", a.version, t.Root(), t.Logs())
	if err := d.Start(ctx); err != nil {
		return err
	}
	return a.follow(ctx, t, timeout)
}

// stopSupervisor stops a running supervisor, if there is one, so that it can be
// started anew, and waits for its end.
func (a *app) stopSupervisor(ctx context.Context, t datadir.Tree) error {
	client := up.NewClient(t)
	report, err := client.Status(ctx)
	if err != nil {
		return nil // there is none, or none that can be asked
	}
	a.Printf("stopping the running supervisor to use the new binary or settings; pods go on\n")
	info, err := process.Read(report.PID)
	if err != nil {
		return nil // it has just ended
	}
	if err := client.Stop(ctx); err != nil {
		return fmt.Errorf("stopping the running supervisor: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := info.Wait(ctx); err != nil {
		return fmt.Errorf("waiting for the running supervisor to stop: %w", err)
	}
	return nil
}

// follow prints what the background supervisor does until the node is Ready.
func (a *app) follow(ctx context.Context, t datadir.Tree, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	began := time.Now()
	client := up.NewClient(t)
	seen := map[string]string{}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	last := up.Report{}
	for {
		report, err := client.Status(ctx)
		if err == nil {
			last = report
			a.printChanges(report, seen)
			if ready(report) {
				a.Printf("%-12s Ready after %.1f s\n", "node "+report.Node.Name, time.Since(began).Seconds())
				people.ShowAdministrator(ctx, t.AdminKubeconfig(), a.Out)
				a.printHowTo(t)
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return notReady(t, last, timeout)
		}
	}
}

// printChanges prints a line for every service whose state is another than
// before.
func (a *app) printChanges(r up.Report, seen map[string]string) {
	for _, s := range r.Services {
		key := fmt.Sprintf("%s/%d", s.State, s.Restarts)
		if s.Name == "up" || seen[s.Name] == key {
			continue
		}
		seen[s.Name] = key
		switch s.State {
		case supervise.Ready:
			a.Printf("%-12s ready in %.1f s\n", s.Name, s.ReadyIn)
		case supervise.Starting:
			a.Printf("%-12s starting\n", s.Name)
		case supervise.Backoff:
			a.Printf("%-12s ended (%s), starting it again; log: %s\n", s.Name, s.Error, s.LogFile)
		}
	}
}

// ready tells whether a cluster can be used.
func ready(r up.Report) bool {
	for _, s := range r.Services {
		if s.State != supervise.Ready {
			return false
		}
	}
	return len(r.Services) > 1 && r.Node.Ready && (r.NetworkPolicy == nil || r.NetworkPolicy.Error == "")
}

// notReady explains why a start took too long.
func notReady(t datadir.Tree, r up.Report, timeout time.Duration) error {
	if len(r.Services) == 0 {
		return fmt.Errorf("the supervisor did not answer within %s; its log is %s", timeout, t.Log("up"))
	}
	for _, s := range r.Services {
		if s.State != supervise.Ready {
			why := s.Error
			if why == "" {
				why = "no reason given"
			}
			return fmt.Errorf("not ready after %s: %s is %s (%s); its log is %s", timeout, s.Name, s.State, why, s.LogFile)
		}
	}
	return fmt.Errorf("not ready after %s: node %s: %s; the agent's log is %s", timeout, r.Node.Name, r.Node.Message, t.Log(up.Agent))
}

// printHowTo tells how to use the cluster.
func (a *app) printHowTo(t datadir.Tree) {
	exe, err := os.Executable()
	if err != nil {
		exe = "atoll"
	}
	option := ""
	if t.Root() != datadir.DefaultRoot {
		option = " --data-dir " + t.Root()
	}
	a.Printf(`
The cluster is ready. Use it with the built-in kubectl, or with any other:
  %[1]s kubectl%[2]s get nodes
  export KUBECONFIG=%[3]s
People log in with:
  %[4]s
Look at it with:  %[1]s status%[2]s
Stop it with:     %[1]s down%[2]s
`, exe, option, t.AdminKubeconfig(), exe+" login --server "+up.PortalOf(t)+" --user administrator")
}

func (a *app) keeperCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "keeper",
		Short:   "Restart the background supervisor when it dies",
		Long:    `Is started by "atoll up --detach" on hosts without systemd; there is no need to run it by hand.`,
		Example: `  atoll keeper --data-dir /var/lib/atoll`,
		Hidden:  true,
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			logger, err := a.logger(a.ErrOut)
			if err != nil {
				return err
			}
			err = detach.New(t, logger).Keep(cmd.Context())
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
}
