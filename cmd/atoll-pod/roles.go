package main

import (
	"context"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task/plugin" // the runc shim's task service
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"

	"atoll.dev/atoll/internal/guest"
	"atoll.dev/atoll/internal/network/cni"
)

// runc is containerd's own shim, for pods that share the host's kernel. It takes its arguments from
// os.Args and executes itself again.
func runc([]string) int {
	containerdshim.RunShim(context.Background(), manager.NewShimManager("io.containerd.runc.v2"))
	return 0
}

// guestInit is process 1 of a micro-VM.
func guestInit([]string) int { return guest.Main() }

// cniPlugin takes everything from its environment.
func cniPlugin([]string) int { return cni.Main() }
