package containerd

import (
	"flag"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func testConfig() Config {
	return Config{
		ConfigFile: "/data/containerd/config.toml", Root: "/data/containerd", State: "/run/atoll/containerd",
		Address: "/run/atoll/containerd.sock", SocketDir: "/run/atoll/s", BinDir: "/data/bin",
		CNIBinDir: "/data/bin/cni", CNIConfDir: "/data/cni", RegistryDir: "/data/registries",
		PauseArchive: "/data/images/pause.tar", RestrictOOMScore: true,
	}
}

func TestConfigGolden(t *testing.T) {
	c := testConfig()
	got, err := c.TOML()
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/config.toml"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("configuration differs from %s; run the test with -update and look at the change:\n%s", golden, got)
	}
}

func TestConfigValidate(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Config)
		want   string // part of the error, "" for none
	}{
		{"good", func(*Config) {}, ""},
		{"no pause archive", func(c *Config) { c.PauseArchive = "" }, ""},
		{"relative root", func(c *Config) { c.Root = "data" }, "Root"},
		{"missing bin", func(c *Config) { c.BinDir = "" }, "BinDir"},
		{"relative pause archive", func(c *Config) { c.PauseArchive = "pause.tar" }, "PauseArchive"},
		{"long socket", func(c *Config) { c.Address = "/" + strings.Repeat("x", 110) }, "at most 107"},
		{"same root and state", func(c *Config) { c.State = c.Root }, "same directory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := testConfig()
			tt.change(&c)
			err := c.validate()
			if tt.want == "" && err != nil {
				t.Errorf("got %v, want no error", err)
			}
			if tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want an error about %q", err, tt.want)
			}
		})
	}
}
