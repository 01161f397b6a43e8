// Command lint is golangci-lint with a way to do without facts.
//
// Facts are what an analyzer learns about a package and uses in those that import
// it: that a function never returns, prints like Printf or is deprecated. For them
// golangci-lint analyses all dependencies from source. With LINT_FACTS=none in the
// environment it reads dependencies as the compiler left them, and analyzers see
// one package at a time. docs/decisions/0006-linters-without-facts.md says why.
package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/golangci/golangci-lint/v2/pkg/commands"
	"github.com/golangci/golangci-lint/v2/pkg/exitcodes"
	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/analysis/passes/ctrlflow"
	"golang.org/x/tools/go/analysis/passes/inline"
	"golang.org/x/tools/go/analysis/passes/modernize"
	"golang.org/x/tools/go/analysis/passes/printf"
	"honnef.co/go/tools/analysis/facts/deprecated"
	"honnef.co/go/tools/analysis/facts/nilness"
	"honnef.co/go/tools/analysis/facts/purity"
	"honnef.co/go/tools/staticcheck/sa5012"
)

func main() {
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "github.com/golangci/golangci-lint/v2" {
				version = d.Version
			}
		}
	}
	if os.Getenv("LINT_FACTS") == "none" {
		version += "-nofacts" // part of the key of golangci-lint's cache
		forgetFacts()
	}
	if err := commands.Execute(commands.BuildInfo{GoVersion: runtime.Version(), Version: version}); err != nil {
		fmt.Fprintln(os.Stderr, "lint:", err)
		os.Exit(exitcodes.Failure)
	}
}

// forgetFacts changes every analyzer of the linters in .golangci.yml that has facts.
func forgetFacts() {
	for _, a := range []*analysis.Analyzer{
		ctrlflow.Analyzer, inline.Analyzer, modernize.NewExprAnalyzer, printf.Analyzer,
		deprecated.Analyzer, nilness.Analysis, purity.Analyzer, sa5012.Analyzer,
	} {
		a.FactTypes = nil
	}
}
