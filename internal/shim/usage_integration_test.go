//go:build integration

package shim_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/pool/wire"
)

// testUsage: what a container writes into an emptyDir and into its own layer is written down for the
// kubelet and containerd.
func testUsage(t *testing.T, p *pod) {
	cache := p.volume("empty-dir", "usage")
	file := handover.EmptyDirUsage(filepath.Join(p.kubelet, "pods", p.uid), "usage")
	for _, dir := range []string{cache, filepath.Dir(file)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s := p.spec("/bin/sleep", "1000")
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/usage", Type: "bind", Source: cache, Options: []string{"rbind", "rw"}})
	c := p.mustCreate("usage", s)
	c.start()
	c.sh("dd if=/dev/zero of=/usage/big bs=1M count=20; dd if=/dev/zero of=/own bs=1M count=7; sync")
	eventually(t, "the use of the emptyDir is written down", func() bool {
		c.metrics() // somebody asks
		u, _, err := handover.ReadUsage(file)
		return err == nil && u.Bytes >= 20<<20 && u.Bytes < 24<<20 && u.Inodes >= 2 && u.Capacity > u.Available && u.Available > 0
	})
	eventually(t, "the use of the writable layer is written down", func() bool {
		c.metrics()
		u, _, err := handover.ReadUsage(handover.LayerUsage(filepath.Join(p.dir, "containerd", c.id, "meta")))
		return err == nil && u.Bytes >= 7<<20 && u.Bytes < 12<<20
	})
	c.kill(9)
	c.wait()
	c.delete()
}

// testScore: the kernel is told to kill QEMU as it would have killed its container.
func testScore(t *testing.T, p *pod) {
	const want = 960
	score := want
	s := p.spec("/bin/true")
	s.Process.OOMScoreAdj = &score
	p.run("score", s)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.pid))
	if err != nil || strings.TrimSpace(string(b)) != fmt.Sprint(want) {
		t.Errorf("score of QEMU: %q, %v", b, err)
	}
}

// testWaitingKilled: a micro-VM that ends while it waits is replaced, and no pod gets it.
func testWaitingKilled(t *testing.T, h *host) {
	before := h.waitReady(2)
	entries, err := registry.New(h.run).List()
	if err != nil {
		t.Fatal(err)
	}
	killed := uint64(0)
	for _, e := range entries {
		if e.Sandbox == "" && e.QEMU > 0 && killed == 0 {
			if err := unix.Kill(e.QEMU, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			killed++
			eventually(t, "the shim of a dead micro-VM ends", func() bool { return !alive(e.PID) })
		}
	}
	if killed == 0 {
		t.Fatalf("nobody waits among %+v", entries)
	}
	eventually(t, "the pool knows", func() bool {
		s, err := wire.GetStatus(t.Context(), filepath.Join(h.run, "pool.sock"))
		return err == nil && s.Failed > before.Failed
	})
	after := h.waitReady(2)
	if after.Failed != before.Failed+killed || after.Error != "" || !strings.Contains(after.LastFailure, "a waiting micro-VM ended") {
		t.Errorf("status %+v", after)
	}
}
