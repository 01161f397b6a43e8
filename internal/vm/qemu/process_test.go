//go:build integration

package qemu

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// start runs a shell script as if it were QEMU, as the user who runs the test.
func start(t *testing.T, script string) *Process {
	t.Helper()
	name := t.TempDir() + "/qemu"
	if err := os.WriteFile(name, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	c := clone()
	c.Binary = name
	cred := Credential{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	p, err := Start(c, cred)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.Kill()
		<-p.Done()
		_ = p.Close()
	})
	return p
}

func TestStderrAndStatus(t *testing.T) {
	p := start(t, `echo "$0: not today" >&2; grep NoNewPrivs /proc/self/status >&2; exit 7`)
	<-p.Done()
	st, err := p.Exit()
	if err != nil || st.ExitStatus() != 7 {
		t.Errorf("status %v, %v", st, err)
	}
	out := p.Stderr()
	if !strings.Contains(out, "not today") || !strings.Contains(out, "NoNewPrivs:\t1") {
		t.Errorf("stderr is %q", out)
	}
}

// TestFloodedStderr: output that nobody reads must not stop QEMU.
func TestFloodedStderr(t *testing.T) {
	p := start(t, `trap '' PIPE; i=0; while [ $i -lt 20000 ]; do echo "line $i of many lines" >&2; i=$((i+1)); done; exit 0`)
	<-p.Done()
	if n := len(p.Stderr()); n == 0 || n > maxStderr {
		t.Errorf("%d bytes were kept", n)
	}
}

func TestKill(t *testing.T) {
	p := start(t, "exec sleep 1000")
	if err := unix.Kill(p.PID(), 0); err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if st, err := p.Exit(); err != nil || st.Signal() != syscall.SIGKILL {
		t.Errorf("status %v, %v", st, err)
	}
	if err := p.Kill(); err != nil {
		t.Errorf("killing again: %v", err)
	}
}

func TestStartErrors(t *testing.T) {
	c := clone()
	c.Binary = "/nonexistent"
	if _, err := Start(c, Credential{UID: 1, GID: 1}); err == nil {
		t.Error("a missing binary was started")
	}
	if _, err := Start(Config{}, Credential{UID: 1, GID: 1}); err == nil {
		t.Error("an empty configuration was started")
	}
}
