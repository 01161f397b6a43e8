// Package podkernel looks at a kernel image that micro-VMs are to boot: which release it is, where
// its modules are, and whether it has what guest init and the devices of a micro-VM need.
//
// It is for kernels that are not Atoll's own, such as Debian's linux-image-cloud-amd64. It reads
// files only; that the kernel really boots shows when the template is built. The preflight check
// and `atoll up` call Find, the pool calls Release and Entries.
//
// What can go wrong: no such file, no kernel, no modules of the same release, a module or an option
// missing. Such an error is an *Error and says what to do.
package podkernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"atoll.dev/atoll/internal/vm/initramfs"
	"atoll.dev/atoll/internal/vm/initramfs/modules"
)

// Kernel is a kernel that pods can run on.
type Kernel struct {
	Path    string // of the image, with symbolic links followed
	Release string // what uname -r says in a pod
	Modules string // the directory of its modules, "" for a kernel that cannot load any
	Checked bool   // its configuration was found, and has all that is needed
}

// Error is why a kernel cannot be used, and what to do.
type Error struct {
	What, Fix string
	Err       error // what it was found by, if anything
}

func (e *Error) Error() string { return e.What + "; " + e.Fix }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Find examines the kernel image of that name. Its modules are those of the same release beside it
// (../lib/modules, where a Debian package unpacked anywhere has them), or in /lib/modules; its
// configuration is the file config-RELEASE beside it or what the image itself holds.
func Find(name string) (Kernel, error) {
	const install = "for Debian's: apt-get install linux-image-cloud-amd64, or guestos/kernel/debian.sh, which only unpacks it"
	path, err := filepath.EvalSymlinks(name)
	if err != nil {
		return Kernel{}, &Error{fmt.Sprintf("there is no kernel %s", name), "name an image that is there; " + install, err}
	}
	image, err := read(path)
	if err != nil {
		return Kernel{}, &Error{fmt.Sprintf("%s: %v", path, err), "name a bzImage or an ELF kernel for x86-64; " + install, err}
	}
	k := Kernel{Path: path, Release: image.release}
	config, err := os.ReadFile(filepath.Join(filepath.Dir(path), "config-"+k.Release))
	if err != nil {
		config = image.config
	}
	options := parse(config)
	if k.Checked = len(options) > 0; k.Checked {
		if lacks := missing(options, image.elf); len(lacks) > 0 {
			return k, &Error{
				What: fmt.Sprintf("kernel %s is built without %s", k.Release, strings.Join(lacks, ", ")),
				Fix:  "use one that has them; " + install,
			}
		}
		if !options["MODULES"] {
			return k, nil
		}
	}
	candidates := []string{
		filepath.Join(filepath.Dir(path), "..", "lib", "modules", k.Release),
		filepath.Join("/lib/modules", k.Release),
	}
	i := slices.IndexFunc(candidates, func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "modules.builtin"))
		return err == nil
	})
	if i < 0 {
		return k, &Error{
			What: fmt.Sprintf("kernel %s has no modules: looked for %s", k.Release, strings.Join(candidates, " and ")),
			Fix:  "install the whole package of the kernel, or unpack it so that boot and lib are side by side; " + install,
		}
	}
	k.Modules = candidates[i]
	if _, err := Entries(k.Modules); err != nil {
		return k, unusable(k, err)
	}
	return k, nil
}

// unusable says what to do about modules that are not as they have to be.
func unusable(k Kernel, err error) error {
	fix := "install the package of the kernel again"
	switch {
	case errors.Is(err, modules.ErrNotFound):
		fix = "install all packages of the kernel (some distributions keep modules in a second one), or use Debian's linux-image-cloud-amd64"
	case errors.Is(err, modules.ErrCompressed):
		fix = "Atoll reads uncompressed modules only, as Debian 12 has them: use Debian's linux-image-cloud-amd64"
	}
	return &Error{fmt.Sprintf("kernel %s cannot be used with the modules in %s: %v", k.Release, k.Modules, err), fix, err}
}

// ReservedMiB is memory that a kernel with modules gets on top: Debian's takes 107 MiB of 512 where
// Atoll's own takes less than the shims count on. It is a memory block, as all that is plugged.
const ReservedMiB = 128

// Entries is what an initramfs needs beside guest init for a kernel with modules in dir.
func Entries(dir string) ([]initramfs.Entry, error) {
	return modules.Entries(dir, modules.ForPods(), modules.ForContainers())
}

// Release is the release of a kernel image.
func Release(path string) (string, error) {
	image, err := read(path)
	if err != nil {
		return "", fmt.Errorf("reading the release of kernel %s: %w", path, err)
	}
	return image.release, nil
}

// needed are the options that guest init and the devices of a micro-VM cannot do without, built in
// or as modules.
func needed() []string {
	return strings.Fields(`
		64BIT SMP PCI PCI_MSI ACPI SERIAL_8250_CONSOLE BLK_DEV_INITRD BINFMT_ELF
		DEVTMPFS PROC_FS PROC_SYSCTL SYSFS TMPFS TMPFS_XATTR UNIX98_PTYS
		EPOLL EVENTFD FUTEX INOTIFY_USER SIGNALFD TIMERFD POSIX_MQUEUE
		NAMESPACES UTS_NS IPC_NS PID_NS NET_NS SECCOMP_FILTER
		CGROUPS CGROUP_SCHED CFS_BANDWIDTH CPUSETS MEMCG BLK_CGROUP CGROUP_PIDS CGROUP_BPF BPF_SYSCALL
		NET INET IPV6 UNIX PACKET
		VIRTIO_PCI VIRTIO_CONSOLE VIRTIO_BLK VIRTIO_NET SCSI_VIRTIO BLK_DEV_SD
		EROFS_FS EROFS_FS_XATTR OVERLAY_FS EXT4_FS QUOTA QFMT_V2
		HOTPLUG_CPU ACPI_HOTPLUG_CPU MEMORY_HOTPLUG ACPI_HOTPLUG_MEMORY`)
}

// missing lists what the options lack of what is needed.
func missing(options map[string]bool, elf bool) []string {
	list := needed()
	if elf {
		list = append(list, "PVH") // how QEMU starts an ELF kernel
	}
	var out []string
	for _, name := range list {
		if !options[name] {
			out = append(out, "CONFIG_"+name)
		}
	}
	return out
}

// parse reads the options that are built in or modules from a .config file.
func parse(config []byte) map[string]bool {
	options := make(map[string]bool)
	for line := range strings.Lines(string(config)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if option, ok := strings.CutPrefix(name, "CONFIG_"); ok && (value == "y" || value == "m") {
			options[option] = true
		}
	}
	return options
}
