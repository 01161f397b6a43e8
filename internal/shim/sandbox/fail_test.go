package sandbox

import (
	"context"
	"errors"
	"strings"
	"testing"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"

	"atoll.dev/atoll/internal/shim/cripb"
	"atoll.dev/atoll/internal/shim/timing"
	"atoll.dev/atoll/internal/vm"
)

func TestStartFails(t *testing.T) {
	w := newWorld()
	s := service(t, w)
	r := request(t, nil)
	r.NetnsPath = "/gone"
	if _, err := start(t, s, r); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("start: %v", err)
	}
	status, err := s.SandboxStatus(t.Context(), &api.SandboxStatusRequest{SandboxID: r.SandboxID})
	if err != nil || status.State != stateNotReady {
		t.Errorf("status %v, %v", status, err)
	}
	if _, err := s.ShutdownSandbox(t.Context(), &api.ShutdownSandboxRequest{SandboxID: r.SandboxID}); err != nil {
		t.Error(err)
	}

	s = New(Config{VM: func(context.Context) (*VM, error) { return nil, vm.ErrTemplate }, Steps: timing.New(), Tasks: w, Cgroups: w})
	if _, err := start(t, s, request(t, nil)); err == nil || !strings.Contains(err.Error(), vm.ErrTemplate.Error()) {
		t.Errorf("no clone: %v", err)
	}
}

// TestSetupFails: containerd does not wait for an ordinary pod's guest, but no container gets past it, and
// the sandbox ends.
func TestSetupFails(t *testing.T) {
	w := newWorld()
	w.setupErr = errors.New("no entropy")
	s := service(t, w)
	r := request(t, func(c *cripb.PodSandboxConfig) { *c = cripb.PodSandboxConfig{} })
	if _, err := start(t, s, r); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.attached.Ready(t.Context()); !errors.Is(err, w.setupErr) {
			t.Errorf("ready: %v", err)
		}
	}
	wait, err := s.WaitSandbox(t.Context(), &api.WaitSandboxRequest{SandboxID: r.SandboxID})
	if err != nil || wait.ExitStatus != statusKilled {
		t.Errorf("wait %v, %v", wait, err)
	}
}
