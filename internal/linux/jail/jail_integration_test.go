//go:build integration

package jail

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestJail: a program sees the host's programs and what it was shown, and can change neither.
func TestJail(t *testing.T) {
	root, secret := t.TempDir(), filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("shown"), 0o644); err != nil {
		t.Fatal(err)
	}
	type result struct {
		out string
		err error
	}
	done := make(chan result)
	go func() { // whose thread is not used again
		out, err := inside(root, secret)
		done <- result{out, err}
	}()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	for _, want := range []string{"shown\n", "bin\nlib", "not removed\n", "not written\n", "NoNewPrivs:\t1"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("%q is not in:\n%s", want, r.out)
		}
	}
	if strings.Contains(r.out, "etc") || strings.Contains(r.out, "proc\n") {
		t.Errorf("there is more than was shown:\n%s", r.out)
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) > 0 {
		t.Errorf("the host sees the tree: %v, %v", entries, err)
	}
}

func inside(root, secret string) (string, error) {
	status, err := os.Open("/proc/thread-self/status")
	if err != nil {
		return "", err
	}
	defer status.Close()
	if err := Begin(root, 1<<20); err != nil {
		return "", err
	}
	at := filepath.Join(root, "secret")
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		return "", err
	}
	if err := Bind(secret, at, unix.MS_RDONLY); err != nil {
		return "", err
	}
	if err := Enter(root); err != nil {
		return "", err
	}
	null, err := unix.Open("/secret", unix.O_RDONLY, 0)
	if err != nil {
		return "", err
	}
	stdin := os.NewFile(uintptr(null), "secret")
	defer stdin.Close()
	out, err := (&exec.Cmd{
		Path:  "/bin/sh",
		Stdin: stdin,
		Args: []string{"sh", "-c", `cat /secret; echo; ls -1 /; rm -f /usr/bin/env 2>/dev/null || echo not removed
(echo x >/secret) 2>/dev/null || echo not written; cat /dev/fd/3 2>/dev/null <&3 || true; cat <&3`},
		ExtraFiles: []*os.File{status}, Dir: "/",
	}).CombinedOutput()
	return string(out), err
}
