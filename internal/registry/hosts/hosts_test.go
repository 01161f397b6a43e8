package hosts

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/testkit/golden"
)

func all(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	files, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		name, _ := filepath.Rel(dir, f)
		b.WriteString("== " + name + "\n" + string(text) + "\n")
		if strings.HasSuffix(f, ".toml") {
			if err := toml.Unmarshal(text, &map[string]any{}); err != nil {
				t.Errorf("%s is no TOML: %v", name, err)
			}
		}
	}
	return b.String()
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{
		Dir: filepath.Join(dir, "registries"), Portal: "192.0.2.7:443", Address: "192.0.2.7",
		CA: "/var/lib/atoll/pki/cluster-ca.crt", ExternalMark: filepath.Join(dir, "external-registry"),
	}
	own := filepath.Join(cfg.Dir, "my.registry")
	if err := os.MkdirAll(own, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(own, "hosts.toml"), []byte("server = \"https://mine\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	spec := atoll.RegistryConfigurationSpec{
		Mirrors: []atoll.RegistryMirror{
			{Registry: "docker.io", Endpoints: []atoll.RegistryEndpoint{"https://mirror.example.com", "http://10.0.0.1:5000/hub/v2"}, CA: "PEM\n"},
			{Registry: "quay.io:8443", Endpoints: []atoll.RegistryEndpoint{"https://mirror.example.com/"}},
			{Registry: "my.registry", Endpoints: []atoll.RegistryEndpoint{"https://mirror.example.com"}},
			{Registry: atoll.RegistryHost, Endpoints: []atoll.RegistryEndpoint{"https://thief.example.com"}},
		},
	}
	if err := Write(cfg, spec); err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "mirrors.txt", all(t, cfg.Dir))
	if _, err := os.Stat(cfg.ExternalMark); err == nil {
		t.Error("there is no external registry")
	}

	spec = atoll.RegistryConfigurationSpec{External: &atoll.ExternalRegistry{URL: "https://harbor.example.com", CA: "PEM\n"}}
	for range 2 {
		if err := Write(cfg, spec); err != nil {
			t.Fatal(err)
		}
	}
	golden.Compare(t, "external.txt", all(t, cfg.Dir))
	if _, err := os.Stat(cfg.ExternalMark); err != nil {
		t.Error(err)
	}

	if err := Write(cfg, atoll.RegistryConfigurationSpec{}); err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "plain.txt", all(t, cfg.Dir))
	if _, err := os.Stat(cfg.ExternalMark); err == nil {
		t.Error("there is no external registry any more")
	}
}
