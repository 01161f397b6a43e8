//go:build integration

package vm_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/vmtest"
)

// config is the machine that most tests use.
func config(t testing.TB) vm.Config {
	t.Helper()
	return vm.Config{
		Kernel: vmtest.Kernel(t), Initramfs: vmtest.Initramfs(t),
		MemoryMiB: vmtest.MemoryMiB(), MaxMemoryMiB: 2048, MaxCPUs: 4,
		ScratchBytes: 1 << 30,
		UID:          vmtest.UID, GID: vmtest.UID,
	}
}

// shared is the template of all tests that do not need one of their own; it is never closed.
var shared struct {
	sync.Mutex
	template *vm.Template
}

func build(t testing.TB) *vm.Template {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.template == nil {
		tmpl, err := vm.BuildTemplate(context.Background(), config(t))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("template: %+v", tmpl.Meta())
		shared.template = tmpl
	}
	return shared.template
}

func status(t *testing.T, pid int) map[string]string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	for line := range strings.Lines(string(data)) {
		k, v, _ := strings.Cut(line, ":")
		out[k] = strings.Join(strings.Fields(v), " ")
	}
	return out
}

func hash(t *testing.T, f *os.File) [32]byte {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<62)); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

func TestTwentyClones(t *testing.T) {
	tmpl := build(t)
	before := hash(t, tmpl.Files()[0])
	var wg sync.WaitGroup
	for i := range 20 {
		uid := uint32(vmtest.UID + 1 + i)
		wg.Go(func() {
			m, err := tmpl.Clone(context.Background(), vm.CloneConfig{UID: uid, GID: uid})
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { _ = m.Close() })
			conn := m.Channel()
			_ = conn.SetDeadline(time.Now().Add(5 * time.Minute))
			want := fmt.Sprintf("hello %d\n", i)
			buf := make([]byte, len(want))
			if _, err = fmt.Fprint(conn, "echo "+want); err == nil {
				_, err = io.ReadFull(conn, buf)
			}
			if err != nil || string(buf) != want {
				t.Errorf("clone %d: %q, %v", i, buf, err)
			}
		})
	}
	wg.Wait()
	if hash(t, tmpl.Files()[0]) != before {
		t.Error("running clones have changed the template's memory")
	}
}

func TestGuestSeesItsClock(t *testing.T) {
	g := vmtest.NewGuest(vmtest.Clone(t, build(t), vm.CloneConfig{}))
	if c := g.Ask(t, "clocksource"); !strings.HasPrefix(c, "tsc") {
		t.Errorf("clock source is %s", c)
	}
	if c := g.Ask(t, "cmdline"); !strings.Contains(c, "tsc_early_khz=") {
		t.Errorf("command line is %s", c)
	}
	if log := g.Ask(t, "dmesg"); !strings.Contains(log, "Calibrating delay loop (skipped)") {
		t.Errorf("the guest has measured a delay loop: %s", log)
	}
}

func TestConfinement(t *testing.T) {
	m := vmtest.Clone(t, build(t), vm.CloneConfig{UID: vmtest.UID + 5, GID: vmtest.UID + 6})
	id := func(n int) string { return strings.TrimSpace(strings.Repeat(fmt.Sprintf("%d ", n), 4)) }
	want := map[string]string{
		"Uid": id(vmtest.UID + 5), "Gid": id(vmtest.UID + 6), "Groups": "",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
		"CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	}
	got := status(t, m.PID())
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %q, want %q", k, got[k], v)
		}
	}
	argv, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", m.PID()))
	if err != nil || !strings.Contains(string(argv), "vmx=off,svm=off") {
		t.Errorf("nested virtualisation is not off: %q, %v", argv, err)
	}
}

// TestInheritedFiles lists all that a QEMU has open: nothing of the host but what it was given.
func TestInheritedFiles(t *testing.T) {
	secret, err := os.CreateTemp(t.TempDir(), "secret")
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	m := vmtest.Clone(t, build(t), vm.CloneConfig{})
	vmtest.NewGuest(m).Want(t, "x", "echo x")
	dir := fmt.Sprintf("/proc/%d/fd", m.PID())
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	allowed := []string{
		"socket:", "pipe:", "anon_inode:", "/memfd:atoll-", "/dev/null", "/dev/net/tun",
	}
	for _, e := range entries {
		link, err := os.Readlink(dir + "/" + e.Name())
		if err != nil {
			continue
		}
		ok := false
		for _, a := range allowed {
			ok = ok || strings.HasPrefix(link, a)
		}
		if !ok {
			t.Errorf("qemu has %s open as %s", link, e.Name())
		}
	}
}

func TestTemplateIsSealed(t *testing.T) {
	tmpl := build(t)
	for _, f := range tmpl.Files() {
		if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
			t.Errorf("writing to %s: %v", f.Name(), err)
		}
		if err := f.Truncate(0); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncating %s: %v", f.Name(), err)
		}
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); !errors.Is(err, unix.EPERM) {
			t.Errorf("punching a hole in %s: %v", f.Name(), err)
		}
		_, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("mapping %s writable: %v", f.Name(), err)
		}
	}
}

func TestClonesLeakNoFiles(t *testing.T) {
	tmpl := build(t)
	count := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	cycle := func() {
		m, err := tmpl.Clone(context.Background(), vm.CloneConfig{UID: vmtest.UID, GID: vmtest.UID})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cycle()
	before := count()
	for range 10 {
		cycle()
	}
	if after := count(); after != before {
		t.Errorf("%d files open before, %d after", before, after)
	}
}

const childEnv = "ATOLL_TEST_CLONE_CHILD"

// TestMain also is the process that TestParentDeath kills.
func TestMain(m *testing.M) {
	if meta := os.Getenv(childEnv); meta != "" {
		if err := child(meta); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// child clones from inherited files, says the process id of QEMU and waits to be killed.
func child(text string) error {
	var meta vm.Meta
	if err := json.Unmarshal([]byte(text), &meta); err != nil {
		return err
	}
	tmpl, err := vm.OpenTemplate(meta, []*os.File{os.NewFile(3, "ram"), os.NewFile(4, "state")})
	if err != nil {
		return err
	}
	m, err := tmpl.Clone(context.Background(), vm.CloneConfig{UID: vmtest.UID, GID: vmtest.UID})
	if err != nil {
		return err
	}
	fmt.Println(m.PID())
	select {}
}

func TestParentDeath(t *testing.T) {
	tmpl := build(t)
	meta, err := json.Marshal(tmpl.Meta())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(meta))
	cmd.ExtraFiles = tmpl.Files()
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, scanErr := fmt.Fscan(out, &pid)
	// A parent that lives for a while, so that idle threads of its would be gone.
	<-time.After(2 * time.Second)
	pidfd, pidfdErr := unix.PidfdOpen(pid, 0)
	killErr := cmd.Process.Kill()
	_ = cmd.Wait()
	if err := errors.Join(scanErr, pidfdErr, killErr); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := 0, error(unix.EINTR)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Poll(fds, 60000)
	}
	if n != 1 || err != nil {
		t.Fatalf("qemu %d lives on after its parent: %v", pid, err)
	}
}
