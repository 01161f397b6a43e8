package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/network/denied"
	"atoll.dev/atoll/internal/network/policy"
)

func (a *app) networkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "network",
		Short: "See what network policies do on this host",
		Args:  command.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.networkDeniedCommand(), a.networkCountersCommand())
	return cmd
}

func (a *app) networkDeniedCommand() *cobra.Command {
	var namespace string
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use:   "denied",
		Short: "Print what network policies have denied",
		Long: `Prints the log of traffic that network policies have denied on this host, of one namespace or of all: when,
by the policies of the receiver (ingress) or of the sender (egress), by which tier, and who it was. What repeats itself
is one line with a count, and a namespace that is denied very much is not logged completely; the counters
("atoll network counters") are complete.`,
		Example: `  atoll network denied -n shop
  atoll network denied -f`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			if namespace != "" && (filepath.Base(namespace) != namespace || namespace == "." || namespace == "..") {
				return command.UsageError{Err: fmt.Errorf("-n: %q is no name of a namespace", namespace)}
			}
			return printDenied(cmd.Context(), a.out, t.Denied(), namespace, lines, follow)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only of this namespace")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on printing what is added")
	cmd.Flags().IntVar(&lines, "lines", 100, "lines to begin with, of each namespace")
	return cmd
}

// printDenied prints the files of one namespace or all, each line with its namespace.
func printDenied(ctx context.Context, w io.Writer, dir, namespace string, lines int, follow bool) error {
	pattern := "*"
	if namespace != "" {
		pattern = namespace
	}
	offsets := map[string]int64{}
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for first := true; ; first = false {
		files, err := filepath.Glob(denied.Path(dir, pattern))
		if err != nil {
			return fmt.Errorf("listing the logs: %w", err)
		}
		for _, path := range files {
			if err := printAdded(w, path, offsets, first, lines); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// printAdded prints what a file has beyond its offset; the first time its last lines.
func printAdded(w io.Writer, path string, offsets map[string]int64, first bool, lines int) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	defer f.Close()
	at := offsets[path]
	if first {
		if at, err = lastLines(f, lines); err != nil {
			return fmt.Errorf("reading the log: %w", err)
		}
	}
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	if info.Size() < at {
		at = 0 // it is another file
	}
	added, err := io.ReadAll(io.NewSectionReader(f, at, info.Size()-at))
	if err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	end := bytes.LastIndexByte(added, '\n') + 1
	offsets[path] = at + int64(end)
	namespace := strings.TrimSuffix(filepath.Base(path), ".log")
	for line := range bytes.Lines(added[:end]) {
		if _, err := fmt.Fprintf(w, "%s %s", namespace, line); err != nil {
			return fmt.Errorf("printing the log: %w", err)
		}
	}
	return nil
}

// counted is one line of `atoll network counters`.
type counted struct {
	What      string `json:"what"` // allowed or denied
	Direction string `json:"direction"`
	Tier      string `json:"tier,omitempty"` // of what was denied
	Namespace string `json:"namespace"`
	Policy    string `json:"policy,omitempty"` // of what was allowed
	Count     uint64 `json:"count"`
}

func (a *app) networkCountersCommand() *cobra.Command {
	var namespace, output string
	cmd := &cobra.Command{
		Use:   "counters",
		Short: "Show how often network policies have allowed and denied",
		Long: `Shows for each policy how many connections it has allowed to begin (as often as a rule of it was the one that did),
and for each namespace how many packets were denied. It counts this host since the agent has started.`,
		Example: `  atoll network counters -n shop
  atoll network counters -o json`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			status, err := policyStatus(t)
			if err != nil {
				return err
			}
			values, err := policy.Counters(cmd.Context(), podNetwork(t))
			if err != nil {
				return err
			}
			list := counters(status.Counters, values, namespace)
			if output != "table" {
				return a.structured(output, list)
			}
			rows := [][]string{{"NAMESPACE", "WHAT", "DIRECTION", "TIER", "POLICY", "COUNT"}}
			for _, c := range list {
				rows = append(rows, []string{c.Namespace, c.What, c.Direction, orDash(c.Tier), orDash(c.Policy), strconv.FormatUint(c.Count, 10)})
			}
			a.table(rows)
			a.printf("\nof all namespaces: %d packets with an address that is not the pod's, %d to pods that are not known, %d of connections that were cut\n",
				values[policy.SpoofedCounter], values[policy.UnknownCounter], values[policy.CutCounter])
			return nil
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only of this namespace")
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

// counters puts names and values together.
func counters(names map[string]string, values map[string]uint64, namespace string) []counted {
	out := []counted{}
	for name, label := range names {
		words := strings.Fields(label)
		if len(words) < 3 {
			continue
		}
		c := counted{What: words[0], Direction: words[1], Count: values[name]}
		if c.What == "denied" && len(words) == 4 {
			c.Tier, c.Namespace = words[2], words[3]
		} else {
			c.Namespace, c.Policy, _ = strings.Cut(words[2], "/")
		}
		if namespace == "" || c.Namespace == namespace {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b counted) int {
		return strings.Compare(a.Namespace+"\x00"+a.What+a.Direction+a.Tier+a.Policy, b.Namespace+"\x00"+b.What+b.Direction+b.Tier+b.Policy)
	})
	return out
}

// policyStatus reads what the agent says about network policies.
func policyStatus(t datadir.Tree) (policyv1.Status, error) {
	var s policyv1.Status
	b, err := os.ReadFile(t.PolicyStatus())
	if errors.Is(err, os.ErrNotExist) {
		return s, fmt.Errorf("%s: the agent has not said anything about network policies; is it running? (atoll status)", t.Root())
	}
	if err != nil {
		return s, fmt.Errorf("reading the status of network policies: %w", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("reading the status of network policies: %w", err)
	}
	return s, nil
}

// policyLine says in a line how network policies are.
func policyLine(s *policyv1.Status) string {
	switch {
	case s == nil:
		return "not enforced yet"
	case s.Error != "":
		return fmt.Sprintf("NOT ENFORCED as they should be on %d pods", s.Pods)
	}
	return fmt.Sprintf("%d enforced on %d pods", s.Policies, s.Pods)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
