package program

import (
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "rewrite golden files")

func ordinary(args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_NO_SUCH"}
	adj := -998
	return &specs.Spec{
		Root: &specs.Root{},
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/usr/bin::/bin", "A=1", "A=2"}, OOMScoreAdj: &adj,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "mode=0620"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid"}},
			{Destination: "/etc/hosts", Type: "bind", Source: "/v/hosts/hosts", Options: []string{"rbind", "rprivate", "rw"}},
			{Destination: "/data", Type: "bind", Source: "/v/data", Options: []string{"rbind", "rro", "noatime", "rshared"}},
		},
		Linux: &specs.Linux{MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"}},
	}
}

func binds() map[int]Bind {
	return map[int]Bind{4: {Root: "/v/hosts", Sub: "hosts"}, 5: {Root: "/v/data", Dir: true}}
}

func container(spec *specs.Spec) Container {
	return Container{Spec: spec, Rootfs: "/run/rootfs", Overlay: "lowerdir=/l", Binds: binds(), Home: "/root"}
}

// usual are the mounts that containerd gives every container, and more.
func usual(more ...specs.Mount) []specs.Mount {
	var list []specs.Mount
	for _, p := range furniture() {
		list = append(list, specs.Mount{Destination: p.dest, Type: p.fsType, Source: p.fsType, Options: p.options})
		if p.dest == "/dev/pts" {
			list = append(list, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid"}})
		}
	}
	return append(list, more...)
}

func TestFurnished(t *testing.T) {
	at := func(i int, m specs.Mount) []specs.Mount { return slices.Insert(usual(), i, m) }
	other := func(dest string) specs.Mount { return specs.Mount{Destination: dest, Type: "tmpfs"} }
	without := slices.Delete(usual(), 1, 2)
	changed := usual()
	changed[5].Options = []string{"nosuid", "noexec", "nodev", "rw"}
	reordered := usual()
	reordered[5].Options = []string{"ro", "nodev", "nosuid", "noexec"}
	for name, c := range map[string]struct {
		mounts []specs.Mount
		want   int
	}{
		"usual": {usual(), 6}, "other order of options": {reordered, 6},
		"data first": {at(0, other("/data")), 6}, "later in dev": {append(usual(), other("/dev/pts/x")), 6},
		"none": {nil, 0}, "no dev": {without, 0}, "writable sys": {changed, 0},
		"over dev": {at(3, other("/dev")), 0}, "in proc": {at(1, other("/proc/x")), 0},
		"above cgroup": {at(6, other("/sys/fs")), 0}, "over all": {at(1, other("/")), 0},
		"twice": {append(usual(), usual()[0]), 6}, "twice at first": {at(1, usual()[0]), 0},
	} {
		if got := furnished(c.mounts); len(got) != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestGolden(t *testing.T) {
	user := ordinary("/bin/app", "-x")
	user.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{7}}
	user.Process.NoNewPrivileges = true
	user.Process.Capabilities.Ambient = []string{"CAP_NET_BIND_SERVICE"}
	user.Process.Cwd = "/work/dir"
	user.Root.Readonly = true
	major := int64(10)
	user.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x/fuse", Type: "c", Major: major, Minor: 229}}
	user.Linux.Sysctl = map[string]string{"net.ipv4.ping_group_range": "0 1"}
	withUser := container(user)
	withUser.Seccomp, withUser.SeccompFlags = make([]byte, 16), 2
	withTerminal := container(ordinary("sh"))
	withTerminal.Terminal = true
	withTerminal.Spec.Process.ConsoleSize = &specs.Box{Width: 90, Height: 30}
	privileged := container(ordinary("sh"))
	privileged.Privileged = true
	elsewhere := container(ordinary("sh"))
	elsewhere.Spec.Linux.Devices = []specs.LinuxDevice{{Path: "/opt/0", Type: "b", Major: 8, Minor: 16}}
	furnished := container(ordinary("sh"))
	furnished.Spec.Mounts = usual(furnished.Spec.Mounts[4:]...)
	furnished.Binds = map[int]Bind{7: {Root: "/v/hosts", Sub: "hosts"}, 8: {Root: "/v/data", Dir: true}}
	furnished.Furnished = true
	for name, compile := range map[string]func() (*Program, error){
		"ordinary":   container(ordinary("sh", "-c", "100%")).Compile,
		"privileged": privileged.Compile,
		"user":       withUser.Compile,
		"terminal":   withTerminal.Compile,
		"device":     elsewhere.Compile, // outside of /dev
		"exec":       Exec{Process: ordinary("ls").Process, Seccomp: make([]byte, 8), Home: "/"}.Compile,
		"exectty":    Exec{Process: ordinary("ls").Process, Terminal: true}.Compile,
		"pause":      Pause,
		"furnish":    Furnish,
		"furnished":  furnished.Compile,
	} {
		t.Run(name, func(t *testing.T) {
			p, err := compile()
			if err != nil {
				t.Fatal(err)
			}
			got, file := p.String(), filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s differs; run with -update and look at the diff\n%s", file, got)
			}
		})
	}
}

func TestLayout(t *testing.T) {
	p, err := container(ordinary("sh")).Compile()
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	if got := le.Uint32(p.Code); got != magic {
		t.Errorf("magic %#x", got)
	}
	count, entry, size := le.Uint32(p.Code[4:]), le.Uint32(p.Code[8:]), le.Uint32(p.Code[12:])
	if int(size) != len(p.Code) || entry%8 != 0 || entry+count*opSize != size {
		t.Errorf("count %d entry %d size %d, %d bytes", count, entry, size, len(p.Code))
	}
}

func TestRefused(t *testing.T) {
	for name, change := range map[string]func(*specs.Spec){
		"no process":     func(s *specs.Spec) { s.Process = nil },
		"no args":        func(s *specs.Spec) { s.Process.Args = nil },
		"NUL":            func(s *specs.Spec) { s.Process.Args = []string{"a\x00b"} },
		"relative cwd":   func(s *specs.Spec) { s.Process.Cwd = "x" },
		"rlimit":         func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} },
		"file system":    func(s *specs.Spec) { s.Mounts[0].Type = "ext4" },
		"remount":        func(s *specs.Spec) { s.Mounts[0].Options = []string{"remount"} },
		"root mount":     func(s *specs.Spec) { s.Mounts[0].Destination = "/" },
		"unknown source": func(s *specs.Spec) { s.Mounts[3].Type = "bind" },
		"device":         func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "z"}} },
		"sysctl":         func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"../../x": "1"} },
	} {
		spec := ordinary("sh")
		change(spec)
		if _, err := container(spec).Compile(); !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := container(ordinary("sh"))
	c.Seccomp = make([]byte, 7)
	if _, err := c.Compile(); !errors.Is(err, ErrInvalid) {
		t.Errorf("odd seccomp program: %v", err)
	}
}

func TestSysctlPath(t *testing.T) {
	for in, want := range map[string]string{
		"net.ipv4.ip_forward": "/proc/sys/net/ipv4/ip_forward", "kernel/shmmax": "/proc/sys/kernel/shmmax",
		"net/ipv4/conf/eth0.1/forwarding": "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
		"net.ipv4.conf.eth0/1.forwarding": "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
		"../x":                            "", "": "", "a..b": "", "/etc/passwd": "",
	} {
		if got, err := SysctlPath(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func TestErrorTexts(t *testing.T) {
	p, err := container(ordinary("sh%d")).Compile()
	if err != nil {
		t.Fatal(err)
	}
	report := func(step int, errno unix.Errno) []byte {
		b := binary.LittleEndian.AppendUint32(nil, uint32(step))
		return binary.LittleEndian.AppendUint32(b, uint32(errno))
	}
	if got := p.Error(report(len(p.steps)-1, unix.ENOENT)); got.Error() != `exec: "sh%d": executable file not found in $PATH` || !errors.Is(got, unix.ENOENT) {
		t.Errorf("got %v", got)
	}
	if got := p.Error(report(len(p.steps)-2, unix.ENOEXEC)); !strings.HasPrefix(got.Error(), `exec /bin/sh%d: exec format error (no program for linux/amd64`) {
		t.Errorf("got %v", got)
	}
	for _, bad := range [][]byte{nil, {1}, report(1<<20, 1)} {
		if p.Error(bad) == nil {
			t.Errorf("%v accepted", bad)
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	spec := ordinary("sh")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := container(spec).Compile(); err != nil {
			b.Fatal(err)
		}
	}
}
