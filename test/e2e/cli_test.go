//go:build e2e

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// atoll runs a command that must fail with an exit code and returns what it said.
func atoll(t *testing.T, code int, command string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), command, args...).CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != code {
		t.Fatalf("%s %q: %v, want exit code %d\n%s", command, args, err, code, out)
	}
	return string(out)
}

func TestWrongCommands(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		args    []string
		code    int
		message string
	}{
		{[]string{"ups"}, 2, `unknown command "ups" (did you mean up?)`},
		{[]string{"up", "--poolsize", "3"}, 2, "unknown flag: --poolsize"},
		{[]string{"up", "--accelerator", "hvf", "--data-dir", "/nowhere/x"}, 2, "--accelerator"},
		{[]string{"status", "--data-dir", "/nowhere/x"}, 1, "/nowhere/x"},
		{[]string{"image", "load", "/nowhere/x.tar", "--data-dir", suite.dataDir}, 1, "/nowhere/x.tar"},
		{[]string{"logs", "kubelet", "--data-dir", suite.dataDir}, 2, "agent"},
	} {
		contains(t, atoll(t, tc.code, suite.atoll, tc.args...), tc.message)
	}
	if _, err := os.Stat("/nowhere"); err == nil {
		t.Error("a command that failed made /nowhere")
	}
}

// TestUpRefuses: a start that cannot go well says so before it changes anything.
func TestUpRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		prepare  string // a command of the shell, run in a mount namespace of its own, so that nobody else misses anything
		messages []string
	}{
		// The suite's own supervisor holds the ports.
		"busy port": {"true", []string{"port 6443/tcp", "in use", "by process", "atoll down --data-dir " + suite.dataDir}},
		"no qemu":   {"mount --bind /dev/null /usr/bin/qemu-system-x86_64", []string{"qemu-system-x86_64 is missing", "apt-get install -y qemu-system-x86"}},
		"no kmod":   {"mount --bind /dev/null /sbin/modprobe", []string{"modprobe is missing", "apt-get install -y kmod"}},
		"full disk": {`mount -t tmpfs -o size=64m tmpfs "${2%/*}"`, []string{"0.1 GiB free for", "free at least", "or choose another --data-dir"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			script := tc.prepare + `; exec "$1" up --detach --data-dir "$2"`
			out := atoll(t, 1, "unshare", "-m", "--propagation", "private", "sh", "-ec", script, "sh", suite.atoll, dir)
			for _, want := range append(tc.messages, "nothing was changed") {
				contains(t, out, want)
			}
			if _, err := os.Stat(dir); err == nil {
				t.Error("the data directory was made")
			}
		})
	}
}
