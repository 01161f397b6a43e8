// Package vmtest starts micro-VMs in tests: it builds the test init, finds the kernel, and talks to
// the machines. Only tests import it. Its users need root, QEMU and a pod kernel, which is at
// build/vmlinux or where the environment variable ATOLL_TEST_KERNEL says; without them a test fails.
package vmtest

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/initramfs"
	"atoll.dev/atoll/internal/vm/initramfs/modules"
)

// KernelEnv is the environment variable with the path of the kernel to test with.
const KernelEnv = "ATOLL_TEST_KERNEL"

// ModulesEnv is the environment variable with the module directory of that kernel, needed when it is
// a distribution's.
const ModulesEnv = "ATOLL_TEST_MODULES"

// UID is the first of the user ids that test machines run as.
const UID = 790000

// Kernel is the path of the kernel to test with: of the environment, or what make has built.
func Kernel(t testing.TB) string {
	t.Helper()
	k := os.Getenv(KernelEnv)
	if k == "" {
		mod, err := exec.Command("go", "env", "GOMOD").Output()
		if err != nil {
			t.Fatalf("finding the repository: %v", err)
		}
		k = filepath.Join(filepath.Dir(strings.TrimSpace(string(mod))), "build", "vmlinux")
	}
	if _, err := os.Stat(k); err != nil {
		t.Fatalf("no kernel to test with: %v; build it with make build/vmlinux, or set %s", err, KernelEnv)
	}
	return k
}

// MemoryMiB is how much memory that kernel wants.
func MemoryMiB() int {
	if os.Getenv(ModulesEnv) != "" {
		return 512
	}
	return vm.DefaultMemoryMiB
}

// Initramfs builds the test init and returns an initramfs of it.
func Initramfs(t testing.TB) []initramfs.Entry {
	t.Helper()
	out := filepath.Join(t.TempDir(), "testinit")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", out, "atoll.dev/atoll/internal/vm/vmtest/testinit")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the test init: %v\n%s", err, msg)
	}
	entries := []initramfs.Entry{
		{Path: "/init", Mode: 0o755, File: out},
		{Path: "/dev/console", Mode: 0o600, Device: &initramfs.Device{Major: 5, Minor: 1}},
	}
	if dir := os.Getenv(ModulesEnv); dir != "" {
		more, err := modules.Entries(dir, modules.ForPods(), nil)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, more...)
	}
	return entries
}

// Guest talks to the test init of one machine.
type Guest struct {
	conn net.Conn
	in   *bufio.Reader
}

// NewGuest talks to m, which must run.
func NewGuest(m *vm.Machine) *Guest {
	return &Guest{conn: m.Channel(), in: bufio.NewReaderSize(m.Channel(), 1<<16)}
}

// Send sends a command without waiting for the answer.
func (g *Guest) Send(t testing.TB, format string, args ...any) {
	t.Helper()
	if _, err := fmt.Fprintf(g.conn, format+"\n", args...); err != nil {
		t.Fatal(err)
	}
}

// patience is far above what a guest needs under emulation on a busy host.
const patience = 5 * time.Minute

// Answer waits for one answer. Unlike Receive it may be called by any goroutine.
func (g *Guest) Answer() (string, error) {
	_ = g.conn.SetReadDeadline(time.Now().Add(patience))
	line, err := g.in.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("reading from the guest: %w", err)
	}
	return strings.TrimSuffix(line, "\n"), nil
}

// Receive waits for one answer.
func (g *Guest) Receive(t testing.TB) string {
	t.Helper()
	answer, err := g.Answer()
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// Ask sends a command and returns the answer.
func (g *Guest) Ask(t testing.TB, format string, args ...any) string {
	t.Helper()
	g.Send(t, format, args...)
	return g.Receive(t)
}

// Want sends a command and fails unless the answer is want.
func (g *Guest) Want(t testing.TB, want, format string, args ...any) {
	t.Helper()
	if got := g.Ask(t, format, args...); got != want {
		t.Fatalf("%s: guest answered %q, want %q", fmt.Sprintf(format, args...), got, want)
	}
}

// Until sends a command until the answer is good: what is added to a machine takes its guest a moment to find.
func (g *Guest) Until(t testing.TB, good func(answer string) bool, command string) {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		got := g.Ask(t, "%s", command)
		if good(got) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: guest answers %q after %s", command, got, patience)
		}
	}
}

// Clone clones and closes the machine at the end of the test.
func Clone(t testing.TB, tmpl *vm.Template, cfg vm.CloneConfig) *vm.Machine {
	t.Helper()
	if cfg.UID == 0 {
		cfg.UID, cfg.GID = UID, UID
	}
	m, err := tmpl.Clone(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}
