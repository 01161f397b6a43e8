// Package dns runs CoreDNS in the agent process.
//
// It serves the cluster domain from the API server and sends everything else to
// the host's name servers, or answers that it does not exist when the host has
// none. It listens on the gateway address of the pod bridge, which the CNI plugin
// makes: Run waits for the address. It is not a resolver for the host. The agent
// role calls Run.
//
// What can go wrong: another process has the port, which Run reports and tries
// again; the API server is away, in which case names keep resolving to what was
// last known.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"

	// The plugins the Corefile uses register themselves.
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"

	"atoll.dev/atoll/internal/kube/logging"
)

// retryEvery is the pause between two looks for the address and between two
// attempts to start.
const retryEvery = 500 * time.Millisecond

// Config of a DNS server.
type Config struct {
	Kubeconfig string
	Address    netip.Addr
	Port       int
	ReadyPort  int
	Domain     string
	// Upstreams are the host's name servers.
	Upstreams []string
	Logger    *slog.Logger
}

// corefile is the configuration in CoreDNS's own language.
func (c Config) corefile() string {
	elsewhere := `template ANY ANY {
        rcode NXDOMAIN
    }`
	if len(c.Upstreams) > 0 {
		elsewhere = "forward ."
		for _, u := range c.Upstreams {
			elsewhere += " " + u
		}
		elsewhere += ` {
        max_concurrent 1000
    }`
	}
	// Names of the cluster are in memory already; caching them would only delay
	// changes.
	return fmt.Sprintf(`.:%[1]d {
    bind %[2]s
    errors
    ready 127.0.0.1:%[3]d
    kubernetes %[4]s in-addr.arpa ip6.arpa {
        kubeconfig %[5]s
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }
    cache 30 {
        disable success %[4]s
        disable denial %[4]s
    }
    loadbalance
    %[6]s
}
`, c.Port, c.Address, c.ReadyPort, c.Domain, c.Kubeconfig, elsewhere)
}

// Run serves until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	dnsserver.Quiet = true
	caddy.Quiet = true
	var reported string
	for {
		instance, err := start(cfg)
		if err == nil {
			cfg.Logger.Info("dns serving", "address", cfg.Address, "port", cfg.Port)
			<-ctx.Done()
			if err := instance.Stop(); err != nil {
				return fmt.Errorf("stopping dns: %w", err)
			}
			return nil
		}
		if text := err.Error(); text != reported && !errors.Is(err, errNoAddress) {
			reported = text
			cfg.Logger.Error("dns cannot start and tries again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryEvery):
		}
	}
}

// errNoAddress says that the bridge does not exist yet.
var errNoAddress = errors.New("the listen address does not exist")

func start(cfg Config) (*caddy.Instance, error) {
	if !addressExists(cfg.Address) {
		return nil, errNoAddress
	}
	instance, err := caddy.Start(caddy.CaddyfileInput{
		Filepath:       "Corefile",
		Contents:       []byte(cfg.corefile()),
		ServerTypeName: "dns",
	})
	// The kubernetes plugin takes klog for itself.
	logging.Install(cfg.Logger)
	return instance, err
}

// addressExists reports whether an interface of the host has the address.
func addressExists(want netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == want {
			return true
		}
	}
	return false
}
