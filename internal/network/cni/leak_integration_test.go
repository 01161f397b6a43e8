//go:build integration

package cni_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/networktest"
)

func mustPrefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// inventory is all that a pod may leave on the host.
func inventory(t *testing.T, lab *networktest.Lab) string {
	t.Helper()
	var out []string
	networktest.Do(t, lab.Host, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			out = append(out, "link "+l.Attrs().Name)
			neighs, err := netlink.NeighList(l.Attrs().Index, unix.AF_INET)
			if err != nil {
				return err
			}
			for _, n := range neighs {
				if n.State == netlink.NUD_PERMANENT {
					out = append(out, "neighbour "+n.IP.String())
				}
			}
		}
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		if err != nil {
			return err
		}
		for _, table := range tables {
			sets, err := conn.GetSets(table)
			if err != nil {
				return err
			}
			for _, s := range sets {
				elements, err := conn.GetSetElements(s)
				if err != nil {
					return err
				}
				out = append(out, fmt.Sprintf("set %s: %d", s.Name, len(elements)))
			}
		}
		return nil
	})
	for _, d := range []string{"leases", "addresses"} {
		entries, err := os.ReadDir(filepath.Join(lab.Network.StateDir, d))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			out = append(out, d+"/"+e.Name())
		}
	}
	sort.Strings(out)
	return strings.Join(out, "\n")
}

// expectClean fails when the host holds anything of a pod.
func expectClean(t *testing.T, lab *networktest.Lab) {
	t.Helper()
	want := strings.Join([]string{
		"link atoll0", "link lo", "link up0", "set hairpin: 0", "set host-address-ports: 0", "set host-ports: 0",
	}, "\n")
	if got := inventory(t, lab); got != want {
		t.Errorf("left on the host:\n%s\nwant:\n%s", got, want)
	}
}

func TestManyCyclesLeaveNothing(t *testing.T) {
	lab := newLab(t)
	rc := cniconf.RuntimeConfig{
		PortMappings: []cniconf.PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}},
		Bandwidth:    &cniconf.Bandwidth{IngressRate: 8e6, EgressRate: 8e6},
	}
	var adds, dels []time.Duration
	for i := range 200 {
		id := fmt.Sprintf("cycle-%d", i)
		path := filepath.Join(lab.Dir, id)
		if err := netns.Create(path); err != nil {
			t.Fatal(err)
		}
		use := cniconf.RuntimeConfig{}
		if i%4 == 0 {
			use = rc
		}
		start := time.Now()
		lab.Add(t, id, path, use)
		added := time.Now()
		if i%3 == 0 { // the runtime may remove the namespace first
			if err := netns.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		removing := time.Now()
		lab.Del(t, id, path)
		if i%4 != 0 {
			adds, dels = append(adds, added.Sub(start)), append(dels, time.Since(removing))
		}
		if err := netns.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	expectClean(t, lab)
	t.Logf("ADD %s, DEL %s (median, p95 of %d, process start included)", spread(adds), spread(dels), len(adds))
}

func spread(d []time.Duration) string {
	slices.Sort(d)
	return fmt.Sprint(d[len(d)/2].Round(10*time.Microsecond), " ", d[len(d)*95/100].Round(10*time.Microsecond))
}

func TestGCKeepsOnlyValidAttachments(t *testing.T) {
	lab := newLab(t)
	kept := lab.Add(t, "kept", lab.Pod(t, "kept"), cniconf.RuntimeConfig{})
	lab.Add(t, "lost", lab.Pod(t, "lost"), cniconf.RuntimeConfig{PortMappings: []cniconf.PortMapping{{HostPort: 8080, ContainerPort: 80}}})
	_, err := lab.CNI("GC", "", "", cniconf.RuntimeConfig{}, func(p *cniconf.Plugin) {
		p.ValidAttachments = []cniconf.Attachment{{ContainerID: "kept", IfName: "eth0"}}
	})
	if err != nil {
		t.Fatal(err)
	}
	got := inventory(t, lab)
	if !strings.Contains(got, "leases/kept@eth0") || !strings.Contains(got, "neighbour "+kept.String()) {
		t.Errorf("the valid attachment is gone:\n%s", got)
	}
	if strings.Contains(got, "lost") || !strings.Contains(got, "set host-ports: 0") {
		t.Errorf("the lost attachment is still there:\n%s", got)
	}
}

func TestStatusAndVersion(t *testing.T) {
	lab := networktest.New(t)
	if _, err := lab.CNI("STATUS", "", "", cniconf.RuntimeConfig{}); err == nil || !strings.Contains(err.Error(), `"code": 50`) {
		t.Errorf("STATUS without a bridge: %v", err)
	}
	setUp(t, lab)
	if _, err := lab.CNI("STATUS", "", "", cniconf.RuntimeConfig{}); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	out, err := lab.CNI("VERSION", "", "", cniconf.RuntimeConfig{})
	if err != nil {
		t.Fatal(err)
	}
	var v struct{ SupportedVersions []string }
	if err := json.Unmarshal(out, &v); err != nil || len(v.SupportedVersions) != 3 {
		t.Errorf("VERSION: %s %v", out, err)
	}
}
