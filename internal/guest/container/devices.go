package container

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/cgroup"
)

// DeviceFilter keeps containers from the guest's devices (the scratch disk holds the files of all
// of them) although they may have CAP_MKNOD: a cgroup device program that allows the usual devices
// and those named in the spec. A privileged container is not filtered: the guest is its pod's, and
// so is the harm. Loading a program is slow under emulation, so the usual one is
// loaded once, in the template.
type DeviceFilter struct{ usual int }

// deviceRule allows access to one device, or with negative numbers to all of a major or type.
type deviceRule struct {
	typ          uint32 // 1 block, 2 character
	major, minor int64
	access       uint32 // bits of access*
}

// From linux/bpf.h.
const (
	accessMknod = 1
	accessRead  = 2
	accessWrite = 4
	accessAll   = accessMknod | accessRead | accessWrite
	typeBlock   = 1
	typeChar    = 2

	bpfProgLoad       = 5
	bpfProgAttach     = 8
	bpfTypeCgroupDev  = 15
	bpfAttachCgroupDv = 6
)

func usualRules() []deviceRule {
	return []deviceRule{
		{typeChar, 1, 3, accessAll},    // null
		{typeChar, 1, 5, accessAll},    // zero
		{typeChar, 1, 7, accessAll},    // full
		{typeChar, 1, 8, accessAll},    // random
		{typeChar, 1, 9, accessAll},    // urandom
		{typeChar, 5, 0, accessAll},    // tty
		{typeChar, 5, 1, accessAll},    // console
		{typeChar, 5, 2, accessAll},    // ptmx
		{typeChar, 136, -1, accessAll}, // pts
	}
}

// NewDeviceFilter loads the usual program and attaches it to keep, see cgroup.Tree.
func NewDeviceFilter(keep *cgroup.Group) (*DeviceFilter, error) {
	fd, err := loadDevices(usualRules())
	if err != nil {
		return nil, err
	}
	f := &DeviceFilter{usual: fd}
	return f, f.attach(keep, nil, nil)
}

// attach puts the filter on a group. Rules of the spec that allow everything leave it out.
func (f *DeviceFilter) attach(group *cgroup.Group, r *specs.LinuxResources, linux *specs.Linux) error {
	fd := f.usual
	extra, all := extraRules(r, linux)
	if all {
		return nil
	}
	if len(extra) > 0 {
		own, err := loadDevices(append(usualRules(), extra...))
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(own) }()
		fd = own
	}
	dir, err := unix.Open(group.Dir(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("attaching device filter: %w", err)
	}
	defer func() { _ = unix.Close(dir) }()
	attr := struct{ target, prog, typ, flags uint32 }{uint32(dir), uint32(fd), bpfAttachCgroupDv, 0}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, bpfProgAttach, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno != 0 {
		return fmt.Errorf("attaching device filter: %w", errno)
	}
	return nil
}

// extraRules are the spec's allow rules beyond the usual, and its device nodes. Deny rules are not
// needed: nothing is allowed that is not named.
func extraRules(r *specs.LinuxResources, linux *specs.Linux) (extra []deviceRule, all bool) {
	if r != nil {
		for _, d := range r.Devices {
			if !d.Allow {
				continue
			}
			if d.Type == "" || d.Type == "a" {
				return nil, true
			}
			rule := deviceRule{typ: deviceType(d.Type), major: -1, minor: -1}
			if d.Major != nil {
				rule.major = *d.Major
			}
			if d.Minor != nil {
				rule.minor = *d.Minor
			}
			for _, c := range d.Access {
				rule.access |= map[rune]uint32{'m': accessMknod, 'r': accessRead, 'w': accessWrite}[c]
			}
			if !isUsual(rule) {
				extra = append(extra, rule)
			}
		}
	}
	if linux != nil {
		for _, d := range linux.Devices {
			rule := deviceRule{deviceType(d.Type), d.Major, d.Minor, accessAll}
			if !isUsual(rule) {
				extra = append(extra, rule)
			}
		}
	}
	return extra, false
}

// privileged reports whether a container may use all devices of the guest.
func privileged(linux *specs.Linux) bool {
	if linux == nil {
		return false
	}
	_, all := extraRules(linux.Resources, nil)
	return all
}

// guestDevices lists the nodes below dir, the guest's /dev, as nodes for a container's /dev: all but
// those a container has of its own.
func guestDevices(dir string) ([]specs.LinuxDevice, error) {
	var nodes []specs.LinuxDevice
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && name != dir {
			return nil // unplugged meanwhile
		}
		if err != nil {
			return err
		}
		inside, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		switch inside {
		case "pts", "shm", "mqueue":
			return fs.SkipDir
		case "console", "ptmx":
			return nil
		}
		if d.Type()&fs.ModeDevice == 0 {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		kind, mode := "b", fs.FileMode(st.Mode&0o777)
		if d.Type()&fs.ModeCharDevice != 0 {
			kind = "c"
		}
		nodes = append(nodes, specs.LinuxDevice{
			Path: filepath.Join("/dev", inside), Type: kind, FileMode: &mode, UID: &st.Uid, GID: &st.Gid,
			Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
		})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing devices of the guest: %w", err)
	}
	return nodes, nil
}

func deviceType(t string) uint32 {
	if t == "b" {
		return typeBlock
	}
	return typeChar
}

// isUsual reports whether a rule adds nothing: making any node is allowed as it is, using it is not.
func isUsual(r deviceRule) bool {
	if r.access&^accessMknod == 0 {
		return true
	}
	for _, u := range usualRules() {
		if u.typ == r.typ && u.major == r.major && (u.minor == r.minor || u.minor < 0) {
			return true
		}
	}
	return false
}

// insn is struct bpf_insn.
type insn struct {
	code uint8
	regs uint8 // dst | src<<4
	off  int16
	imm  int32
}

// deviceProgram compiles rules; the context is struct bpf_cgroup_dev_ctx, r1.
func deviceProgram(rules []deviceRule) []insn {
	const (
		ldxW   = 0x61 // dst = *(u32 *)(src + off)
		movX   = 0xbf
		movK   = 0xb7
		andK   = 0x57
		rshK   = 0x77
		jneK   = 0x55
		exit   = 0x95
		access = 3
		typ    = 2
		major  = 4
		minor  = 5
	)
	code := []insn{
		{ldxW, typ | 1<<4, 0, 0},
		{movX, access | typ<<4, 0, 0},
		{andK, typ, 0, 0xffff},
		{rshK, access, 0, 16},
		{ldxW, major | 1<<4, 4, 0},
		{ldxW, minor | 1<<4, 8, 0},
		{jneK, access, 2, accessMknod}, // making a node is no access
		{movK, 0, 0, 1},
		{exit, 0, 0, 0},
	}
	for _, r := range rules {
		var tests []insn
		tests = append(tests, insn{jneK, typ, 0, int32(r.typ)})
		if r.major >= 0 {
			tests = append(tests, insn{jneK, major, 0, int32(r.major)})
		}
		if r.minor >= 0 {
			tests = append(tests, insn{jneK, minor, 0, int32(r.minor)})
		}
		if r.access != accessAll {
			// access & ^allowed must be 0; r0 is free for it.
			tests = append(tests, insn{movX, 0 | access<<4, 0, 0}, insn{andK, 0, 0, int32(^r.access & accessAll)},
				insn{jneK, 0, 0, 0})
		}
		end := len(tests) + 2
		for i := range tests {
			if tests[i].code == jneK {
				tests[i].off = int16(end - i - 1)
			}
		}
		code = append(append(code, tests...), insn{movK, 0, 0, 1}, insn{exit, 0, 0, 0})
	}
	return append(code, insn{movK, 0, 0, 0}, insn{exit, 0, 0, 0})
}

func loadDevices(rules []deviceRule) (int, error) {
	code := deviceProgram(rules)
	license := []byte("Apache-2.0\x00")
	attr := struct {
		progType, count        uint32
		insns, license         uint64
		logLevel, logSize      uint32
		logBuf                 uint64
		kernVersion, progFlags uint32
		name                   [16]byte
		ifindex, expected      uint32
	}{
		progType: bpfTypeCgroupDev, count: uint32(len(code)),
		insns:   uint64(uintptr(unsafe.Pointer(&code[0]))),
		license: uint64(uintptr(unsafe.Pointer(&license[0]))), expected: bpfAttachCgroupDv,
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, bpfProgLoad, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(code)
	runtime.KeepAlive(license)
	if errno != 0 {
		return -1, fmt.Errorf("loading device filter: %w", errno)
	}
	return int(fd), nil
}
