package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "write golden files")

func env() Env {
	return Env{
		SandboxPID: 4711,
		GuestPID: func(pid uint32) uint32 {
			if pid == 1<<22+3 {
				return 77
			}
			return 0
		},
		Bind: func(m specs.Mount) (string, error) {
			if strings.HasPrefix(m.Source, "/host") {
				return "", fmt.Errorf("%w: host path", ErrUnsupported)
			}
			return "/run/atoll/volumes/" + filepath.Base(m.Source), nil
		},
		Files: []specs.Mount{
			{Destination: "/etc/hosts", Source: "/run/atoll/volumes/pod/hosts"},
			{Destination: "/etc/resolv.conf", Source: "/run/atoll/volumes/pod/resolv.conf"},
		},
		Shm: "/run/atoll/shm",
	}
}

// read returns the spec of an nginx container as containerd writes it.
func read(t testing.TB) *specs.Spec {
	t.Helper()
	b, err := os.ReadFile("testdata/nginx.in.json")
	if err != nil {
		t.Fatal(err)
	}
	s, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestGolden(t *testing.T) {
	cases := map[string]func(*specs.Spec){
		"nginx": func(*specs.Spec) {},
		"shared-pid-readonly": func(s *specs.Spec) {
			s.Root.Readonly = true
			s.Linux.Namespaces[0].Path = "/proc/4711/ns/pid"
		},
		"privileged": func(s *specs.Spec) {
			s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
			s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Linux.Seccomp = nil, nil, nil
			s.Process.Capabilities.Bounding = []string{"CAP_CHOWN"} // all that this host has
		},
		"target-pid": func(s *specs.Spec) { s.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", 1<<22+3) },
	}
	for name, edit := range cases {
		t.Run(name, func(t *testing.T) {
			s := read(t)
			edit(s)
			if err := Container(s, env()); err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(s, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			golden := filepath.Join("testdata", name+".golden.json")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("spec differs from %s; run with -update and look at the diff", golden)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	cases := map[string]func(*specs.Spec){
		"device": func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/fuse"}} },
		"hook":   func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/x"}}} },
		"host path": func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/d", Source: "/host", Type: "bind"})
		},
		"host pid": func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] },
		"user ns": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		},
		"uid map":    func(s *specs.Spec) { s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}} },
		"id mapped":  func(s *specs.Spec) { s.Mounts[0].UIDMappings = []specs.LinuxIDMapping{{Size: 1}} },
		"odd pid ns": func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/run/ns/pid" },
	}
	for name, edit := range cases {
		s := read(t)
		edit(s)
		if err := Container(s, env()); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	gone := read(t)
	gone.Linux.Namespaces[0].Path = "/proc/99/ns/pid"
	if err := Container(gone, env()); err == nil || errors.Is(err, ErrUnsupported) {
		t.Errorf("pid namespace of an unknown container: %v", err)
	}
	if err := Container(&specs.Spec{}, env()); err == nil {
		t.Error("an empty spec is accepted")
	}
	empty := read(t)
	empty.Process.Args = nil
	if err := Container(empty, env()); err == nil {
		t.Error("a spec without a command is accepted")
	}
}

func TestPrivileged(t *testing.T) {
	number := int64(1)
	for name, c := range map[string]struct {
		rules []specs.LinuxDeviceCgroup
		want  bool
	}{
		"none":       {nil, false},
		"deny":       {[]specs.LinuxDeviceCgroup{{Access: "rwm"}}, false},
		"all":        {[]specs.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Access: "rwm"}}, true},
		"all, typed": {[]specs.LinuxDeviceCgroup{{Allow: true, Type: "a", Access: "rwm"}}, true},
		"mknod":      {[]specs.LinuxDeviceCgroup{{Allow: true, Access: "m"}}, false},
		"one kind":   {[]specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Access: "rwm"}}, false},
		"one":        {[]specs.LinuxDeviceCgroup{{Allow: true, Major: &number, Access: "rwm"}}, false},
	} {
		s := read(t)
		s.Linux.Resources.Devices = c.rules
		if got := Privileged(s); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		if err := Container(s, env()); err != nil {
			t.Fatal(err)
		}
		if got := Privileged(s); got != c.want {
			t.Errorf("%s: the guest is told %v", name, got)
		}
	}
	if Privileged(&specs.Spec{}) {
		t.Error("an empty spec is privileged")
	}
	own := &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN"}}
	for privileged, want := range map[bool]bool{false: false, true: true} {
		p := &specs.Process{Args: []string{"x"}, Capabilities: own}
		if err := Exec(p, privileged); err != nil {
			t.Fatal(err)
		}
		if got := slices.Contains(p.Capabilities.Effective, "CAP_SYS_ADMIN"); got != want {
			t.Errorf("exec, privileged %v: capabilities %v", privileged, p.Capabilities.Effective)
		}
	}
}

func TestVolumeOverEtc(t *testing.T) {
	s := read(t)
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/etc/", Source: "/v/etc", Type: "bind"})
	if err := Container(s, env()); err != nil {
		t.Fatal(err)
	}
	for _, m := range s.Mounts {
		if m.Destination == "/etc/resolv.conf" {
			t.Error("resolv.conf is mounted into the pod's own /etc")
		}
	}
}

func FuzzParse(f *testing.F) {
	b, err := os.ReadFile("testdata/nginx.in.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(_ *testing.T, b []byte) {
		if s, err := Parse(b); err == nil {
			_ = Container(s, env())
		}
	})
}
