//go:build integration

package hardware_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/linux/tap"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/hardware"
	"atoll.dev/atoll/internal/vm/monitor"
	"atoll.dev/atoll/internal/vm/vmtest"
)

// bootTimeout is far above what a guest needs under emulation on a busy host.
const bootTimeout = 5 * time.Minute

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tiny is the disk image that guests are booted from.
func tiny(t testing.TB) string {
	t.Helper()
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	must(t, err)
	name := filepath.Join(filepath.Dir(strings.TrimSpace(string(mod))), "build", "vm", "tiny.qcow2")
	if _, err := os.Stat(name); err != nil {
		t.Fatalf("no guest to test with: %v; build it with make images", err)
	}
	return name
}

func open(t testing.TB, name string, flag int) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, flag, 0)
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// qcow2 makes an empty image, as large as what is below it.
func qcow2(t testing.TB, backing, size string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.qcow2")
	args := []string{"create", "-q", "-f", "qcow2"}
	if backing != "" {
		args = append(args, "-b", backing, "-F", "qcow2")
	}
	args = append(args, name)
	if size != "" {
		args = append(args, size)
	}
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	return name
}

// chain is a volume of qcow2 files, lowest first.
func chain(t testing.TB, readOnly bool, names ...string) vm.Volume {
	t.Helper()
	v := vm.Volume{ReadOnly: readOnly}
	for i, n := range names {
		flag := os.O_RDONLY
		if i == len(names)-1 && !readOnly {
			flag = os.O_RDWR
		}
		v.Layers = append(v.Layers, vm.Layer{Format: vm.QCOW2, File: open(t, n, flag)})
	}
	return v
}

func raw(t testing.TB, readOnly bool, data []byte) vm.Volume {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.raw")
	must(t, os.WriteFile(name, data, 0o600))
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	}
	return vm.Volume{Layers: []vm.Layer{{Format: vm.Raw, File: open(t, name, flag)}}, ReadOnly: readOnly}
}

func uuid(i int) string { return fmt.Sprintf("%08x-1111-4222-8333-444455556666", i) }

func isolated(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := tap.OpenIsolated(name)
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// machine is a small machine with the tiny guest on a layer of its own, which is the second result.
func machine(t testing.TB) (hardware.Config, string) {
	t.Helper()
	top := qcow2(t, tiny(t), "")
	return hardware.Config{
		Machine: machinev1.Machine{
			Name: "test", UID: "uid-of-test", BIOSUUID: uuid(0xabcdef),
			CPU: machinev1.CPU{Count: 1, Max: 3}, Memory: machinev1.Memory{Bytes: 512 << 20, Max: 2 << 30},
			Firmware: machinev1.Firmware{Type: machinev1.BIOS},
			Disks:    []machinev1.Disk{{Name: "boot", Bus: machinev1.SCSI, UUID: uuid(1)}},
			NICs:     []machinev1.NIC{{Name: "eth0", Model: "virtio-net-pci", MAC: "52:54:00:00:00:01"}},
		},
		UID: vmtest.UID, GID: vmtest.UID,
		Disks: map[string]vm.Volume{"boot": chain(t, false, tiny(t), top)},
		Taps:  map[string]*os.File{"eth0": isolated(t, "tap0")},
	}, top
}

// running is a machine that a test talks to.
type running struct {
	*hardware.Machine
	events chan hardware.Event
}

func start(t testing.TB, cfg hardware.Config) *running {
	t.Helper()
	r := &running{events: make(chan hardware.Event, 1000)}
	cfg.OnEvent = func(e hardware.Event) {
		select {
		case r.events <- e:
		default:
		}
	}
	begin := time.Now()
	m, err := hardware.Start(t.Context(), cfg)
	must(t, err)
	t.Logf("started in %s", time.Since(begin).Round(time.Millisecond))
	r.Machine = m
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console: %s", r.Console())
			select {
			case <-m.Done():
				t.Logf("ended: %s", m.Exit())
			default:
			}
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// await waits for an event of a kind.
func (r *running) await(t testing.TB, kind hardware.EventKind) hardware.Event {
	t.Helper()
	timeout := time.After(bootTimeout)
	for {
		select {
		case e := <-r.events:
			if e.Kind == kind {
				return e
			}
		case <-timeout:
			t.Fatalf("no event %s", kind)
		}
	}
}

// up waits until the guest's agent answers.
func (r *running) up(t testing.TB) {
	t.Helper()
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	for {
		try, stop := context.WithTimeout(ctx, time.Second)
		err := r.Agent().Ping(try)
		stop()
		if err == nil {
			t.Logf("agent answers after %s", time.Since(begin).Round(time.Millisecond))
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		select {
		case <-r.Done():
			t.Fatal(r.Exit())
		default:
		}
	}
}

// sh runs a script in the guest and returns its output.
func (r *running) sh(t testing.TB, script string) string {
	t.Helper()
	out, err := r.try(t, script)
	if err != nil {
		t.Fatalf("%s: %v", script, err)
	}
	return out
}

func (r *running) try(t testing.TB, script string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	res, err := r.Agent().Exec(ctx, guestagent.Command{Path: "/bin/sh", Args: []string{"-c", script}})
	if err == nil && res.ExitCode != 0 {
		err = fmt.Errorf("exit code %d: %s %s", res.ExitCode, res.Stdout, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout)), err
}

// want waits until a script prints what is wanted.
func (r *running) want(t testing.TB, want, script string) {
	t.Helper()
	var got string
	var err error
	for end := time.Now().Add(bootTimeout); time.Now().Before(end); {
		if got, err = r.try(t, script); err == nil && got == want {
			return
		}
		select {
		case <-r.Done():
			t.Fatalf("%s: %s", script, r.Exit())
		case <-time.After(200 * time.Millisecond):
		}
	}
	t.Fatalf("%s: %q, %v; want %q", script, got, err, want)
}

func (r *running) ended(t testing.TB) vm.Exit {
	t.Helper()
	select {
	case <-r.Done():
		return r.Exit()
	case <-time.After(bootTimeout):
		t.Fatal("the machine does not end")
		return vm.Exit{}
	}
}

// pressed presses the power button until the machine ends: a guest that has just booted may not have found it yet.
func (r *running) pressed(t testing.TB) vm.Exit {
	t.Helper()
	for end := time.Now().Add(bootTimeout); time.Now().Before(end); {
		if err := r.PowerDown(t.Context()); err != nil && !errors.Is(err, vm.ErrExited) {
			t.Fatal(err)
		}
		select {
		case <-r.Done():
			return r.Exit()
		case <-time.After(5 * time.Second):
		}
	}
	t.Fatal("the machine does not end")
	return vm.Exit{}
}

// again does something for which the guest may have been too slow, until it was not.
func again(t testing.TB, slow error, do func() error) {
	t.Helper()
	err := do()
	for end := time.Now().Add(bootTimeout); errors.Is(err, slow) && time.Now().Before(end); {
		err = do()
	}
	must(t, err)
}

// removed takes a device away that the guest must let go of.
func removed(t testing.TB, remove func(context.Context, string) error, name string) {
	t.Helper()
	again(t, hardware.ErrUnplug, func() error { return remove(t.Context(), name) })
}

// cpus gives the machine n processors.
func (r *running) cpus(t testing.TB, n int) {
	t.Helper()
	again(t, monitor.ErrTranslations, func() error {
		got, err := r.SetCPUs(t.Context(), n)
		if err == nil && got != n {
			t.Errorf("%d processors instead of %d", got, n)
		}
		return err
	})
}
