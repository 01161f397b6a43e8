package preflight

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// checkPlatform refuses machines the guest files are not built for.
func checkPlatform() Result {
	r := Result{Name: "platform", Level: OK, Detail: runtime.GOOS + "/" + runtime.GOARCH}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		r.Detail += ", Linux " + unix.ByteSliceToString(uts.Release[:])
	}
	if runtime.GOARCH != "amd64" {
		r.Level, r.Fix = Fail, "use a machine with an x86-64 processor"
	}
	return r
}

func checkRoot() Result {
	if os.Geteuid() != 0 {
		return Result{
			Name: "root", Level: Fail, Detail: fmt.Sprintf("running as user %d", os.Geteuid()),
			Fix: "run the command as root, for example with sudo",
		}
	}
	return Result{Name: "root", Level: OK, Detail: "running as root"}
}

// program is something the host must have installed.
type program struct {
	name string
	// any of these files is enough; a name without a slash is looked up in
	// PATH and the directories of system programs
	files []string
	pkg   string // the Debian package that has it
	use   string
}

func programs() []program {
	return []program{
		{"qemu", []string{"qemu-system-x86_64"}, "qemu-system-x86", "runs the micro-VMs"},
		{"firmware", []string{"/usr/share/qemu/qboot.rom"}, "qemu-system-data", "starts the pod kernel"},
		{"runc", []string{"runc"}, "runc", "runs pods that need the host"},
		{"nft", []string{"nft"}, "nftables", "Services and NAT"},
		{"mkfs.ext4", []string{"mkfs.ext4"}, "e2fsprogs", "makes scratch disks"},
		{"modprobe", []string{"modprobe"}, "kmod", "loads kernel modules"},
		{"mount", []string{"mount"}, "mount", "mounts volumes of runc pods"},
	}
}

// checkPrograms looks for what must be installed.
func checkPrograms() []Result {
	var out []Result
	for _, p := range programs() {
		r := Result{Name: p.name, Level: OK}
		found := ""
		for _, f := range p.files {
			if path, err := LookPath(f); err == nil {
				found = path
				break
			}
		}
		r.Detail = found
		if found == "" {
			r.Level = Fail
			r.Detail = fmt.Sprintf("%s is missing (%s)", p.files[0], p.use)
			r.Fix = "apt-get install -y " + p.pkg
		}
		out = append(out, r)
	}
	return out
}

// LookPath finds a program in PATH or in the directories of system programs,
// which are often not in the PATH of a login shell.
func LookPath(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	if strings.Contains(name, "/") {
		if _, err := os.Stat(name); err != nil {
			return "", err
		}
		return name, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// Disk space below which a start fails or warns.
const (
	diskFail = 2 << 30
	diskWarn = 8 << 30
)

func (c *Checker) checkDisk() Result {
	dir := c.cfg.DataDir
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	r := Result{Name: "disk space", Level: OK}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		r.Level, r.Detail = Warn, fmt.Sprintf("cannot tell for %s: %v", dir, err)
		return r
	}
	free := int64(st.Bavail) * st.Bsize
	r.Detail = fmt.Sprintf("%s free for %s", gib(free), c.cfg.DataDir)
	switch {
	case free < diskFail:
		r.Level = Fail
		r.Fix = fmt.Sprintf("free at least %s, or choose another --data-dir", gib(diskFail))
	case free < diskWarn:
		r.Level = Warn
		r.Fix = fmt.Sprintf("less than %s is soon full of container images", gib(diskWarn))
	}
	return r
}

// Available memory below which a start fails or warns.
const (
	memoryFail = 1 << 30
	memoryWarn = 2 << 30
)

func checkMemory() Result {
	r := Result{Name: "memory", Level: OK}
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		r.Level, r.Detail = Warn, "cannot tell: "+err.Error()
		return r
	}
	available := meminfo(string(b), "MemAvailable:")
	r.Detail = fmt.Sprintf("%s available of %s", gib(available), gib(meminfo(string(b), "MemTotal:")))
	switch {
	case available < memoryFail:
		r.Level, r.Fix = Fail, fmt.Sprintf("free at least %s of memory", gib(memoryFail))
	case available < memoryWarn:
		r.Level, r.Fix = Warn, "there is room for few pods"
	}
	return r
}

// meminfo returns one value of /proc/meminfo in bytes, 0 when it is missing.
func meminfo(text, key string) int64 {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			var kib int64
			if _, err := fmt.Sscan(rest, &kib); err == nil {
				return kib << 10
			}
		}
	}
	return 0
}

func gib(n int64) string { return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30)) }

// checkExtras reports what makes a difference but is not needed.
func checkExtras() []Result {
	extra := func(name, have string, err error, instead string) Result {
		if err == nil {
			return Result{Name: name, Level: OK, Detail: have}
		}
		return Result{Name: name, Level: Info, Detail: fmt.Sprintf("missing (%v): %s", reason(err), instead)}
	}
	return []Result{
		extra("kvm", "/dev/kvm is there; it is used if it proves to run the pod kernel",
			openable("/dev/kvm"), "the processors of micro-VMs are emulated (TCG)"),
		extra("vhost-net", "/dev/vhost-net is there",
			openable("/dev/vhost-net"), "QEMU itself moves the packets of micro-VMs"),
		extra("vhost-vsock", "/dev/vhost-vsock is there",
			openable("/dev/vhost-vsock"), "the guest channel is a virtio serial port, as it always is for pods"),
		extra("sys_resource", "the process has CAP_SYS_RESOURCE",
			HasCapability(unix.CAP_SYS_RESOURCE), "out-of-memory scores of containers are not lowered"),
	}
}

// reason shortens an error to what the user needs.
func reason(err error) error {
	if path, ok := errors.AsType[*os.PathError](err); ok {
		return path.Err
	}
	return err
}

func openable(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// HasCapability returns nil when this process has a capability in effect.
func HasCapability(capability int) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("reading capabilities: %w", err)
	}
	if data[capability/32].Effective&(1<<(capability%32)) == 0 {
		return errors.New("not among the process's capabilities")
	}
	return nil
}
