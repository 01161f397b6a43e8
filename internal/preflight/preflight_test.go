package preflight

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/linux/process"
)

const procNetTCP = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0
   1: 00000000:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1 0 100 0 0 10 0
   2: 0100007F:1F91 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100 0 0 10 0
   3: nonsense
`

const procNetTCP6 = `  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:280A 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 444 1
   1: 0000000000000000FFFF00000100007F:280B 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 555 1
`

func TestParseSockets(t *testing.T) {
	got := append(parseSockets("tcp", procNetTCP), parseSockets("tcp", procNetTCP6)...)
	want := []socket{
		{"tcp", netip.MustParseAddrPort("127.0.0.1:8080"), "111"},
		{"tcp", netip.MustParseAddrPort("0.0.0.0:6443"), "222"},
		{"tcp", netip.MustParseAddrPort("[::]:10250"), "444"},
		{"tcp", netip.MustParseAddrPort("127.0.0.1:10251"), "555"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("sockets = %v, want %v", got, want)
	}
}

func FuzzParseSockets(f *testing.F) {
	f.Add(procNetTCP)
	f.Add(procNetTCP6)
	f.Fuzz(func(_ *testing.T, s string) { parseSockets("tcp", s) })
}

func TestCollides(t *testing.T) {
	any4, loop, other := netip.IPv4Unspecified(), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("10.0.0.1")
	tests := []struct {
		want, have netip.Addr
		busy       bool
	}{
		{any4, loop, true},
		{loop, any4, true},
		{loop, netip.IPv6Unspecified(), true},
		{loop, loop, true},
		{loop, other, false},
	}
	for _, tt := range tests {
		p := Port{Number: 80, Network: "tcp", Address: tt.want}
		if got := p.collides(socket{network: "tcp", addr: netip.AddrPortFrom(tt.have, 80)}); got != tt.busy {
			t.Errorf("want %s, have %s: busy = %v", tt.want, tt.have, got)
		}
		if p.collides(socket{network: "udp", addr: netip.AddrPortFrom(tt.have, 80)}) {
			t.Error("udp collides with tcp")
		}
	}
}

// TestBusyPort listens on a port and expects to be named as its holder.
func TestBusyPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := Port{Number: l.Addr().(*net.TCPAddr).Port, Network: "tcp", Address: netip.IPv4Unspecified(), Use: "the test"}
	for _, ours := range []bool{false, true} {
		c, err := New(Config{DataDir: t.TempDir(), Ports: []Port{port}, Ours: func(i process.Info) bool {
			return ours && i.PID == os.Getpid()
		}})
		if err != nil {
			t.Fatal(err)
		}
		r := c.checkPorts()[0]
		if ours && r.Level != OK {
			t.Errorf("our own port is called busy: %+v", r)
		}
		if !ours && (r.Level != Fail || !strings.Contains(r.Detail, "by process")) {
			t.Errorf("a busy port: %+v", r)
		}
	}
}

func TestHowToStop(t *testing.T) {
	for args, want := range map[string]string{
		"atoll server --data-dir=/srv/a --node-name=n": "atoll down --data-dir /srv/a",
		"etcd --data-dir=/srv/e":                       "stop process 7",
		"nginx":                                        "stop process 7",
	} {
		if got := howToStop(process.Info{PID: 7, Args: strings.Fields(args)}); !strings.HasSuffix(got, want) {
			t.Errorf("%s: got %q", args, got)
		}
	}
}

func TestV1Controllers(t *testing.T) {
	mounts := `tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
short
`
	got, unified := v1Controllers(mounts)
	if want := []string{"cpu", "cpuacct", "memory"}; !slices.Equal(got, want) || !unified {
		t.Errorf("v1Controllers = %v, %v, want %v, true", got, unified, want)
	}
}

func TestLookPath(t *testing.T) {
	t.Setenv("PATH", "/nowhere")
	if _, err := LookPath("ldconfig"); err != nil {
		t.Errorf("a program in /sbin is not found: %v", err)
	}
	if _, err := LookPath("no-such-program"); err == nil {
		t.Error("a program that is not there is found")
	}
}

func TestRunWithoutRoot(t *testing.T) {
	c, err := New(Config{DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	results := c.Run(t.Context())
	names := map[string]bool{}
	for _, r := range results {
		if r.Name == "" || r.Detail == "" {
			t.Errorf("incomplete result %+v", r)
		}
		if r.Level == Fail && r.Fix == "" {
			t.Errorf("%s fails without a fix", r.Name)
		}
		names[r.Name] = true
	}
	for _, name := range []string{"qemu", "cgroups", "disk space", "memory", "kvm"} {
		if !names[name] {
			t.Errorf("no result for %s", name)
		}
	}
}
