// Package preflight looks whether a host can run Atoll, before anything on it
// is changed.
//
// Every check has a name, a result and, where something is missing, the words
// or command that fixes it. Kernel features are tried, not guessed from version
// numbers or configuration files; the attempts are made in namespaces of their
// own that vanish with them. Preflight changes nothing.
//
// It is called by `atoll preflight` and at the start of `atoll up`. What can go
// wrong: a check that cannot tell says so as a warning and does not fail the
// start.
package preflight

import (
	"context"
	"errors"

	"atoll.dev/atoll/internal/linux/process"
)

// Level is the outcome of a check.
type Level string

// The outcomes, from best to worst.
const (
	OK   Level = "ok"
	Info Level = "info" // works, in a way the user may want to know of
	Warn Level = "warn" // works, with a loss
	Fail Level = "fail" // Atoll cannot run until this is fixed
)

// Result is the outcome of one check.
type Result struct {
	Name   string `json:"name"`
	Level  Level  `json:"level"`
	Detail string `json:"detail"`
	// Fix is what the user can do, "" when nothing has to be done.
	Fix string `json:"fix,omitempty"`
}

// Config says what is about to be started.
type Config struct {
	// DataDir may not exist yet.
	DataDir string
	// Ports are the ports that will be listened on.
	Ports []Port
	// Networks are the address ranges the cluster will use, which must not
	// be in use around the host.
	Networks []Network
	// Ours tells whether a process belongs to this Atoll instance; a port that
	// is held by one is not busy.
	Ours func(process.Info) bool
	// OurInterface tells whether an interface of that name is part of the pod
	// network; routes over it are no conflict.
	OurInterface func(name string) bool
	// PodKernel, when not nil, looks at the kernel that pods are to run on.
	PodKernel func() Result
}

// Checker runs the checks. Make one with New.
type Checker struct {
	cfg Config
}

// New returns a checker for cfg.
func New(cfg Config) (*Checker, error) {
	if cfg.DataDir == "" {
		return nil, errors.New("preflight: no data directory")
	}
	if cfg.Ours == nil {
		cfg.Ours = func(process.Info) bool { return false }
	}
	if cfg.OurInterface == nil {
		cfg.OurInterface = func(string) bool { return false }
	}
	return &Checker{cfg: cfg}, nil
}

// Run makes all checks. It returns their results in a fixed order.
func (c *Checker) Run(ctx context.Context) []Result {
	root := checkRoot()
	out := []Result{checkPlatform(), root}
	out = append(out, checkPrograms()...)
	if c.cfg.PodKernel != nil {
		out = append(out, c.cfg.PodKernel())
	}
	if root.Level != Fail {
		out = append(out, checkKernel(ctx)...)
	}
	out = append(out, checkCgroups())
	out = append(out, c.checkPorts()...)
	out = append(out, c.checkNetworks()...)
	out = append(out, c.checkDisk(), checkMemory())
	out = append(out, checkLimits()...)
	return append(out, checkExtras()...)
}

// Failed returns the results that keep Atoll from running.
func Failed(results []Result) []Result {
	var out []Result
	for _, r := range results {
		if r.Level == Fail {
			out = append(out, r)
		}
	}
	return out
}
