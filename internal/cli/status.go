package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/netpol"
	"atoll.dev/atoll/internal/cli/text"
	"atoll.dev/atoll/internal/cli/up"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/supervise"
)

func (a *app) statusCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the services of this host, the node and the warm pool",
		Long: `Shows what runs, since when, how often it was restarted and what memory it uses (pages that several
processes share are counted in parts, so the sum is right).
The exit code is 0 when everything is ready and 1 otherwise.`,
		Example: `  atoll status
  atoll status -o wide
  atoll status -o json`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
			defer cancel()
			report, err := up.NewClient(t).Status(ctx)
			if errors.Is(err, up.ErrNotRunning) {
				left, listErr := up.OwnProcesses(t, up.Services|up.Supervisor|up.Pods)
				if listErr == nil && len(left) > 0 {
					err = fmt.Errorf("%w, but %d of its processes are there; `atoll up` takes over, `atoll down` removes them", err, len(left))
				}
				return fmt.Errorf("%s: %w", t.Root(), err)
			}
			if err != nil {
				return err
			}
			if output == "json" || output == "yaml" {
				err = a.Structured(output, report)
			} else {
				a.printStatus(report, output == "wide")
			}
			if err == nil && !ready(report) {
				err = command.SilentError{Err: errors.New("not everything is ready")}
			}
			return err
		},
	}
	command.OutputFlag(cmd, &output, "table", "wide", "json", "yaml")
	return cmd
}

func (a *app) printStatus(r up.Report, wide bool) {
	head := []string{"SERVICE", "STATE", "PID", "UP", "RESTARTS", "MEMORY"}
	if wide {
		head = append(head, "RESIDENT", "PRIVATE", "READY IN", "LOG")
	}
	rows := [][]string{head}
	var sum process.Memory
	var problems []string
	for _, s := range r.Services {
		sum.PSS, sum.Anon = sum.PSS+s.PSS, sum.Anon+s.Anon
		pid := "-"
		if s.PID != 0 {
			pid = strconv.Itoa(s.PID)
		}
		row := []string{s.Name, string(s.State), pid, text.Age(s.Started), strconv.Itoa(s.Restarts), mib(s.PSS)}
		if wide {
			row = append(row, mib(s.RSS), mib(s.Anon), fmt.Sprintf("%.1fs", s.ReadyIn), s.LogFile)
		}
		rows = append(rows, row)
		if s.State != supervise.Ready && s.Error != "" {
			problems = append(problems, fmt.Sprintf("%s: %s (log: %s)", s.Name, s.Error, s.LogFile))
		}
	}
	total := []string{"total", "", "", "", "", mib(sum.PSS)}
	if wide {
		total = append(total, "", mib(sum.Anon), "", "")
	}
	a.Table(append(rows, total))
	a.Printf("\n")
	state := "Ready"
	if !r.Node.Ready {
		state = "not ready: " + r.Node.Message
	}
	facts := [][]string{
		{"node", r.Node.Name + "  " + state},
		{"pods", strconv.Itoa(r.Node.Pods)},
		{"pool", poolLine(r.Pool)},
		{"policies", netpol.Line(r.NetworkPolicy)},
		{"versions", strings.Join(strings.Fields("atoll "+r.Version+" kubelet "+r.Node.KubeletVersion+" kernel "+r.Node.Kernel), " ")},
		{"data", r.DataDir},
	}
	a.Table(facts)
	if p := poolProblem(r.Pool, time.Now()); p != "" {
		problems = append(problems, p)
	}
	if p := r.NetworkPolicy; p != nil && p.Error != "" {
		problems = append(problems, "network policies: "+p.Error+" (see `atoll logs agent`); pods that start have no network")
	}
	for _, p := range problems {
		a.Printf("%s\n", p)
	}
}

// poolLine says in a line how the pool is.
func poolLine(s *wire.Status) string {
	if s == nil {
		return "does not answer"
	}
	line := fmt.Sprintf("%d of %d micro-VMs ready, %d of %d pods started from it, accelerator %s", s.Ready, s.Wanted, s.TakenWarm, s.Taken, s.Accelerator)
	if s.Reason != "" {
		line += " (" + s.Reason + ")"
	}
	if s.Kernel != "" {
		line += ", pod kernel " + s.Kernel
	}
	return line
}

// poolProblem says what failed in the pool and what to do, "" if nothing did.
func poolProblem(s *wire.Status, now time.Time) string {
	switch {
	case s == nil || s.Error == "" && s.LastFailure == "":
		return ""
	case s.Error == "":
		return fmt.Sprintf("pool: the last failure was %s ago: %s (see `atoll logs pool`)", text.Age(s.LastFailureAt), s.LastFailure)
	}
	line := fmt.Sprintf("pool: micro-VMs do not come up: %s (%d failures in a row", s.Error, s.FailuresInARow)
	if wait := s.RetryAt.Sub(now); wait > 0 {
		line += fmt.Sprintf(", the next attempt is in %s", wait.Round(time.Second))
	}
	return line + "); `atoll preflight` checks this host, `atoll logs pool` says more"
}

// mib prints a number of bytes.
func mib(n int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprintf("%d MiB", (n+1<<19)>>20)
}
