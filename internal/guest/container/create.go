package container

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/flatspec"
	"atoll.dev/atoll/internal/guest/program"
)

// ImageVolume is a volume that starts with the content of a directory in the image.
type ImageVolume struct {
	Volume string
	Path   string
}

// Create is a request for a container.
type Create struct {
	ID           string
	Spec         []byte   // OCI runtime spec, see package flatspec
	Lowers       []string // image ids, topmost first
	Terminal     bool
	Stdin        bool
	ImageVolumes []ImageVolume
	Seccomp      []byte
	SeccompFlags uint32
}

// Create prepares a container; nothing runs yet.
func (r *Runtime) Create(req Create) (err error) {
	spec, err := flatspec.ReadSpec(req.Spec)
	if err != nil {
		return fmt.Errorf("reading spec: %w: %w", ErrInvalid, err)
	}
	if spec.Process == nil {
		return fmt.Errorf("spec has no process: %w", ErrInvalid)
	}
	c := &Container{id: req.ID, runtime: r, privileged: privileged(spec.Linux), execs: map[string]*process{}}
	if err := r.reserve(c); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if c.shell != nil {
				r.cfg.Watch.drop(c.id)
				r.dropShell(c.shell)
			}
			r.forget(req.ID)
		}
	}()
	lowers, err := r.lowers(req.Lowers)
	if err != nil {
		return err
	}
	if c.shell, err = r.takeShell(); err != nil {
		return err
	}
	if err := c.shell.prepareLayer(lowers[0]); err != nil {
		return err
	}
	if err := r.fillVolumes(lowers, req.ImageVolumes); err != nil {
		return err
	}
	binds, err := r.binds(spec.Mounts)
	if err != nil {
		return err
	}
	if c.pid, err = r.pidMode(spec); err != nil {
		return err
	}
	if c.privileged {
		nodes, err := guestDevices("/dev")
		if err != nil {
			return err
		}
		spec.Linux.Devices = append(spec.Linux.Devices, nodes...)
	}
	if req.Terminal || req.Stdin || c.pid != (pidMode{}) {
		c.shell.dropHelper()
	}
	prog, err := program.Container{
		Spec: spec, Rootfs: r.cfg.Rootfs, Overlay: c.shell.overlay(append(lowers, r.cfg.MountPoints.below(spec.Mounts)...)), Binds: binds, Terminal: req.Terminal,
		Privileged: c.privileged, Furnished: c.shell.helper != nil, Seccomp: req.Seccomp, SeccompFlags: req.SeccompFlags, Home: home(lowers, spec.Process),
	}.Compile()
	if err != nil {
		return err
	}
	c.init = newProcess(prog, req.Terminal, req.Stdin)
	return c.setLimits(spec.Linux)
}

// reserve enters a container that is not ready yet; process answers ErrState until it is.
func (r *Runtime) reserve(c *Container) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.containers[c.id]; ok {
		return fmt.Errorf("container %s: %w", c.id, ErrExists)
	}
	r.containers[c.id] = c
	return nil
}

// lowers finds the directories of the images.
func (r *Runtime) lowers(ids []string) ([]string, error) {
	if len(ids) == 0 {
		return nil, fmt.Errorf("container without an image: %w", ErrInvalid)
	}
	dirs := make([]string, len(ids))
	for i, id := range ids {
		dir, err := r.cfg.Disks.Image(id)
		if err != nil {
			return nil, err
		}
		dirs[i] = dir
	}
	return dirs, nil
}

// overlay is the mount data of the root file system. The layer dies with the virtual machine: no
// sync of it is worth anything ("volatile").
func (s *shell) overlay(lowers []string) string {
	return "lowerdir=" + strings.Join(lowers, ":") + ",upperdir=" + s.upper + ",workdir=" + s.work +
		",index=off,metacopy=off,redirect_dir=off,volatile"
}

// fillVolumes copies image directories into the volumes that start with them.
func (r *Runtime) fillVolumes(lowers []string, list []ImageVolume) error {
	for _, v := range list {
		for _, lower := range lowers {
			fd, err := openIn(lower, v.Path, unix.O_PATH|unix.O_DIRECTORY)
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
				continue
			}
			if err != nil {
				return fmt.Errorf("image directory %s: %w", v.Path, err)
			}
			err = r.cfg.Volumes.Fill(v.Volume, fmt.Sprintf("/proc/self/fd/%d/.", fd))
			_ = unix.Close(fd)
			if err != nil {
				return err
			}
			break
		}
	}
	return nil
}

// openIn opens a path as if root were the root directory.
func openIn(root, name string, flags uint64) (int, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(dir) }()
	return unix.Openat2(dir, path.Clean("/"+name), &unix.OpenHow{
		Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
}

// binds resolves the sources of all bind mounts.
func (r *Runtime) binds(mounts []specs.Mount) (map[int]program.Bind, error) {
	binds := map[int]program.Bind{}
	for i, m := range mounts {
		if !isBind(m) {
			continue
		}
		if path.Clean(m.Source) == r.cfg.Shm {
			binds[i] = program.Bind{Root: r.cfg.Shm, Dir: true}
			continue
		}
		src, err := r.cfg.Volumes.Source(m.Source)
		if err != nil {
			return nil, fmt.Errorf("mount on %s: %w", m.Destination, err)
		}
		binds[i] = program.Bind{Root: src.Root, Sub: src.Sub, Dir: src.Dir}
	}
	return binds, nil
}

func isBind(m specs.Mount) bool {
	if m.Type == "bind" {
		return true
	}
	for _, o := range m.Options {
		if o == "bind" || o == "rbind" {
			return true
		}
	}
	return false
}

// pidMode says which pid namespace a container lives in.
type pidMode struct {
	shared bool   // the pod's
	path   string // another container's, /proc/<pid>/ns/pid
}

func (r *Runtime) pidMode(spec *specs.Spec) (pidMode, error) {
	if spec.Linux == nil {
		return pidMode{}, nil
	}
	r.mu.Lock()
	shared := r.pause.pid != 0
	r.mu.Unlock()
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type != specs.PIDNamespace {
			continue
		}
		if ns.Path != "" {
			if ok, err := path.Match("/proc/[0-9]*/ns/pid", ns.Path); err != nil || !ok {
				return pidMode{}, fmt.Errorf("pid namespace %q: %w", ns.Path, ErrInvalid)
			}
			return pidMode{path: ns.Path}, nil
		}
	}
	return pidMode{shared: shared}, nil
}

// setLimits makes the cgroup the container's; with it the container is ready.
func (c *Container) setLimits(linux *specs.Linux) error {
	group := c.shell.group
	var resources *specs.LinuxResources
	if linux != nil {
		resources = linux.Resources
	}
	if err := group.Apply(resources); err != nil {
		return err
	}
	if err := c.runtime.cfg.Filter.attach(group, resources, linux); err != nil {
		return err
	}
	if err := c.runtime.cfg.Watch.add(c.id, group); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.group = group
	return nil
}
