package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/up"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/preflight"
)

// Addresses of the cluster that the host must not use itself.
const (
	podCIDR     = "10.244.0.0/16"
	nodeCIDR    = "10.244.0.0/22"
	serviceCIDR = "10.96.0.0/16"
	gatewayIP   = "10.244.0.1"
)

func (a *app) preflightCommand() *cobra.Command {
	var output, kernel string
	var port int
	cmd := &cobra.Command{
		Use:   "preflight",
		Short: "See whether this host can run Atoll",
		Long: `Checks packages, kernel features, ports, addresses, disk and memory, and says
for each problem how to fix it. Changes nothing. The exit code is 1 when Atoll
cannot run here.`,
		Example: `  atoll preflight
  atoll preflight -o json
  atoll preflight --kernel /boot/vmlinuz-6.1.0-56-cloud-amd64`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := a.tree()
			if err != nil {
				return err
			}
			remembered := up.Settings{PortalPort: up.DefaultPortalPort}
			if _, err := up.LoadSettings(t.Settings(), &remembered); err != nil && !errors.Is(err, os.ErrPermission) {
				return err // who may not read them is told to be root
			}
			if kernel, err = chosenKernel(cmd, remembered.Kernel, kernel); err != nil {
				return err
			}
			if !cmd.Flags().Changed("portal-port") {
				port = remembered.PortalPort
			}
			results, err := runPreflight(cmd.Context(), t, up.Settings{Kernel: kernel, PortalPort: port})
			if err != nil {
				return err
			}
			if output != "table" {
				if err := a.Structured(output, results); err != nil {
					return err
				}
			} else {
				a.printResults(results)
			}
			if failed := preflight.Failed(results); len(failed) > 0 {
				return fmt.Errorf("this host cannot run Atoll yet: %d of %d checks failed", len(failed), len(results))
			}
			return nil
		},
	}
	kernelFlag(cmd, &kernel)
	cmd.Flags().IntVar(&port, "portal-port", 0, "port that people log in at and push images to (default 443)")
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

// printResults prints all results, and after them what to fix.
func (a *app) printResults(results []preflight.Result) {
	rows := [][]string{{"CHECK", "RESULT", "DETAIL"}}
	for _, r := range results {
		rows = append(rows, []string{r.Name, string(r.Level), r.Detail})
	}
	a.Table(rows)
	for _, r := range results {
		if r.Fix != "" {
			a.Printf("%s: %s: %s\n", r.Level, r.Name, r.Fix)
		}
	}
}

// runPreflight checks the host for a single-host supervisor with the kernel of pods and the port of the portal that
// were chosen.
func runPreflight(ctx context.Context, t datadir.Tree, s up.Settings) ([]preflight.Result, error) {
	everywhere, loopback := netip.IPv4Unspecified(), netip.MustParseAddr("127.0.0.1")
	tcp := func(number int, addr netip.Addr, use string) preflight.Port {
		return preflight.Port{Number: number, Network: "tcp", Address: addr, Use: use}
	}
	dns := netip.MustParseAddr(gatewayIP)
	checker, err := preflight.New(preflight.Config{
		DataDir: t.Root(),
		Ports: []preflight.Port{
			tcp(6443, everywhere, "the API server"),
			tcp(s.PortalPort, everywhere, "the portal (choose another port with --portal-port)"),
			tcp(2379, loopback, "etcd"),
			tcp(2380, loopback, "etcd"),
			tcp(10257, loopback, "the controller manager"),
			tcp(10259, loopback, "the scheduler"),
			tcp(9443, loopback, "the webhooks of virtual machines"),
			tcp(9444, loopback, "the webhook of users"),
			tcp(10250, everywhere, "the kubelet"),
			tcp(10248, loopback, "the kubelet"),
			tcp(10249, loopback, "the service proxy"),
			tcp(10256, everywhere, "the service proxy"),
			tcp(8181, loopback, "CoreDNS"),
			tcp(53, dns, "CoreDNS"),
			{Number: 53, Network: "udp", Address: dns, Use: "CoreDNS"},
		},
		Networks: []preflight.Network{
			{Prefix: netip.MustParsePrefix(podCIDR), Use: "addresses of pods"},
			{Prefix: netip.MustParsePrefix(serviceCIDR), Use: "addresses of Services"},
		},
		Ours: func(i process.Info) bool { return up.IsOwn(t, i) },
		OurInterface: func(name string) bool {
			return name == cniconf.DefaultBridge || strings.HasPrefix(name, gateway.Prefix)
		},
		PodKernel: func() preflight.Result { return checkPodKernel(s.Kernel) },
	})
	if err != nil {
		return nil, err
	}
	return checker.Run(ctx), nil
}

// requirePreflight fails with what is wrong and how to fix it.
func requirePreflight(ctx context.Context, t datadir.Tree, s up.Settings, note func(preflight.Result)) error {
	results, err := runPreflight(ctx, t, s)
	if err != nil {
		return err
	}
	for _, r := range results {
		if r.Level != preflight.OK && r.Level != preflight.Fail {
			note(r)
		}
	}
	var errs []error
	for _, r := range preflight.Failed(results) {
		errs = append(errs, fmt.Errorf("  %s: %s\n      fix: %s", r.Name, r.Detail, r.Fix))
	}
	if len(errs) > 0 {
		return fmt.Errorf("this host cannot run Atoll yet; nothing was changed:\n%w", errors.Join(errs...))
	}
	return nil
}
