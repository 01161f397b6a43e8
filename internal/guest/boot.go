package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/cgroup"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/container"
	"atoll.dev/atoll/internal/guest/disk"
	"atoll.dev/atoll/internal/guest/rtnl"
)

// parts are the pieces of the machine that do not depend on the pod.
type parts struct {
	tree   *cgroup.Tree
	disks  *disk.Disks
	filter *container.DeviceFilter
}

// step is one line of the boot: what it does, in words a console shows when it fails.
type step struct {
	name string
	do   func(m *machine) error
}

func mountStep(source, target, fsType string, flags uintptr, data string) step {
	return step{"mount " + target, func(*machine) error {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(source, target, fsType, flags, data)
		if errors.Is(err, unix.EBUSY) {
			return nil // the kernel did
		}
		return err
	}}
}

func writeStep(file, value string) step {
	return step{"write " + file, func(*machine) error { return os.WriteFile(file, []byte(value), 0o644) }}
}

// monitorSlack is how late the thread of the Go runtime that looks after the others may wake up.
const monitorSlack = 2 * time.Millisecond

// slowMonitor makes that thread, which wakes up every 20 microseconds while there is something to do, less
// busy: under emulation it took a third of the time of each call. It is the first thread after the main one
// (runtime.main starts it before anything else). What suffers is how soon another goroutine goes on when one
// blocks in a system call. Threads and processes that come of it inherit the slack; the exec helper takes it
// back for the containers.
func slowMonitor(*machine) error {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	first := 0
	for _, t := range tasks {
		if tid, err := strconv.Atoi(t.Name()); err == nil && tid != os.Getpid() && (first == 0 || tid < first) {
			first = tid
		}
	}
	if first == 0 {
		return errors.New("there is no such thread")
	}
	slack := strconv.FormatInt(monitorSlack.Nanoseconds(), 10)
	return os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", first), []byte(slack), 0o644)
}

// bootSteps is the boot, in order.
func bootSteps() []step {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	return []step{
		{"leave the initial file system", leaveRootfs},
		mountStep("proc", "/proc", "proc", safe, ""),
		{"slow the runtime's monitor down", slowMonitor},
		mountStep("sysfs", "/sys", "sysfs", safe, ""),
		mountStep("devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755"),
		mountStep("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
		mountStep("tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"),
		mountStep("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"),
		{"load kernel modules", loadModules},
		mountStep("cgroup2", cgroupDir, "cgroup2", safe, "nsdelegate,memory_recursiveprot"),
		{"make directories", makeDirs},
		{"mount " + channel.ShmPath, mountShm},
		{"make mount points", func(*machine) error { return mountPoints.Make() }},
		writeStep("/proc/self/oom_score_adj", "-1000"),
		writeStep("/proc/sys/kernel/panic_on_oops", "1"),
		writeStep("/proc/sys/vm/overcommit_memory", "1"),
		writeStep("/proc/sys/net/ipv6/conf/default/accept_dad", "0"),
		writeStep("/proc/sys/net/ipv6/conf/default/accept_ra", "0"),
		{"raise limits", raiseLimits},
		{"bring up lo", loopbackUp},
		{"delegate cgroups", func(m *machine) error {
			m.tree = cgroup.NewTree(cgroupDir)
			return m.tree.Init()
		}},
		{"limit the pod to the memory there is", func(m *machine) error { return limitPod(m.tree.Pod()) }},
		{"find disks", func(m *machine) error {
			m.disks = disk.New(sysBlock, imagesDir)
			return m.disks.Scan()
		}},
		{"load device filter", func(m *machine) (err error) {
			m.filter, err = container.NewDeviceFilter(m.tree.Keep())
			return err
		}},
		{"watch memory", func(m *machine) (err error) {
			m.watch, err = container.NewWatcher(m.tree.Pod())
			return err
		}},
		{"prepare reaper", func(m *machine) (err error) {
			m.reaper, err = container.NewReaper()
			return err
		}},
		{"open port " + channel.PortName, func(m *machine) (err error) {
			m.port, err = openPort(portsDir, channel.PortName)
			return err
		}},
	}
}

func boot(m *machine) error {
	for _, s := range bootSteps() {
		if err := s.do(m); err != nil {
			return fmt.Errorf("boot step %q: %w", s.name, err)
		}
	}
	return nil
}

// leaveRootfs puts a bind of the initial file system over itself: pivot_root, which containers
// need, refuses to move the first mount of a namespace.
func leaveRootfs(*machine) error {
	const dir = "/newroot"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", dir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	if err := unix.Mount(dir, "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	return unix.Chroot(".")
}

func makeDirs(*machine) error {
	for _, d := range []string{imagesDir, channel.VolumesDir, stageDir, rootfsDir, scratchDir, channel.ShmPath, "/etc"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	// Containers never see these; modes matter only against mistakes.
	return os.Chmod(stageDir, 0o700)
}

// raiseLimits gives init, and so all containers that ask for nothing else, the usual limits of a
// container host.
func raiseLimits(*machine) error {
	const files = 1 << 20
	if err := os.WriteFile("/proc/sys/fs/nr_open", []byte("1073741816"), 0o644); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: files}); err != nil {
		return err
	}
	unlimited := &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	for _, r := range []int{unix.RLIMIT_NPROC, unix.RLIMIT_CORE} {
		if err := unix.Setrlimit(r, unlimited); err != nil {
			return err
		}
	}
	return nil
}

func loopbackUp(*machine) error {
	c, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	lo, err := c.Index("lo")
	if err != nil {
		return err
	}
	return c.SetLink(lo, nil, 0, true)
}

// podReserve is memory that containers together may not use, so that init and the kernel go on
// when they run out.
const podReserve = 16 << 20

func limitPod(pod *cgroup.Group) error {
	total, err := totalMemory()
	if err != nil {
		return err
	}
	return pod.SetMax(max(total-podReserve, podReserve))
}

// totalMemory is MemTotal in bytes.
func totalMemory() (uint64, error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0, fmt.Errorf("reading memory size: %w", err)
	}
	return si.Totalram * uint64(si.Unit), nil
}

// openPort opens the virtio-serial port of that name. Writing to it is non-blocking: a blocking
// write would spin in the kernel until the host has taken the data.
func openPort(dir, name string) (*os.File, error) {
	for end := time.Now().Add(portDeadline); ; {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			got, err := os.ReadFile(filepath.Join(dir, e.Name(), "name"))
			if err == nil && strings.TrimSpace(string(got)) == name {
				return os.OpenFile("/dev/"+e.Name(), os.O_RDWR|unix.O_NONBLOCK, 0)
			}
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("no virtio port named %q", name)
		}
		time.Sleep(5 * time.Millisecond) // the driver may still be probing
	}
}
