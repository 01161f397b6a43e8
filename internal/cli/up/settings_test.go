package up

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/process"
)

func TestSettingsValidate(t *testing.T) {
	good := Settings{NodeName: "host-1.lab", PoolSize: 4, MaxPods: 500, PortalPort: 443, Accelerator: "auto", LogFormat: "text"}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	tests := map[string]func(*Settings){
		"--node-name":           func(s *Settings) { s.NodeName = "Host" },
		"letters":               func(s *Settings) { s.NodeName = "a..b" },
		"up to 63":              func(s *Settings) { s.NodeName = strings.Repeat("a", 64) },
		"--node-ip":             func(s *Settings) { s.NodeIP = "127.0.0.1" },
		"IPv4":                  func(s *Settings) { s.NodeIP = "fd00::1" },
		"--pool-size":           func(s *Settings) { s.PoolSize = 65 },
		"--max-pods":            func(s *Settings) { s.MaxPods = 0 },
		"--portal-port":         func(s *Settings) { s.PortalPort = 65536 },
		"--load-balancer-range": func(s *Settings) { s.LoadBalancerRange = "192.0.2.1/24" },
		"--accelerator":         func(s *Settings) { s.Accelerator = "hvf" },
		"--kernel":              func(s *Settings) { s.Kernel = "boot/vmlinuz" },
		"--log-format":          func(s *Settings) { s.LogFormat = "xml" },
	}
	for want, change := range tests {
		s := good
		change(&s)
		if err := s.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Validate = %v, want %q", err, want)
		}
	}
}

func TestSettingsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "settings.json")
	s := Settings{NodeName: "a", PoolSize: 4}
	if known, err := LoadSettings(path, &s); known || err != nil || s.NodeName != "a" {
		t.Fatalf("LoadSettings without a file = %v, %v, %+v", known, err, s)
	}
	want := Settings{NodeName: "b", PoolSize: 7, Kernel: "/boot/k", TLSSANs: []string{"x"}}
	if err := want.Save(path); err != nil {
		t.Fatal(err)
	}
	if known, err := LoadSettings(path, &s); !known || err != nil || !s.Equal(want) {
		t.Fatalf("LoadSettings = %v, %v, %+v", known, err, s)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadSettings(path, &s); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("LoadSettings of a damaged file = %v", err)
	}
}

func TestKindOf(t *testing.T) {
	tree, err := datadir.New("/srv/lab")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		exe  string
		args string
		want Kind
	}{
		{"/opt/atoll", "atoll server --data-dir=/srv/lab", Services},
		{"/opt/atoll", "/opt/bin/atoll agent --data-dir /srv/lab/", Services},
		{"/srv/lab/bin/atoll", "atoll up --background --data-dir=/srv/lab", Supervisor},
		{"/srv/lab/bin/atoll", "atoll keeper --data-dir=/srv/lab", Supervisor},
		{"/srv/lab/bin/atoll", "atoll down --data-dir=/srv/lab", 0},
		{"/srv/lab/bin/atoll-pod", "atoll-pod pool --config=x", Services},
		{"/srv/lab/bin/atoll-pod", "atoll-pod shim-daemon", Pods},
		{"/srv/lab/bin/containerd-shim-runc-v2", "containerd-shim-runc-v2 -namespace k8s.io", Pods},
		{"/srv/lab/bin/cni/atoll", "atoll x", Pods},
		{"/opt/atoll", "atoll server --data-dir=/srv/other", 0},
		{"/opt/atoll", "atoll server", 0},
		{"/srv/lab2/bin/atoll-pod", "atoll-pod pool", 0},
		{"/bin/sh", "sh -c atoll server --data-dir=/srv/lab", 0},
		{"", "", 0},
	}
	for _, tt := range tests {
		info := process.Info{Exe: tt.exe, Args: strings.Fields(tt.args)}
		if got := kindOf(tree, info); got != tt.want {
			t.Errorf("%s (%s) is of kind %d, want %d", tt.args, tt.exe, got, tt.want)
		}
	}
	standard, err := datadir.New(datadir.DefaultRoot)
	if err != nil {
		t.Fatal(err)
	}
	if kindOf(standard, process.Info{Args: []string{"atoll", "server"}}) != Services {
		t.Error("a role without --data-dir does not belong to the default data directory")
	}
}

func TestAddress(t *testing.T) {
	if ip, err := (Settings{NodeIP: "192.0.2.7"}).Address(); err != nil || ip.String() != "192.0.2.7" {
		t.Errorf("Address = %s, %v", ip, err)
	}
	if ip, err := (Settings{}).Address(); err != nil || !ip.Is4() || ip.IsLoopback() {
		t.Errorf("Address = %s, %v", ip, err)
	}
}
