// Package seccomp assembles the seccomp section of an OCI runtime spec into the filter program that
// guest init installs.
//
// It is pure Go and pure computation: it runs on the host, so that the guest needs no libseccomp and
// the profile's parser stays out of the guest. It is not a general BPF compiler and installs nothing.
// internal/shim/task calls Compile once per container and exec.
//
// What a profile means follows runc 1.1 and libseccomp 2.5: rules of one syscall are alternatives,
// the conditions of a rule must all hold (unless two of them look at the same argument: then each is
// a rule of its own), a rule without conditions overrides those with, unknown syscall names are
// ignored, architectures that cannot run on an amd64 kernel are ignored, a call from an architecture
// that the profile does not list kills the thread, and where the default is to refuse, syscalls newer
// than the newest one that the profile names answer ENOSYS, so that a C library falls back.
//
// The program is a binary search over syscall numbers, not a list: the kernel of a micro-VM
// interprets it on every syscall.
package seccomp

import (
	"encoding/binary"
	"errors"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ErrProfile is wrapped by errors that say that the profile is wrong, not the program.
var ErrProfile = errors.New("unusable seccomp profile")

// maxInstructions is the kernel's limit, BPF_MAXINSNS.
const maxInstructions = 4096

// Limits of what is read from a profile; a real one has some 500 names and 30 rules.
const (
	maxRules      = 1024
	maxNames      = 16384
	maxConditions = 4096
)

// Return values of a filter, from linux/seccomp.h.
const (
	retKillProcess = 0x80000000
	retKillThread  = 0x00000000
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retTrace       = 0x7ff00000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000

	retDataMask = 0xffff
)

// Compile returns the filter as an array of struct sock_filter in the byte order of amd64. A nil
// profile gives no program.
func Compile(profile *specs.LinuxSeccomp) ([]byte, error) {
	if profile == nil {
		return nil, nil
	}
	filters, err := archFilters(profile)
	if err != nil {
		return nil, err
	}
	a := &assembler{}
	emit(a, filters)
	prog, err := a.assemble()
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, len(prog)*8)
	for _, i := range prog {
		out = binary.LittleEndian.AppendUint16(out, i.Code)
		out = append(out, i.Jt, i.Jf)
		out = binary.LittleEndian.AppendUint32(out, i.K)
	}
	return out, nil
}

// Flags returns the flags for seccomp(2) that the profile asks for. Synchronising threads has no
// meaning for a process that has one.
func Flags(profile *specs.LinuxSeccomp) (uint32, error) {
	var flags uint32
	if profile == nil {
		return 0, nil
	}
	for _, f := range profile.Flags {
		switch f {
		case specs.LinuxSeccompFlagLog:
			flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case "SECCOMP_FILTER_FLAG_TSYNC":
		default:
			return 0, fmt.Errorf("%w: flag %s", ErrProfile, f)
		}
	}
	return flags, nil
}

// action turns an OCI action into a filter's return value. runc's defaults apply: ERRNO and TRACE
// without a value mean EPERM.
func action(a specs.LinuxSeccompAction, errnoRet *uint) (uint32, error) {
	data := uint32(unix.EPERM)
	if errnoRet != nil {
		if *errnoRet > retDataMask {
			return 0, fmt.Errorf("%w: errnoRet %d is out of range", ErrProfile, *errnoRet)
		}
		data = uint32(*errnoRet)
	}
	switch a {
	case specs.ActKill, specs.ActKillThread:
		return retKillThread, nil
	case specs.ActKillProcess:
		return retKillProcess, nil
	case specs.ActTrap:
		return retTrap, nil
	case specs.ActErrno:
		return retErrno | data, nil
	case specs.ActTrace:
		return retTrace | data, nil
	case specs.ActLog:
		return retLog, nil
	case specs.ActAllow:
		return retAllow, nil
	case specs.ActNotify:
		return 0, fmt.Errorf("%w: %s needs a listener on the host and is not supported in a micro-VM", ErrProfile, a)
	}
	return 0, fmt.Errorf("%w: unknown action %q", ErrProfile, a)
}

// refuses reports whether a return value keeps the syscall from running.
func refuses(ret uint32) bool {
	return ret != retAllow && ret != retLog && ret&^retDataMask != retTrace
}
