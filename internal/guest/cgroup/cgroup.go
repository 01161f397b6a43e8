// Package cgroup drives the guest's cgroup v2 tree: one group for the pod, one below it per
// container.
//
// It knows the kernel's files and the OCI resource types, nothing of containers or processes; guest
// init's container package calls it. Controllers a kernel lacks make single settings fail, which is
// reported only where the setting matters (a limit that is not there must not look like one).
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ErrInUse is wrapped when a new memory limit is below what is in use and the caller asked to be told.
var ErrInUse = errors.New("memory limit is below current usage")

// Tree is the pod's part of the hierarchy.
type Tree struct {
	root string // where cgroup2 is mounted
	pod  string
}

// NewTree returns the tree in a cgroup2 mount; Init makes it.
func NewTree(root string) *Tree {
	return &Tree{root: root, pod: filepath.Join(root, "pod")}
}

// Init delegates all controllers and makes the pod's group.
func (t *Tree) Init() error {
	if err := delegate(t.root); err != nil {
		return err
	}
	if err := os.Mkdir(t.pod, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making pod cgroup: %w", err)
	}
	if err := delegate(t.pod); err != nil {
		return err
	}
	return t.keep()
}

// keep makes a group without processes that has a CPU limit and (from its user) a device filter, as
// containers do. The first such group makes the kernel patch its own code and the last one undoes
// it; with one that stays, neither happens when a container comes or goes.
func (t *Tree) keep() error {
	g := t.Keep()
	if err := os.Mkdir(g.dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making cgroup: %w", err)
	}
	return write(g.dir, "cpu.max", "50000 100000")
}

// Keep is the group without processes.
func (t *Tree) Keep() *Group { return &Group{dir: filepath.Join(t.root, "keep")} }

// controllers are those that containers get. Each costs time when a group is made, so the ones no
// limit or counter here comes from (hugetlb, misc, rdma) stay off.
const controllers = " cpuset cpu io memory pids "

// delegate enables the available ones of our controllers for the children of dir.
func delegate(dir string) error {
	list, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("reading controllers: %w", err)
	}
	var enable []string
	for c := range strings.FieldsSeq(string(list)) {
		if strings.Contains(controllers, " "+c+" ") {
			enable = append(enable, "+"+c)
		}
	}
	return write(dir, "cgroup.subtree_control", strings.Join(enable, " "))
}

// Pod is the group of all containers together.
func (t *Tree) Pod() *Group { return &Group{dir: t.pod} }

// Create makes the group of one container. The id must be a plain file name.
func (t *Tree) Create(id string) (*Group, error) {
	g := &Group{dir: filepath.Join(t.pod, id)}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return nil, fmt.Errorf("making cgroup: %w", err)
	}
	return g, nil
}

// Of is the group a process is in.
func (t *Tree) Of(pid int) (*Group, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, fmt.Errorf("reading cgroup of process %d: %w", pid, err)
	}
	dir, ok := strings.CutPrefix(strings.TrimSuffix(string(data), "\n"), "0::/")
	if !ok {
		return nil, fmt.Errorf("reading cgroup of process %d: got %q", pid, data)
	}
	return &Group{dir: filepath.Join(t.root, dir)}, nil
}

// Group is one cgroup.
type Group struct{ dir string }

// Dir is the group's directory.
func (g *Group) Dir() string { return g.dir }

// Open opens the group's directory for clone3's CLONE_INTO_CGROUP.
func (g *Group) Open() (*os.File, error) {
	fd, err := unix.Open(g.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening cgroup: %w", err)
	}
	return os.NewFile(uintptr(fd), g.dir), nil
}

// setting is one value for one file.
type setting struct {
	file     string
	value    string
	optional bool // the kernel may not have it
}

// Apply sets the limits that are present in r and leaves the rest as it is.
func (g *Group) Apply(r *specs.LinuxResources) error {
	if r == nil {
		return nil
	}
	list, err := g.memory(r.Memory)
	if err != nil {
		return err
	}
	list = append(list, cpu(r.CPU)...)
	if r.Pids != nil && r.Pids.Limit != nil {
		list = append(list, setting{file: "pids.max", value: limit(*r.Pids.Limit)})
	}
	for name, value := range r.Unified {
		if strings.ContainsAny(name, "/") || !strings.Contains(name, ".") {
			return fmt.Errorf("setting unified resource %q: not a cgroup file", name)
		}
		// Swap is not in our kernel: no limit on it can be exceeded.
		list = append(list, setting{file: name, value: value, optional: strings.HasPrefix(name, "memory.swap.")})
	}
	for _, s := range list {
		err := write(g.dir, s.file, s.value)
		if err != nil && (!s.optional || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	return nil
}

func limit(v int64) string {
	if v <= 0 {
		return "max"
	}
	return strconv.FormatInt(v, 10)
}

func (g *Group) memory(m *specs.LinuxMemory) ([]setting, error) {
	if m == nil {
		return nil, nil
	}
	var list []setting
	if m.Limit != nil && *m.Limit != 0 {
		if m.CheckBeforeUpdate != nil && *m.CheckBeforeUpdate && *m.Limit > 0 {
			if used := g.number("memory.current"); used > uint64(*m.Limit) {
				return nil, fmt.Errorf("%w: %d bytes used, limit %d", ErrInUse, used, *m.Limit)
			}
		}
		if m.Swap != nil && *m.Swap > 0 && *m.Limit > 0 && *m.Swap >= *m.Limit {
			list = append(list, setting{"memory.swap.max", strconv.FormatInt(*m.Swap-*m.Limit, 10), true})
		}
		list = append(list, setting{file: "memory.max", value: limit(*m.Limit)})
	}
	if m.Reservation != nil && *m.Reservation != 0 {
		list = append(list, setting{file: "memory.low", value: limit(*m.Reservation)})
	}
	return list, nil
}

func cpu(c *specs.LinuxCPU) []setting {
	if c == nil {
		return nil
	}
	var list []setting
	switch {
	case c.Idle != nil && *c.Idle != 0:
		list = append(list, setting{"cpu.idle", "1", true})
	case c.Shares != nil && *c.Shares != 0:
		list = append(list, setting{file: "cpu.weight", value: strconv.FormatUint(Weight(*c.Shares), 10)})
	}
	if c.Quota != nil || c.Period != nil {
		quota, period := "max", uint64(100000)
		if c.Quota != nil && *c.Quota > 0 {
			quota = strconv.FormatInt(*c.Quota, 10)
		}
		if c.Period != nil && *c.Period != 0 {
			period = *c.Period
		}
		list = append(list, setting{file: "cpu.max", value: quota + " " + strconv.FormatUint(period, 10)})
	}
	if c.Burst != nil {
		list = append(list, setting{"cpu.max.burst", strconv.FormatUint(*c.Burst, 10), true})
	}
	// Cpus and Mems name the host's processors and nodes, which mean nothing here.
	return list
}

// Weight converts cgroup v1 CPU shares (2 to 262144, default 1024) to a v2 weight (1 to 10000,
// default 100) by the quadratic fit that runc and crun use since 2025.
func Weight(shares uint64) uint64 {
	switch {
	case shares <= 2:
		return 1
	case shares >= 262144:
		return 10000
	}
	l := math.Log2(float64(shares))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612.0-7.0/34.0)))
}

// SetMax sets memory.max in bytes; 0 means no limit.
func (g *Group) SetMax(bytes uint64) error {
	value := "max"
	if bytes > 0 {
		value = strconv.FormatUint(bytes, 10)
	}
	return write(g.dir, "memory.max", value)
}

// Pids lists the processes in the group and below.
func (g *Group) Pids() ([]int, error) {
	var pids []int
	err := filepath.WalkDir(g.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if p != g.dir && errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if d.IsDir() {
			return nil
		}
		if d.Name() != "cgroup.procs" {
			return nil
		}
		data, err := os.ReadFile(p)
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for f := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	return pids, nil
}

// Kill sends SIGKILL to everything in the group and below, atomically.
func (g *Group) Kill() error { return write(g.dir, "cgroup.kill", "1") }

// Delete kills what is left, waits until the group is empty and removes it.
func (g *Group) Delete(ctx context.Context) error {
	if err := g.Kill(); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	wait := time.Millisecond
	for {
		err := g.remove()
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("removing cgroup: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("removing cgroup: %w: %w", err, ctx.Err())
		case <-time.After(wait):
			wait = min(2*wait, 100*time.Millisecond)
		}
	}
}

// remove removes the group; only when that fails does it look for groups the container made below.
func (g *Group) remove() error {
	err := unix.Rmdir(g.dir)
	if err == nil || !errors.Is(err, unix.EBUSY) {
		return err
	}
	var dirs []string
	_ = filepath.WalkDir(g.dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	for _, dir := range slices.Backward(dirs) {
		err = unix.Rmdir(dir)
	}
	return err
}

// write writes a control file in one call and names it in the error.
func write(dir, file, value string) error {
	name := filepath.Join(dir, file)
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("setting %s: %w", file, err)
	}
	defer func() { _ = unix.Close(fd) }()
	for {
		_, err = unix.Write(fd, []byte(value))
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("setting %s to %q: %w", file, value, err)
	}
	return nil
}
