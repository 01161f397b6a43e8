//go:build integration

package vm_test

import (
	"context"
	"testing"
	"time"

	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/vmtest"
)

// config is the machine most tests use.
func config(t testing.TB) vm.Config {
	t.Helper()
	return vm.Config{
		Kernel: vmtest.Kernel(t), Initramfs: vmtest.Initramfs(t),
		MaxMemoryMiB: 2048, MaxCPUs: 4,
		ScratchBytes: 1 << 30,
		UID:          vmtest.UID, GID: vmtest.UID,
	}
}

func build(t testing.TB) *vm.Template {
	t.Helper()
	tmpl, err := vm.BuildTemplate(context.Background(), config(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tmpl.Close() })
	return tmpl
}

func TestCloneAnswers(t *testing.T) {
	tmpl := build(t)
	t.Logf("%+v", tmpl.Meta())
	for range 3 {
		start := time.Now()
		m := vmtest.Clone(t, tmpl, vm.CloneConfig{})
		t.Log("clone", time.Since(start))
		g := vmtest.NewGuest(m)
		g.Want(t, "hello", "echo hello")
		t.Log("answer", time.Since(start))
		t.Log(g.Ask(t, "cmdline"), g.Ask(t, "clocksource"))
	}
}
