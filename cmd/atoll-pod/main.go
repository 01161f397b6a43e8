// Command atoll-pod is everything that runs once per pod, in one binary: containerd shims, guest init,
// CNI plugin, warm pool. The role is the name it is called by, or its first argument. It links no
// Kubernetes code.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"atoll.dev/atoll/internal/pool"
	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/registry/credentials"
	"atoll.dev/atoll/internal/shim"
)

func main() {
	name, args := filepath.Base(os.Args[0]), os.Args[1:]
	switch {
	case os.Getpid() == 1:
		name = "init"
	case os.Getenv("CNI_COMMAND") != "":
		name = "cni"
	case name == "atoll-pod" && len(args) > 0:
		name, args = args[0], args[1:]
	}
	roles := map[string]func([]string) int{
		"containerd-shim-atoll-v1": shim.Main, "containerd-shim-atoll-vm-v1": shim.Machine, "containerd-shim-runc-v2": runc,
		registry.Role: shim.Daemon,
		"init":        guestInit, "pool": pool.Main, "cni": cniPlugin,
		credentials.Role: credentials.Main,
	}
	role, ok := roles[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "atoll-pod: no role %q; it is started by atoll and containerd\n", name)
		os.Exit(2)
	}
	os.Exit(role(args))
}
