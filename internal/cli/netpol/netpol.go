// Package netpol is what `atoll network` and `atoll status` tell of network policies: it reads the log of what was
// denied, the counters of the kernel and what the agent says, and knows how to print them.
//
// It changes nothing. internal/cli calls it. What can go wrong: there is no agent, or it has not come so far; the
// errors say so.
package netpol

import (
	"bytes"
	"cmp"
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

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/cli/tail"
	"atoll.dev/atoll/internal/cli/text"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/denied"
	"atoll.dev/atoll/internal/network/policy"
)

// printDenied prints the files of one namespace or all, each line with its namespace.
func printDenied(ctx context.Context, w io.Writer, dir, namespace string, lines int, follow bool) error {
	pattern := "*"
	if namespace != "" {
		pattern = namespace
	}
	offsets := map[string]int64{}
	tick := time.NewTicker(tail.Every)
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
		if at, err = tail.Offset(f, lines); err != nil {
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

// count returns what the policies of a namespace, or of all, have counted.
func count(ctx context.Context, statusFile string, n cniconf.Network, namespace string) (*counts, error) {
	status, err := readStatus(statusFile)
	if err != nil {
		return nil, err
	}
	values, err := policy.Counters(ctx, n)
	if err != nil {
		return nil, err
	}
	return &counts{list: counters(status.Counters, values, namespace), values: values}, nil
}

// counts is what was counted.
type counts struct {
	list   []counted
	values map[string]uint64
}

// print prints a table.
func (c *counts) print(w io.Writer) {
	rows := [][]string{{"NAMESPACE", "WHAT", "DIRECTION", "TIER", "POLICY", "COUNT"}}
	for _, c := range c.list {
		rows = append(rows, []string{c.Namespace, c.What, c.Direction, cmp.Or(c.Tier, "-"), cmp.Or(c.Policy, "-"), strconv.FormatUint(c.Count, 10)})
	}
	text.Table(w, rows)
	fmt.Fprintf(w, "\nof all namespaces: %d packets with an address that is not the pod's, %d to link-local addresses, %d to pods that are not known, %d of connections that were cut\n",
		c.values[policy.SpoofedCounter], c.values[policy.LinkLocalCounter], c.values[policy.UnknownCounter], c.values[policy.CutCounter])
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

// readStatus reads what the agent has written into a file about network policies.
func readStatus(path string) (policyv1.Status, error) {
	var s policyv1.Status
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return s, errors.New("the agent has not said anything about network policies; is it running? (atoll status)")
	}
	if err != nil {
		return s, fmt.Errorf("reading the status of network policies: %w", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("reading the status of network policies: %w", err)
	}
	return s, nil
}

// Line says in a line how network policies are.
func Line(s *policyv1.Status) string {
	switch {
	case s == nil:
		return "not enforced yet"
	case s.Error != "":
		return fmt.Sprintf("NOT ENFORCED as they should be on %d pods", s.Pods)
	}
	return fmt.Sprintf("%d enforced on %d pods", s.Policies, s.Pods)
}
