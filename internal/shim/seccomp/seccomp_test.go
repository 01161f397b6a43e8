package seccomp

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// run interprets a program as the kernel does.
func run(t *testing.T, prog []byte, audit, number uint32, args [6]uint64) uint32 {
	t.Helper()
	data := make([]byte, 64)
	binary.LittleEndian.PutUint32(data[0:], number)
	binary.LittleEndian.PutUint32(data[4:], audit)
	for i, a := range args {
		binary.LittleEndian.PutUint64(data[16+8*i:], a)
	}
	var acc uint32
	for pc := 0; pc < len(prog)/8; pc++ {
		in := prog[pc*8:]
		code, jt, jf, k := binary.LittleEndian.Uint16(in), in[2], in[3], binary.LittleEndian.Uint32(in[4:])
		jump := func(cond bool) {
			if cond {
				pc += int(jt)
			} else {
				pc += int(jf)
			}
		}
		switch code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			acc = binary.LittleEndian.Uint32(data[k:])
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			acc &= k
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(k)
		case opJEQ:
			jump(acc == k)
		case opJGT:
			jump(acc > k)
		case opJGE:
			jump(acc >= k)
		case unix.BPF_RET | unix.BPF_K:
			return k
		default:
			t.Fatalf("instruction %d has unknown code %#x", pc, code)
		}
	}
	t.Fatal("program runs off its end")
	return 0
}

// reference evaluates a filter without a program.
func reference(f filter, number uint32, args [6]uint64) uint32 {
	if f.enosys && number > f.newest {
		return retErrno | uint32(unix.ENOSYS)
	}
	r := f.calls[number]
	if r == nil {
		return f.def
	}
	for _, alt := range r.alternatives {
		if !slices.ContainsFunc(alt.conditions, func(c condition) bool { return !holds(c, f.wide, args[c.index]) }) {
			return alt.ret
		}
	}
	return r.fallback
}

func holds(c condition, wide bool, a uint64) bool {
	v, v2 := c.value, c.value2
	if !wide {
		a, v, v2 = uint64(uint32(a)), uint64(uint32(v)), uint64(uint32(v2))
	}
	switch c.op {
	case specs.OpEqualTo:
		return a == v
	case specs.OpNotEqual:
		return a != v
	case specs.OpGreaterThan:
		return a > v
	case specs.OpGreaterEqual:
		return a >= v
	case specs.OpLessThan:
		return a < v
	case specs.OpLessEqual:
		return a <= v
	default:
		return a&v == v2
	}
}

// defaultProfile is containerd's RuntimeDefault for a container with the default capabilities.
func defaultProfile() *specs.LinuxSeccomp {
	caps := []string{"CAP_CHOWN", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_KILL"}
	return seccomp.DefaultProfile(&specs.Spec{
		Linux:   &specs.Linux{},
		Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}},
	})
}

// mixed uses everything a profile can say.
func mixed() *specs.LinuxSeccomp {
	seven := uint(7)
	return &specs.LinuxSeccomp{
		DefaultAction:   specs.ActErrno,
		DefaultErrnoRet: &seven,
		Architectures:   []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "write", "no_such_call"}, Action: specs.ActAllow},
			{Names: []string{"lseek"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: 5, Op: specs.OpGreaterThan}, {Index: 1, Value: 1 << 40, Op: specs.OpLessEqual},
			}},
			{Names: []string{"lseek"}, Action: specs.ActTrace, ErrnoRet: &seven, Args: []specs.LinuxSeccompArg{
				{Index: 2, Value: 0xffffffff00000001, Op: specs.OpEqualTo},
			}},
			{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: 0, Op: specs.OpEqualTo}, {Index: 0, Value: 8, Op: specs.OpEqualTo},
			}},
			{Names: []string{"clone"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: 0x7e020000, ValueTwo: 0, Op: specs.OpMaskedEqual},
			}},
			{Names: []string{"mmap", "mmap2"}, Action: specs.ActLog, Args: []specs.LinuxSeccompArg{
				{Index: 3, Value: 1 << 33, Op: specs.OpGreaterEqual},
				{Index: 4, Value: 9, Op: specs.OpLessThan},
				{Index: 5, Value: 3 << 32, Op: specs.OpNotEqual},
			}},
			{Names: []string{"mprotect"}, Action: specs.ActTrap, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 1, Op: specs.OpEqualTo}}},
			{Names: []string{"mprotect"}, Action: specs.ActKillProcess},
			{Names: []string{"ptrace"}, Action: specs.ActKillThread},
			{Names: []string{"clone3"}, Action: specs.ActErrno, ErrnoRet: new(uint(unix.ENOSYS))},
		},
	}
}

func TestProgramMatchesReference(t *testing.T) {
	allowAll := &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"chmod", "fchmodat"}, Action: specs.ActErrno}},
	}
	for name, p := range map[string]*specs.LinuxSeccomp{"default": defaultProfile(), "mixed": mixed(), "allow": allowAll} {
		t.Run(name, func(t *testing.T) {
			prog, err := Compile(p)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d instructions", len(prog)/8)
			filters, err := archFilters(p)
			if err != nil {
				t.Fatal(err)
			}
			rnd := rand.New(rand.NewPCG(1, 2))
			interesting := []uint64{0, 1, 2, 5, 6, 8, 9, 40, 0x20000, 0x7e020000, 1 << 32, 1 << 33, 1 << 40, 1<<40 + 1, 3 << 32, 0xffffffff00000001, 1<<64 - 1}
			for _, f := range filters {
				base := uint32(0)
				if f.name == specs.ArchX32 {
					base = x32Bit
				}
				for n := range uint32(600) {
					for range 40 {
						var args [6]uint64
						for i := range args {
							args[i] = interesting[rnd.IntN(len(interesting))]
						}
						want := reference(f, base+n, args)
						if got := run(t, prog, f.audit, base+n, args); got != want {
							t.Fatalf("%s syscall %d %v: got %#x, want %#x", f.name, n, args, got, want)
						}
					}
				}
			}
		})
	}
}

func TestArchitectures(t *testing.T) {
	prog, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		audit, number, want uint32
	}{
		{unix.AUDIT_ARCH_X86_64, 0, retAllow},
		{unix.AUDIT_ARCH_X86_64, x32Bit, retKillThread},
		{unix.AUDIT_ARCH_I386, 3, retKillThread},
		{unix.AUDIT_ARCH_AARCH64, 3, retKillThread},
	} {
		if got := run(t, prog, c.audit, c.number, [6]uint64{}); got != c.want {
			t.Errorf("arch %#x syscall %#x: got %#x, want %#x", c.audit, c.number, got, c.want)
		}
	}
}

func TestBadProfiles(t *testing.T) {
	many := make([]specs.LinuxSyscall, maxRules+1)
	var deep []specs.LinuxSeccompArg
	for i := range 1000 {
		deep = append(deep, specs.LinuxSeccompArg{Index: 0, Value: uint64(i), Op: specs.OpEqualTo})
	}
	for name, p := range map[string]*specs.LinuxSeccomp{
		"notify":      {DefaultAction: specs.ActNotify},
		"action":      {DefaultAction: "SCMP_ACT_DANCE"},
		"errno":       {DefaultAction: specs.ActErrno, DefaultErrnoRet: new(uint(70000))},
		"index":       {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}}}},
		"operator":    {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "SCMP_CMP_WEIRD"}}}}},
		"rules":       {DefaultAction: specs.ActAllow, Syscalls: many},
		"too long":    {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read", "write"}, Action: specs.ActErrno, Args: deep}}},
		"rule action": {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActNotify}}},
	} {
		if _, err := Compile(p); !errors.Is(err, ErrProfile) {
			t.Errorf("%s: got %v, want ErrProfile", name, err)
		}
	}
	if prog, err := Compile(nil); prog != nil || err != nil {
		t.Errorf("no profile: got %v, %v", prog, err)
	}
}

func TestFlags(t *testing.T) {
	got, err := Flags(&specs.LinuxSeccomp{Flags: []specs.LinuxSeccompFlag{
		specs.LinuxSeccompFlagLog, "SECCOMP_FILTER_FLAG_TSYNC", specs.LinuxSeccompFlagSpecAllow,
	}})
	if err != nil || got != 6 {
		t.Errorf("got %d, %v", got, err)
	}
	if _, err := Flags(&specs.LinuxSeccomp{Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}}); !errors.Is(err, ErrProfile) {
		t.Errorf("unknown flag: %v", err)
	}
	if got, err := Flags(nil); got != 0 || err != nil {
		t.Errorf("no profile: %d, %v", got, err)
	}
}

func FuzzCompile(f *testing.F) {
	for _, p := range []*specs.LinuxSeccomp{defaultProfile(), mixed()} {
		b, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p specs.LinuxSeccomp
		if json.Unmarshal(b, &p) != nil {
			return
		}
		prog, err := Compile(&p)
		if err != nil {
			return
		}
		if len(prog)/8 > maxInstructions {
			t.Fatalf("%d instructions", len(prog)/8)
		}
		run(t, prog, unix.AUDIT_ARCH_X86_64, 1, [6]uint64{1, 2, 3, 4, 5, 6})
		run(t, prog, unix.AUDIT_ARCH_I386, 400, [6]uint64{})
	})
}

func BenchmarkCompileDefault(b *testing.B) {
	p := defaultProfile()
	for b.Loop() {
		if _, err := Compile(p); err != nil {
			b.Fatal(err)
		}
	}
}
