package cgroup

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestWeight(t *testing.T) {
	for shares, want := range map[uint64]uint64{0: 1, 2: 1, 1024: 100, 262144: 10000, 1 << 30: 10000} {
		if got := Weight(shares); got != want {
			t.Errorf("Weight(%d) = %d, want %d", shares, got, want)
		}
	}
}

func TestCPUSettings(t *testing.T) {
	shares, quota, period := uint64(512), int64(50000), uint64(100000)
	got := cpu(&specs.LinuxCPU{Shares: &shares, Quota: &quota, Period: &period})
	want := map[string]string{"cpu.weight": "59", "cpu.max": "50000 100000"}
	if len(got) != len(want) {
		t.Fatalf("got %v", got)
	}
	for _, s := range got {
		if want[s.file] != s.value {
			t.Errorf("%s = %q, want %q", s.file, s.value, want[s.file])
		}
	}
	none := int64(-1)
	if got := cpu(&specs.LinuxCPU{Quota: &none}); got[0].value != "max 100000" {
		t.Errorf("no quota: %v", got)
	}
}

func TestParse(t *testing.T) {
	if m := parseKeyed("anon 1\nfile 22\nbad\nx y\n"); m["anon"] != 1 || m["file"] != 22 || len(m) != 2 {
		t.Errorf("keyed: %v", m)
	}
	io := parseIO("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:1\n")
	if len(io) != 1 || io[0].Major != 254 || io[0].Wios != 4 {
		t.Errorf("io: %v", io)
	}
}
