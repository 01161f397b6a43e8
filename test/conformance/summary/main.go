// Command summary prints what a run of the upstream suite came to: how many
// specs passed and, for each that failed, the first line of the reason.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/onsi/ginkgo/v2/types"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: summary <report.json>")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		os.Exit(1)
	}
}

func run(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var reports []types.Report
	if err := json.Unmarshal(raw, &reports); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	var passed, skipped int
	var failed []types.SpecReport
	for _, report := range reports {
		for _, spec := range report.SpecReports {
			switch {
			case spec.LeafNodeType != types.NodeTypeIt:
			case spec.State.Is(types.SpecStatePassed):
				passed++
			case spec.State.Is(types.SpecStateFailureStates):
				failed = append(failed, spec)
			default:
				skipped++
			}
		}
	}
	for _, spec := range failed {
		reason, _, _ := strings.Cut(strings.TrimSpace(spec.Failure.Message), "\n")
		fmt.Printf("FAIL %s\n     %s\n", spec.FullText(), reason)
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", passed, len(failed), skipped)
	return nil
}
