package up

import (
	"log/slog"
	"slices"
	"testing"

	"atoll.dev/atoll/internal/datadir"
)

// TestRolesKnowTheLoadBalancers: the server gives these addresses out, the agent keeps people's images from them.
func TestRolesKnowTheLoadBalancers(t *testing.T) {
	tree, err := datadir.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	u := &Up{cfg: Config{Tree: tree, Logger: slog.New(slog.DiscardHandler), Settings: Settings{
		NodeName: "host", NodeIP: "192.0.2.1", LoadBalancerRange: "192.0.2.64/28",
	}}}
	services, err := u.services()
	if err != nil {
		t.Fatal(err)
	}
	knowing := 0
	for _, s := range services {
		if s.Name != Server && s.Name != Agent {
			continue
		}
		if !slices.Contains(s.Process.Args, "--load-balancer-range=192.0.2.64/28") {
			t.Errorf("%s is not told: %q", s.Name, s.Process.Args)
		}
		knowing++
	}
	if knowing != 2 {
		t.Errorf("%d of 2 roles", knowing)
	}
}
