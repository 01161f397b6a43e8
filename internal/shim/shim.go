// Package shim is the containerd shim of micro-VM pods, runtime "io.containerd.atoll.v1".
//
// It only finds out which of the shim's two processes this one is: a short-lived call by containerd
// (package start), or the daemon that owns a micro-VM (package daemon), which the warm pool spawns.
// cmd/atoll-pod calls it.
package shim

import (
	"atoll.dev/atoll/internal/shim/daemon"
	"atoll.dev/atoll/internal/shim/start"
)

// Main is the shim binary as containerd calls it.
func Main(args []string) int { return start.Main(args) }

// Machine is the shim binary of virtual machines (RuntimeClass atoll-vm) as containerd calls it.
func Machine(args []string) int { return start.MachineMain(args) }

// Daemon is the process that owns a micro-VM.
func Daemon(args []string) int { return daemon.Main(args) }
