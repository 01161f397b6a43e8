package agent

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// systemdResolved is where systemd-resolved keeps the real name servers when
// /etc/resolv.conf only names its stub.
const systemdResolved = "/run/systemd/resolve/resolv.conf"

// resolver is how names outside the cluster are resolved.
type resolver struct {
	// path is a resolv.conf that is good for pods with dnsPolicy Default.
	path string
	// upstreams are its name servers.
	upstreams []string
}

// readResolver finds the host's name servers. A host without resolv.conf gets an
// empty one, because the kubelet wants a file.
func readResolver(path, stateDir string) (resolver, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(stateDir, 0o700); err != nil {
			return resolver{}, fmt.Errorf("resolver configuration: %w", err)
		}
		empty := filepath.Join(stateDir, "resolv.conf")
		if _, err := atomicfile.WriteIfChanged(empty, nil, 0o644); err != nil {
			return resolver{}, fmt.Errorf("resolver configuration: %w", err)
		}
		return resolver{path: empty}, nil
	}
	if err != nil {
		return resolver{}, fmt.Errorf("resolver configuration: %w", err)
	}
	servers := nameServers(text)
	if allLoopback(servers) {
		if behind, err := os.ReadFile(systemdResolved); err == nil {
			return resolver{path: systemdResolved, upstreams: nameServers(behind)}, nil
		}
	}
	return resolver{path: path, upstreams: servers}, nil
}

// nameServers lists the valid addresses of the nameserver lines.
func nameServers(text []byte) []string {
	var out []string
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(fields[1]); err == nil {
			out = append(out, addr.String())
		}
	}
	return out
}

func allLoopback(servers []string) bool {
	for _, s := range servers {
		if !netip.MustParseAddr(s).IsLoopback() {
			return false
		}
	}
	return len(servers) > 0
}
