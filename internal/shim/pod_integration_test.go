//go:build integration

package shim_test

import (
	"strings"
	"testing"

	apievents "github.com/containerd/containerd/api/events"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
)

// TestHello is the whole path: pool, shim start, sandbox, container, output, removal.
func TestHello(t *testing.T) {
	h := newHost(t, 1)
	h.waitReady(1)
	p := h.runPod("hello", nil)
	c := p.run("c1", p.spec("/bin/echo", "hello from a micro-VM"))
	if got := c.stdout.String(); got != "hello from a micro-VM\n" {
		t.Errorf("output %q", got)
	}
	var exit apievents.TaskExit
	h.event("/tasks/exit", &exit)
	if exit.ContainerID != "c1" || exit.ExitStatus != 0 {
		t.Errorf("exit event: %v", &exit)
	}
	status, err := p.sandbox.SandboxStatus(t.Context(), &sandboxapi.SandboxStatusRequest{SandboxID: p.id, Verbose: true})
	if err != nil || status.State != "SANDBOX_READY" || !strings.Contains(status.Info["atoll"], "sandbox setup") {
		t.Errorf("status %v, %v", status, err)
	}
	t.Log(status.GetInfo()["atoll"])
	p.stop()
}
