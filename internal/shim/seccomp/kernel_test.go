package seccomp

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// childEnv makes the test binary install a filter on one of its threads and try syscalls.
const childEnv = "ATOLL_SECCOMP_TEST_CHILD"

// probe is one syscall that the child makes under the filter.
type probe struct {
	name string
	nr   uintptr
	args [3]uintptr
	want unix.Errno
}

func probes() []probe {
	return []probe{
		{"getppid is allowed", unix.SYS_GETPPID, [3]uintptr{}, 0},
		{"sethostname is refused by default", unix.SYS_SETHOSTNAME, [3]uintptr{}, unix.EPERM},
		{"uname has its own errno", unix.SYS_UNAME, [3]uintptr{}, unix.EDOM},
		{"personality query is allowed", unix.SYS_PERSONALITY, [3]uintptr{0xffffffff}, 0},
		{"personality change is refused", unix.SYS_PERSONALITY, [3]uintptr{0x0040000}, unix.EPERM},
		{"dup above 100 is allowed and fails by itself", unix.SYS_DUP, [3]uintptr{101}, unix.EBADF},
		{"dup of 100 is refused", unix.SYS_DUP, [3]uintptr{100}, unix.EPERM},
		{"dup of a number that is only big in its high half counts as above", unix.SYS_DUP, [3]uintptr{1 << 40}, 0},
		{"setns with a masked flag is refused", unix.SYS_SETNS, [3]uintptr{0, unix.CLONE_NEWNET | 1}, unix.EPERM},
		{"setns without it is allowed and fails by itself", unix.SYS_SETNS, [3]uintptr{^uintptr(0), unix.CLONE_NEWUTS}, unix.EBADF},
		{"a syscall newer than the profile does not exist", 468, [3]uintptr{}, unix.ENOSYS},
	}
}

func kernelProfile() *specs.LinuxSeccomp {
	p := defaultProfile()
	p.Syscalls = append([]specs.LinuxSyscall{
		{Names: []string{"uname"}, Action: specs.ActErrno, ErrnoRet: new(uint(unix.EDOM))},
		{Names: []string{"setns"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
			{Index: 1, Value: unix.CLONE_NEWNET, ValueTwo: 0, Op: specs.OpMaskedEqual},
		}},
		{Names: []string{"dup"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 100, Op: specs.OpGreaterThan}}},
	}, p.Syscalls...)
	for i := range p.Syscalls[3:] {
		s := &p.Syscalls[3+i]
		kept := make([]string, 0, len(s.Names))
		for _, n := range s.Names {
			if n != "uname" && n != "dup" && n != "setns" {
				kept = append(kept, n)
			}
		}
		s.Names = kept
	}
	return p
}

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(child())
	}
	os.Exit(m.Run())
}

// child installs the filter on this thread only: no_new_privs and filters belong to threads.
func child() int {
	prog, err := Compile(kernelProfile())
	if err != nil {
		fmt.Println("compiling:", err)
		return 1
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		fmt.Println("no_new_privs:", err)
		return 1
	}
	fprog := unix.SockFprog{Len: uint16(len(prog) / 8), Filter: (*unix.SockFilter)(unsafe.Pointer(&prog[0]))}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, 1, 0, uintptr(unsafe.Pointer(&fprog))); errno != 0 {
		fmt.Println("installing:", errno)
		return 1
	}
	for _, p := range probes() {
		_, _, errno := unix.RawSyscall(p.nr, p.args[0], p.args[1], p.args[2])
		if errno != p.want {
			fmt.Printf("%s: got %d, want %d\n", p.name, errno, p.want)
			return 1
		}
	}
	fmt.Println("all probes passed")
	return 0
}

// TestKernel runs a filter in a real kernel, in a child process.
func TestKernel(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "all probes passed") {
		t.Fatalf("child: %v\n%s", err, out)
	}
}
