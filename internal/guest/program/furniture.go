package program

import (
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Furniture are the file systems that nearly every container has, in nearly every case with the same
// options. A helper that waits for a container makes them ahead of time, detached, with what belongs into
// /dev; the container's program then only moves them into place.

// furnishStep is the step under which all operations of Furnish are reported.
const furnishStep = 1<<16 - 1

// Registers from firstFurniture on hold the detached mounts; other programs use those below.
const firstFurniture = 240

// piece is one file system of the furniture; its register is firstFurniture and its place in the list.
type piece struct {
	dest    string
	fsType  string // in a spec
	mounted string // what the kernel calls it; a spec may, too
	options []string
}

// The places in the list of furniture that matter.
const pieceDev = 1

func furniture() []piece {
	return []piece{
		{"/proc", "proc", "proc", []string{"nosuid", "noexec", "nodev"}},
		{"/dev", "tmpfs", "tmpfs", []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{"/dev/pts", "devpts", "devpts", []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{"/dev/mqueue", "mqueue", "mqueue", []string{"nosuid", "noexec", "nodev"}},
		{"/sys", "sysfs", "sysfs", []string{"nosuid", "noexec", "nodev", "ro"}},
		{"/sys/fs/cgroup", "cgroup", "cgroup2", []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
	}
}

// Furnish makes the program that a waiting helper runs first. Another one, of a container that is Furnished,
// follows over the same pipe.
func Furnish() (*Program, error) {
	b := newBuilder()
	b.do("making the usual mounts")
	b.call(unix.SYS_UMASK, imm(0))
	b.call(unix.SYS_UNSHARE, imm(unix.CLONE_NEWCGROUP)) // the cgroup mount shows the cgroup the helper is in
	for i, p := range furniture() {
		o, err := parseOptions(p.options)
		if err != nil {
			return nil, err
		}
		fs := b.callReg(unix.SYS_FSOPEN, b.str(p.mounted), imm(unix.FSOPEN_CLOEXEC))
		b.call(unix.SYS_FSCONFIG, reg(fs), imm(unix.FSCONFIG_SET_STRING), b.str("source"), b.str(p.mounted), imm(0))
		for _, option := range o.data {
			if key, value, ok := strings.Cut(option, "="); ok {
				b.call(unix.SYS_FSCONFIG, reg(fs), imm(unix.FSCONFIG_SET_STRING), b.str(key), b.str(value), imm(0))
			} else {
				b.call(unix.SYS_FSCONFIG, reg(fs), imm(unix.FSCONFIG_SET_FLAG), b.str(key), imm(0), imm(0))
			}
		}
		b.call(unix.SYS_FSCONFIG, reg(fs), imm(unix.FSCONFIG_CMD_CREATE), imm(0), imm(0), imm(0))
		b.call(unix.SYS_FSMOUNT, reg(fs), imm(unix.FSMOUNT_CLOEXEC), imm(o.attrs)).save = firstFurniture + uint8(i)
		b.call(unix.SYS_CLOSE, reg(fs))
	}
	dev := reg(firstFurniture + pieceDev)
	for _, dir := range []string{"pts", "mqueue", "shm"} {
		b.call(unix.SYS_MKDIRAT, dev, b.str(dir), imm(0o755))
	}
	for _, n := range usualNodes() {
		b.call(unix.SYS_MKNODAT, dev, b.str(strings.TrimPrefix(n.name, "/dev/")), imm(n.mode), imm(n.dev))
	}
	for _, l := range usualLinks() {
		b.call(unix.SYS_SYMLINKAT, b.str(l[0]), dev, b.str(strings.TrimPrefix(l[1], "/dev/")))
	}
	b.call(opNext)
	b.reportAs = furnishStep // it is the next program that gets the report
	return b.build()
}

// furnished returns the register of each mount that is a piece of the furniture, by mount index; nil when the
// mounts are not the usual ones or others are in their way.
func furnished(mounts []specs.Mount) map[int]uint8 {
	pieces := furniture()
	regs := make(map[int]uint8, len(pieces))
	for i, m := range mounts {
		at := slices.IndexFunc(pieces, func(p piece) bool { return p.dest == m.Destination })
		switch {
		case at >= 0 && pieces[at].is(m):
			regs[i] = firstFurniture + uint8(at)
			pieces[at].dest = "" // a second one is in the way
		case at < 0 && len(regs) == len(pieces):
			return regs // what comes later comes on top, as ever
		case at >= 0 || inTheWay(m.Destination):
			return nil
		}
	}
	if len(regs) < len(pieces) {
		return nil
	}
	return regs
}

func (p piece) is(m specs.Mount) bool {
	if m.Type != p.fsType && m.Type != p.mounted || len(m.Options) != len(p.options) {
		return false
	}
	for _, o := range m.Options {
		if !slices.Contains(p.options, o) {
			return false
		}
	}
	return true
}

// inTheWay reports whether a mount between pieces of the furniture could hide one, or be hidden. The only
// usual one is /dev/shm, which has its directory in the furniture's /dev.
func inTheWay(dest string) bool {
	if dest == "/dev/shm" {
		return false
	}
	for _, top := range []string{"/proc", "/dev", "/sys"} {
		if dest == "/" || strings.HasPrefix(dest, top) || strings.Contains(dest, "..") {
			return true
		}
	}
	return false
}
