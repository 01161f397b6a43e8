// Package hosts writes how a host's containerd reaches registries: hosts.toml files, which it reads at each pull.
//
// For the cluster's own registry there are two names, registry.atoll.local and the server's address, both of which lead
// to the portal and trust the cluster's authority. Mirrors and an external registry come from the RegistryConfiguration.
// Files that somebody else has put there are left alone: ours begin with a mark. The agent role calls Write. What can
// go wrong: the directory cannot be written.
package hosts

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// mark is the first line of every file of ours.
const mark = "# Written by atoll from the RegistryConfiguration; changes are lost."

// Config says where things are.
type Config struct {
	// Dir is containerd's config_path.
	Dir string
	// Portal is the address and port of the server's portal.
	Portal string
	// Address is what else, beside registry.atoll.local, images may name the registry by.
	Address string
	// CA is the PEM file that the portal is trusted by.
	CA string
	// ExternalMark is a file that exists while an external registry is used; "" is none.
	ExternalMark string
}

// file is one hosts.toml with the certificates it names.
type file struct {
	dir, text, ca string
}

// Write makes the files say what the configuration does.
func Write(cfg Config, spec atoll.RegistryConfigurationSpec) error {
	wanted := make(map[string]bool)
	for _, f := range files(cfg, spec) {
		wanted[f.dir] = true
		if err := f.write(cfg.Dir); err != nil {
			return fmt.Errorf("configuring registry %s: %w", f.dir, err)
		}
	}
	if err := removeOthers(cfg.Dir, wanted); err != nil {
		return fmt.Errorf("configuring registries: %w", err)
	}
	return setMark(cfg.ExternalMark, spec.External != nil)
}

func setMark(path string, set bool) error {
	if path == "" {
		return nil
	}
	if set {
		return atomicfile.Write(path, nil, 0o644)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// files are all that the configuration asks for. A mirror of the cluster's own registry is not one: it would be asked
// with the credentials of pods.
func files(cfg Config, spec atoll.RegistryConfigurationSpec) []file {
	own := []string{atoll.RegistryHost}
	if cfg.Address != "" && cfg.Address != atoll.RegistryHost {
		own = append(own, cfg.Address)
	}
	var out []file
	for i, name := range own {
		if i == 0 && spec.External != nil {
			out = append(out, external(name, spec.External))
			continue
		}
		out = append(out, file{dir: directory(name), text: render(host{url: "https://" + cfg.Portal, ca: cfg.CA}, nil)})
	}
	for _, m := range spec.Mirrors {
		if m.Registry == atoll.RegistryHost || m.Registry == cfg.Address {
			continue
		}
		out = append(out, mirror(m))
	}
	return out
}

func external(name string, e *atoll.ExternalRegistry) file {
	f := file{dir: directory(name), ca: e.CA}
	f.text = render(host{url: string(e.URL), ca: f.caFile()}, nil)
	return f
}

func mirror(m atoll.RegistryMirror) file {
	f := file{dir: directory(m.Registry), ca: m.CA}
	var list []host
	for _, e := range m.Endpoints {
		h := host{url: string(e)}
		if strings.HasPrefix(h.url, "https://") { // containerd tries TLS with everything that has certificates
			h.ca = f.caFile()
		}
		list = append(list, h)
	}
	f.text = render(host{url: "https://" + upstream(m.Registry)}, list)
	return f
}

// upstream is where a registry answers. That of Docker is known by another name than it has.
func upstream(registry string) string {
	if registry == "docker.io" {
		return "registry-1.docker.io"
	}
	return registry
}

// caName is the file with the certificates of a registry, beside its hosts.toml; a relative name is one there.
const caName = "ca.crt"

func (f file) caFile() string {
	if f.ca == "" {
		return ""
	}
	return caName
}

// host is one place that is asked.
type host struct {
	url string
	ca  string
}

// render writes a hosts.toml: mirrors that are asked first, and the server. Everything in it was checked by the schema
// of the RegistryConfiguration.
func render(server host, mirrors []host) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nserver = %q\n", mark, server.url)
	server.settings(&b, "")
	for _, h := range mirrors {
		fmt.Fprintf(&b, "\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", h.url)
		h.settings(&b, "  ")
	}
	return b.String()
}

// settings writes what one place has of its own.
func (h host) settings(b *strings.Builder, indent string) {
	if h.ca != "" {
		fmt.Fprintf(b, "%sca = %q\n", indent, h.ca)
	}
	if _, path, _ := strings.Cut(h.url, "://"); strings.Contains(strings.TrimSuffix(path, "/"), "/") {
		fmt.Fprintf(b, "%soverride_path = true\n", indent)
	}
}

// directory is where containerd looks for a registry: HOST, or HOST_PORT_.
func directory(registry string) string {
	if name, port, ok := strings.Cut(registry, ":"); ok {
		return name + "_" + port + "_"
	}
	return registry
}

func (f file) write(root string) error {
	dir := filepath.Join(root, f.dir)
	if foreign(dir) {
		return nil // an administrator's own, which stays
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if f.ca != "" {
		if _, err := atomicfile.WriteIfChanged(filepath.Join(dir, caName), []byte(f.ca), 0o644); err != nil {
			return err
		}
	}
	_, err := atomicfile.WriteIfChanged(filepath.Join(dir, "hosts.toml"), []byte(f.text), 0o644)
	return err
}

// foreign says whether there is a hosts.toml that is not ours.
func foreign(dir string) bool {
	text, err := os.ReadFile(filepath.Join(dir, "hosts.toml"))
	return err == nil && !strings.HasPrefix(string(text), mark)
}

// removeOthers removes files of ours that are not wanted any more.
func removeOthers(root string, wanted map[string]bool) error {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		if wanted[e.Name()] || !e.IsDir() || foreign(dir) {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, "hosts.toml")); err != nil {
			continue
		}
		for _, name := range []string{"hosts.toml", caName} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !isNotEmpty(err) {
			return err
		}
	}
	return nil
}

func isNotEmpty(err error) bool { return errors.Is(err, syscall.ENOTEMPTY) }
