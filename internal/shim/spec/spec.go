// Package spec turns the OCI runtime spec that containerd writes for this host into the spec that the
// guest carries out.
//
// Every concern is one pure function of the spec (see steps). What needs to look at the host, such as
// where a bind mount comes from, is asked of the caller through Env. The package does no I/O and knows
// neither the guest protocol nor volumes. internal/shim/task calls Container and Exec; the input is
// containerd's and trusted to be well-formed, but a pod's author has chosen much of it.
//
// What can go wrong: the pod asks for something a micro-VM cannot have. Such errors wrap ErrUnsupported
// and say what to do instead; they reach the user as the pod's event.
package spec

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ErrUnsupported is wrapped by errors about what a container in a micro-VM cannot have.
var ErrUnsupported = errors.New("not possible in a micro-VM pod")

// Instead is the way out that errors name: the runtime class for pods that need the host.
const Instead = `use runtimeClassName "runc" in a namespace whose administrator allows it`

// MaxBytes bounds a spec, so that it fits into one message to the guest.
const MaxBytes = 3 << 20

// Env answers what the spec alone does not say.
type Env struct {
	// SandboxPID is the pid that containerd knows the sandbox by.
	SandboxPID uint32
	// GuestPID returns the pid in the guest of the container that containerd knows by a pid, or 0.
	GuestPID func(pid uint32) uint32
	// Bind returns the guest path of a bind mount's source.
	Bind func(specs.Mount) (string, error)
	// Device returns the device in the guest for one of the host; false if the guest cannot have it.
	Device func(specs.LinuxDevice) (specs.LinuxDevice, bool, error)
	// Files are mounted where the spec itself mounts nothing: the pod's /etc/hosts and the like.
	Files []specs.Mount
	// Shm is the guest path of the pod's shared memory.
	Shm string
}

// Container edits the spec in place.
func Container(s *specs.Spec, env Env) error {
	if s.Process == nil || s.Linux == nil || s.Root == nil {
		return errors.New("spec has no process, root or linux section")
	}
	steps := []struct {
		name string
		run  func(*specs.Spec, Env) error
	}{
		{"refusing what needs the host", refuse},
		{"rewriting devices", devices},
		{"rewriting namespaces", namespaces},
		{"rewriting mounts", mounts},
		{"adding pod files", addFiles},
		{"dropping what belongs to the host", drop},
		{"rewriting process", func(s *specs.Spec, _ Env) error { return process(s.Process, Privileged(s)) }},
	}
	for _, step := range steps {
		if err := step.run(s, env); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

// Exec edits the process of an exec in place.
func Exec(p *specs.Process, privileged bool) error { return process(p, privileged) }

// Privileged reports whether a container may use all devices. For micro-VMs, containerd is configured to
// say so of privileged containers only, and without listing the host's devices. It holds of the guest's
// spec, too: there the devices are those of the guest.
func Privileged(s *specs.Spec) bool {
	if s.Linux == nil || s.Linux.Resources == nil {
		return false
	}
	return slices.ContainsFunc(s.Linux.Resources.Devices, func(d specs.LinuxDeviceCgroup) bool {
		return d.Allow && (d.Type == "" || d.Type == "a") && d.Major == nil && d.Minor == nil && d.Access == "rwm"
	})
}

// Parse decodes a spec.
func Parse(data []byte) (*specs.Spec, error) {
	if len(data) > MaxBytes {
		return nil, fmt.Errorf("decoding spec: %d bytes are more than %d", len(data), MaxBytes)
	}
	s := &specs.Spec{}
	if err := json.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("decoding spec: %w", err)
	}
	return s, nil
}

// refuse finds what only a container on the host can have.
func refuse(s *specs.Spec, _ Env) error {
	switch {
	case s.Hooks != nil && hooks(s.Hooks) > 0:
		return fmt.Errorf("%w: OCI hooks, which run programs of the host; %s", ErrUnsupported, Instead)
	case len(s.Linux.UIDMappings) > 0 || len(s.Linux.GIDMappings) > 0:
		return fmt.Errorf("%w: user namespaces; leave hostUsers unset, the pod has its own kernel", ErrUnsupported)
	}
	return nil
}

// devices replaces the devices that stand for block volumes by those in the guest.
func devices(s *specs.Spec, env Env) error {
	for i, d := range s.Linux.Devices {
		ok := false
		if env.Device != nil {
			var err error
			if d, ok, err = env.Device(d); err != nil {
				return err
			}
		}
		if !ok {
			return fmt.Errorf("%w: device %s of the host; %s", ErrUnsupported, d.Path, Instead)
		}
		s.Linux.Devices[i] = d
	}
	return nil
}

func hooks(h *specs.Hooks) int {
	return len(h.Prestart) + len(h.CreateRuntime) + len(h.CreateContainer) + //nolint:staticcheck // old specs use it
		len(h.StartContainer) + len(h.Poststart) + len(h.Poststop)
}

// namespaces keeps what the guest must know: a container has its own mount and cgroup namespace, and
// its network, IPC and UTS namespaces are the pod's. Only the pid namespace is a choice: without a path
// it is the container's own, or the pod's where the pod was set up to share one.
func namespaces(s *specs.Spec, env Env) error {
	out := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	pid := specs.LinuxNamespace{Type: specs.PIDNamespace}
	seen := false
	for _, ns := range s.Linux.Namespaces {
		switch ns.Type {
		case specs.PIDNamespace:
			seen = true
			if ns.Path == "" {
				continue
			}
			target, err := pidOf(ns.Path)
			if err != nil {
				return err
			}
			if target == env.SandboxPID {
				continue
			}
			guest := env.GuestPID(target)
			if guest == 0 {
				return fmt.Errorf("the container whose pid namespace is to be shared (pid %d) is gone", target)
			}
			pid.Path = fmt.Sprintf("/proc/%d/ns/pid", guest)
		case specs.UserNamespace:
			return fmt.Errorf("%w: user namespaces; leave hostUsers unset, the pod has its own kernel", ErrUnsupported)
		case specs.TimeNamespace:
			return fmt.Errorf("%w: time namespaces", ErrUnsupported)
		}
	}
	if !seen {
		return fmt.Errorf("%w: the host's pid namespace; %s", ErrUnsupported, Instead)
	}
	s.Linux.Namespaces = append(out, pid)
	return nil
}

// pidOf returns the pid in /proc/<pid>/ns/pid.
func pidOf(p string) (uint32, error) {
	var pid uint32
	if n, err := fmt.Sscanf(p, "/proc/%d/ns/pid", &pid); n != 1 || err != nil || p != fmt.Sprintf("/proc/%d/ns/pid", pid) {
		return 0, fmt.Errorf("%w: pid namespace %q", ErrUnsupported, p)
	}
	return pid, nil
}

// mounts replaces the sources of bind mounts by guest paths, and the private /dev/shm by the pod's.
func mounts(s *specs.Spec, env Env) error {
	for i := range s.Mounts {
		m := &s.Mounts[i]
		if len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0 {
			return fmt.Errorf("%w: id-mapped mount at %s", ErrUnsupported, m.Destination)
		}
		switch {
		case IsBind(*m):
			source, err := env.Bind(*m)
			if err != nil {
				return err
			}
			m.Source, m.Type = source, "bind"
		case m.Type == "tmpfs" && path.Clean(m.Destination) == "/dev/shm":
			*m = specs.Mount{Destination: m.Destination, Type: "bind", Source: env.Shm, Options: []string{"rbind", "rprivate", "rw", "nosuid", "noexec", "nodev"}}
		case m.Type == "cgroup":
			m.Type, m.Source = "cgroup2", "cgroup"
			m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool {
				return o == "nsdelegate" || o == "memory_recursiveprot"
			})
		}
	}
	return nil
}

// IsBind reports whether a mount is a bind mount.
func IsBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// addFiles mounts the pod's files where the container has no mount of its own. They are read-only
// where its root file system is.
func addFiles(s *specs.Spec, env Env) error {
	for _, f := range env.Files {
		taken := slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool {
			d, t := path.Clean(m.Destination), path.Dir(f.Destination)
			// A volume on the whole directory brings its own files or has none.
			return d == f.Destination || d == t
		})
		if taken {
			continue
		}
		f.Type = "bind"
		f.Options = []string{"rbind", "rprivate", "rw"}
		if s.Root.Readonly {
			f.Options[2] = "ro"
		}
		s.Mounts = append(s.Mounts, f)
	}
	return nil
}

// drop removes what means something on this host only, or is sent apart.
func drop(s *specs.Spec, _ Env) error {
	s.Hostname, s.Domainname = "", ""
	s.Annotations, s.Hooks = nil, nil
	s.Linux.Seccomp = nil
	s.Linux.MountLabel = ""
	s.Linux.IntelRdt = nil
	s.Linux.CgroupsPath = ""
	privileged := Privileged(s)
	if s.Linux.Resources != nil {
		Resources(s.Linux.Resources)
	}
	if privileged {
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	s.Root.Path = "rootfs"
	return nil
}

// Resources edits the limits of a container in place.
func Resources(r *specs.LinuxResources) {
	// Devices in the guest are the guest's own.
	r.Devices = nil
	r.BlockIO, r.Network, r.Rdma = nil, nil, nil
	if r.CPU != nil {
		// CPU and memory node numbers of the host mean nothing in the guest.
		r.CPU.Cpus, r.CPU.Mems = "", ""
	}
	// Limits per page size that are zero and cannot be exceeded.
	r.HugepageLimits = slices.DeleteFunc(r.HugepageLimits, func(h specs.LinuxHugepageLimit) bool { return h.Limit == 0 })
}

// process drops labels of security modules, which the guest kernel does not have, and makes explicit
// what would be inherited from guest init. containerd gives privileged processes the capabilities that
// the host has; the guest may have more.
func process(p *specs.Process, privileged bool) error {
	if privileged {
		all := cap.Known()
		p.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	}
	if p.OOMScoreAdj == nil {
		p.OOMScoreAdj = new(int)
	}
	p.ApparmorProfile, p.SelinuxLabel = "", ""
	p.CommandLine = ""
	p.Scheduler, p.IOPriority, p.ExecCPUAffinity = nil, nil, nil
	if len(p.Args) == 0 {
		return errors.New("no command to run")
	}
	if strings.ContainsRune(strings.Join(p.Args, ""), 0) {
		return errors.New("command has a NUL character")
	}
	return nil
}
