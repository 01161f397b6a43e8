//go:build e2e

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestExec(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	equal(t, "stdout", n.exec("box", "echo", "a b"), "a b")

	cmd := kubectlCommand(t.Context(), "-n", n.name, "exec", "box", "--", "sh", "-c", "echo to stderr >&2; exit 42")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 42 {
		t.Fatalf("exit code of the command: got %v", err)
	}
	contains(t, string(out), "to stderr")

	if out, err := n.try("exec", "box", "--", "no-such-program"); err == nil || !strings.Contains(out, "no-such-program") {
		t.Fatalf("a missing program: %v %s", err, out)
	}
}

func TestExecWithTerminal(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	// script(1) gives kubectl the terminal that it insists on.
	// The size comes after the command has begun, as with every runtime.
	inner := strings.Join(append([]string{suite.atoll, "kubectl", "--kubeconfig", suite.dataDir + "/admin.kubeconfig", "-n", n.name}, "exec", "-it", "box", "--", "sh", "-c", "'tty; for i in $(seq 3000); do stty size 2>/dev/null | grep \"33 99\" && break; sleep 0.1; done; exit 5'"), " ")
	cmd := exec.CommandContext(t.Context(), "script", "-qec", "stty rows 33 cols 99; "+inner, "/dev/null")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 5 {
		t.Fatalf("exit code: %v\n%s", err, out)
	}
	contains(t, string(out), "/dev/pts/")
	contains(t, string(out), "33 99")
}

// TestExecStdin sends 100 MB through exec and compares what arrived.
func TestExecStdin(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	const size = 100 << 20
	hash := sha256.New()
	source := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), hash)
	got := feed(t, source, "-n", n.name, "exec", "-i", "box", "--", "sha256sum")
	equal(t, "sha256 of stdin", got, hex.EncodeToString(hash.Sum(nil))+"  -")
}

func TestAttach(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: echo}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
    - {name: main, image: busybox, imagePullPolicy: IfNotPresent, stdin: true, stdinOnce: true, command: [sh, -c, "while read line; do echo got $line; done"]}
`)
	n.ready("echo")
	got := feed(t, strings.NewReader("one\ntwo\n"), "-n", n.name, "attach", "-i", "echo", "-q")
	contains(t, got, "got two")
	equal(t, "phase", n.ended("echo"), "Succeeded")
}

func TestCopy(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte(strings.Repeat("0123456789", 200000)), 0o600); err != nil {
		t.Fatal(err)
	}
	n.kubectl("cp", file, "box:/tmp/there")
	n.kubectl("cp", "box:/tmp/there", filepath.Join(dir, "back"))
	want, _ := os.ReadFile(file)
	got, err := os.ReadFile(filepath.Join(dir, "back"))
	if err != nil || string(got) != string(want) {
		t.Fatalf("the copy differs: %d bytes, %v", len(got), err)
	}
}

func TestCopyDirectory(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	dir := t.TempDir()
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	files := map[string]string{"a": "first", "sub/b c": "second", "sub/deep/er/empty": "", "run.sh": "#!/bin/sh\necho ran\n"}
	for name, text := range files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(there, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(there, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.kubectl("cp", there, "box:/tmp/dir")
	equal(t, "a program of the directory", n.exec("box", "/tmp/dir/run.sh"), "ran")
	n.kubectl("cp", "box:/tmp/dir", back)
	out, err := exec.Command("diff", "-r", there, back).CombinedOutput()
	if err != nil {
		t.Fatalf("the copy differs: %v\n%s", err, out)
	}
}

func TestPortForward(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /w; echo forwarded > /w/index.html; exec httpd -f -p 127.0.0.1:8080 -h /w"]
      readinessProbe: {exec: {command: [wget, -q, -O-, "http://127.0.0.1:8080/"]}, periodSeconds: 2, timeoutSeconds: 10}
`)
	n.ready("web")
	eventually(t, "the forwarded port", func() error {
		page, err := n.forwardedPage("web", "8080", "/")
		return errors.Join(err, is(page, "forwarded\n"))
	})
}

// forwardedPage gets a page by a port-forward of its own, since kubectl ends with the first connection that fails.
func (n *namespace) forwardedPage(pod, port, path string) (string, error) {
	ctx, cancel := context.WithCancel(n.t.Context())
	defer cancel()
	forward := kubectlCommand(ctx, "-n", n.name, "port-forward", "pod/"+pod, ":"+port)
	out, err := forward.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := forward.Start(); err != nil {
		return "", err
	}
	defer func() { _ = forward.Wait() }() // killed by cancel
	defer cancel()
	var local int
	if _, err := fmt.Fscanf(out, "Forwarding from 127.0.0.1:%d", &local); err != nil {
		return "", fmt.Errorf("kubectl port-forward: %w", err)
	}
	page, err := exec.CommandContext(ctx, "curl", "-fsS", "--max-time", "60", fmt.Sprintf("http://127.0.0.1:%d%s", local, path)).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("the forwarded port: %w: %s", err, page)
	}
	return string(page), nil
}

func TestEphemeralDebugContainer(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(sleeper)
	n.ready("box")
	n.kubectl("debug", "box", "--image=busybox", "--image-pull-policy=IfNotPresent", "--target=box", "-c", "debugger", "--", "sh", "-c", "ps; echo debugged")
	eventually(t, "the debugger's output", func() error {
		out, err := n.try("logs", "box", "-c", "debugger")
		if err == nil && (!strings.Contains(out, "debugged") || !strings.Contains(out, "sleep 100000")) {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
}

// TestManyLogLines writes faster than anyone reads and counts every line.
func TestManyLogLines(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(script("chatty", "seq 1 50000"))
	equal(t, "phase", n.ended("chatty"), "Succeeded")
	lines := strings.Split(strings.TrimSpace(n.kubectl("logs", "chatty")), "\n")
	if len(lines) != 50000 || lines[49999] != "50000" {
		t.Fatalf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
}

// TestFastLogs follows 10,000 lines a second, and reads them again after the container was replaced.
func TestFastLogs(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: fast}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, emptyDir: {}}]
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      volumeMounts: [{name: v, mountPath: /v}]
      command: [sh, -c, "test -e /v/second && exec sleep 100000; until test -e /v/go; do sleep 0.1; done; for i in 1 2 3 4 5; do seq ${i}0000 ${i}9999; sleep 1; done; touch /v/second; exit 1"]
`)
	n.ready("fast")
	follow := kubectlCommand(t.Context(), "-n", n.name, "logs", "-f", "fast")
	var followed strings.Builder
	follow.Stdout = &followed
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	n.exec("fast", "touch", "/v/go")
	if err := follow.Wait(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the next start of its container", func() error {
		return n.fieldIs("pod/fast", ".status.containerStatuses[0].restartCount", "1")
	})
	n.ready("fast")
	var want strings.Builder
	for i := 10000; i < 60000; i++ {
		fmt.Fprintln(&want, i)
	}
	for what, got := range map[string]string{"logs -f": followed.String(), "logs -p": n.kubectl("logs", "-p", "fast")} {
		if got != want.String() {
			t.Errorf("kubectl %s differs: %d bytes of %d, %d lines of 50000, ends with %q", what, len(got), want.Len(),
				strings.Count(got, "\n"), got[max(0, len(got)-20):])
		}
	}
}
