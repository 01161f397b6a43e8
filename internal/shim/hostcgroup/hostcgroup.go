// Package hostcgroup puts a micro-VM's processes into a cgroup below the pod's, so that the pod's limits
// on the host hold for QEMU and its shim, and their usage is the pod's.
//
// It sets no limits: the kubelet's are on the parent. Only limits that would stall the micro-VM, or have it
// killed, are raised there, see Sustain. It works on cgroup v2, on v1, and on hosts that
// mix them: the processes join every hierarchy in which the parent exists. internal/shim/sandbox joins,
// internal/shim/start removes what a dead shim left.
//
// What can go wrong: the parent does not exist anywhere (ErrNoParent), and moving takes milliseconds
// per hierarchy, since the kernel waits for a grace period.
package hostcgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoParent is returned when the parent exists in no hierarchy.
var ErrNoParent = errors.New("pod's cgroup does not exist")

// removeTimeout bounds how long Remove waits for processes to be gone.
const removeTimeout = 10 * time.Second

// hierarchy is a mounted cgroup hierarchy.
type hierarchy struct {
	point  string
	cpuset bool // v1 with the cpuset controller
}

// Group is a group in several hierarchies. The zero value is none.
type Group struct {
	// Dirs are its directories, one in each hierarchy.
	Dirs []string
	// Points are where the hierarchies are mounted, in the same order.
	Points []string
}

// Join makes the group name below parent in every hierarchy that has parent and moves the processes
// there. The group is valid, for Remove, even when there is an error.
func Join(parent, name string, pids ...int) (Group, error) {
	g, err := create("/proc/self/mountinfo", parent, name)
	if err == nil {
		err = move(g.Dirs, pids)
	}
	if err != nil {
		return g, fmt.Errorf("joining cgroup %s/%s: %w", parent, name, err)
	}
	return g, nil
}

// leastCPU is the share of a processor that a micro-VM may use at least. The kubelet's limit for a pod
// is what its containers may use, which the guest enforces, and hardly more; the machine around them
// needs some itself, most of all when a container starts and when processors are emulated. A guest that
// is held up by the host charges the time to its containers besides, so below some share nothing moves.
const leastCPU = 0.25

// machineMemory is what QEMU and its shim take at most besides the guest's memory: translated code (128 MiB),
// device models, page tables.
const machineMemory = 192 << 20

// Sustain raises limits of the parent that are too small for a micro-VM with so much memory, in bytes. The
// kubelet sets them when it makes the parent and when it resizes the pod.
//
// A guest keeps its containers to their limits, but by and by it touches all of its memory, if only for files
// it has read once, and gives none back. So the host's limit must leave room for the whole machine; one that is
// lower would end in the death of a pod whose containers have done nothing wrong. Without a group there is
// nothing to do.
func (g Group) Sustain(memory int64) error {
	var errs []error
	for _, dir := range g.Dirs {
		parent := filepath.Dir(dir)
		errs = append(errs, keepCPU(parent), keepMemory(parent, memory+machineMemory))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("raising the limits of the pod's cgroup: %w", err)
	}
	return nil
}

func keepMemory(dir string, least int64) error {
	for _, name := range []string{"memory.max", "memory.limit_in_bytes"} { // of cgroup v2, of v1
		file := filepath.Join(dir, name)
		data, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		text := strings.TrimSpace(string(data))
		if text == "max" {
			return nil
		}
		limit, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("%s is %q", file, text)
		}
		if limit >= least {
			return nil
		}
		return os.WriteFile(file, []byte(strconv.FormatInt(least, 10)), 0o644)
	}
	return nil // another controller's hierarchy
}

func keepCPU(dir string) error {
	name, suffix := "cpu.max", "" // of cgroup v2: quota and period
	data, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		name = "cpu.cfs_quota_us"
		if data, err = os.ReadFile(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			return nil // another controller's hierarchy
		}
		if err == nil {
			var period []byte
			period, err = os.ReadFile(filepath.Join(dir, "cpu.cfs_period_us"))
			data = append(append(data, ' '), period...)
		}
	}
	if err != nil {
		return err
	}
	fields := strings.Fields(string(data))
	if len(fields) == 2 && fields[0] == "max" {
		return nil
	}
	if len(fields) != 2 {
		return fmt.Errorf("%s of %s is %q", name, dir, data)
	}
	quota, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil {
		return err
	}
	period, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return err
	}
	least := int64(leastCPU * float64(period))
	if quota < 0 || quota >= least {
		return nil
	}
	if name == "cpu.max" {
		suffix = " " + fields[1]
	}
	return os.WriteFile(filepath.Join(dir, name), []byte(strconv.FormatInt(least, 10)+suffix), 0o644)
}

// OOMKilled tells whether the kernel has killed a process of the group because memory ran out.
func (g Group) OOMKilled() bool {
	for _, dir := range g.Dirs {
		for _, name := range []string{"memory.events", "memory.oom_control"} { // of cgroup v2, of v1
			data, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				continue // another controller's hierarchy
			}
			for line := range strings.Lines(string(data)) {
				if count, ok := strings.CutPrefix(line, "oom_kill "); ok && strings.TrimSpace(count) != "0" {
					return true
				}
			}
		}
	}
	return false
}

// Leave moves a process out of the group, to the root, so that the group can be removed.
func (g Group) Leave(pid int) error {
	if err := move(g.Points, []int{pid}); err != nil {
		return fmt.Errorf("leaving cgroup: %w", err)
	}
	return nil
}

func create(mountinfo, parent, name string) (Group, error) {
	var g Group
	hs, err := hierarchies(mountinfo)
	if err != nil {
		return g, err
	}
	for _, h := range hs {
		up := filepath.Join(h.point, filepath.Clean("/"+parent))
		if _, err := os.Stat(up); err != nil {
			continue
		}
		dir := filepath.Join(up, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return g, err
		}
		g.Dirs, g.Points = append(g.Dirs, dir), append(g.Points, h.point)
		if h.cpuset {
			if err := inherit(up, dir); err != nil {
				return g, err
			}
		}
	}
	if len(g.Dirs) == 0 {
		return g, ErrNoParent
	}
	return g, nil
}

// inherit copies the sets of a v1 cpuset group, which begin empty and then take no process.
func inherit(parent, dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		now, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(now)) != "" {
			continue
		}
		value, err := os.ReadFile(filepath.Join(parent, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), value, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// move puts processes into the groups. One that has ended is no error. Each move waits in the kernel;
// the waits overlap.
func move(dirs []string, pids []int) error {
	errs := make([]error, len(dirs))
	var wg sync.WaitGroup
	for i, dir := range dirs {
		wg.Go(func() {
			for _, pid := range pids {
				err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644)
				if err != nil && !errors.Is(err, unix.ESRCH) {
					errs[i] = err
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// hierarchies lists what is mounted, each once.
func hierarchies(mountinfo string) ([]hierarchy, error) {
	f, err := os.Open(mountinfo)
	if err != nil {
		return nil, fmt.Errorf("listing cgroup hierarchies: %w", err)
	}
	defer f.Close()
	var out []hierarchy
	seen := map[string]bool{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		mount, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(mount) < 5 || len(super) < 3 || super[0] != "cgroup" && super[0] != "cgroup2" {
			continue
		}
		// A container engine shows parts of a hierarchy; the whole of it has the root "/".
		if device := mount[2]; mount[3] == "/" && !seen[device] {
			seen[device] = true
			out = append(out, hierarchy{
				point:  mount[4],
				cpuset: super[0] == "cgroup" && slices.Contains(strings.Split(super[2], ","), "cpuset"),
			})
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("listing cgroup hierarchies: %w", err)
	}
	return out, nil
}

// Remove removes a group's directories once their processes are gone. Missing ones are no error.
func Remove(ctx context.Context, dirs []string) error {
	var errs []error
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	for _, dir := range dirs {
		for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
			err := unix.Rmdir(dir)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || ctx.Err() != nil {
				errs = append(errs, fmt.Errorf("removing cgroup %s: %w", dir, err))
				break
			}
			<-time.After(wait)
		}
	}
	return errors.Join(errs...)
}
