//go:build integration

package preflight

import (
	"net"
	"os"
	"testing"
)

// TestKernel needs root. It tries the kernel features of this host, all of
// which Atoll's own tests need, and expects no trace of it.
func TestKernel(t *testing.T) {
	before := interfaces(t)
	namespace, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range checkKernel(t.Context()) {
		if r.Level == Fail {
			t.Errorf("%s: %s", r.Name, r.Detail)
		}
	}
	if now, err := os.Readlink("/proc/self/ns/net"); err != nil || now != namespace {
		t.Errorf("the process is left in another network namespace: %s, %v", now, err)
	}
	if after := interfaces(t); after != before {
		t.Errorf("there were %d interfaces, now there are %d", before, after)
	}
}

func interfaces(t *testing.T) int {
	t.Helper()
	list, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}
