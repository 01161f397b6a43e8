//go:build e2e

package e2e

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"atoll.dev/atoll/internal/datadir"
)

// suite is the supervisor that all tests share.
var suite struct {
	atoll   string // path of the binary under test
	dataDir string
	own     bool   // started, and so stopped, by this run
	printed string // by `atoll up`, if this run has started it
	address string // of the node

	template sync.Mutex // held by the test that has made the default SupervisorNamespaceTemplate
}

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := runSuite(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func runSuite(m *testing.M) (int, error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return 1, err
	}
	suite.atoll = filepath.Join(root, "bin", "atoll")
	suite.dataDir = os.Getenv("ATOLL_E2E_DATA_DIR")
	if suite.dataDir == "" {
		dir, err := os.MkdirTemp("/var/lib", "atoll-e2e-")
		if err != nil {
			return 1, fmt.Errorf("the tests need root: %w", err)
		}
		suite.dataDir, suite.own = dir, true
		var printed strings.Builder
		err = commandTo(io.MultiWriter(os.Stdout, &printed), "up", "--detach", "--timeout", "15m")
		suite.printed = printed.String()
		if err != nil {
			dumpLogs()
			_ = command("down", "--purge")
			return 1, err
		}
	}
	for _, name := range []string{"busybox", "tester"} {
		if err := command("image", "load", filepath.Join(root, "build", "images", name+".tar")); err != nil {
			return 1, err
		}
	}
	address, err := kubectl(context.Background(), "", "get", "nodes", "-o", `jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}`)
	if err != nil {
		return 1, err
	}
	suite.address = strings.TrimSpace(address)
	code := m.Run()
	if !suite.own {
		return code, nil
	}
	if code != 0 {
		dumpLogs()
	}
	if err := command("down", "--purge"); err != nil {
		return 1, err
	}
	if left := leftovers(); len(left) > 0 {
		return 1, fmt.Errorf("after `atoll down --purge` there is still:\n%s", strings.Join(left, "\n"))
	}
	return code, nil
}

// command runs one atoll command on the suite's data directory, output to the terminal.
func command(args ...string) error { return commandTo(os.Stdout, args...) }

// commandTo does with its output going elsewhere.
func commandTo(out io.Writer, args ...string) error {
	cmd := exec.Command(suite.atoll, append(args, "--data-dir", suite.dataDir)...)
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("atoll %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// dumpLogs shows the end of every service's log, for a run whose machine nobody can log in to.
func dumpLogs() {
	logs, _ := filepath.Glob(filepath.Join(suite.dataDir, "logs", "*.log"))
	for _, path := range logs {
		out, _ := exec.Command("tail", "-n", "40", path).Output()
		fmt.Printf("==> %s\n%s\n", path, out)
	}
}

// leftovers names everything of the suite's supervisor that a stopped one must not leave.
func leftovers() []string {
	var left []string
	add := func(what, out string) {
		for line := range strings.SplitSeq(strings.TrimSpace(out), "\n") {
			if line != "" {
				left = append(left, what+": "+line)
			}
		}
	}
	shell := func(script string) string {
		out, _ := exec.Command("sh", "-c", script).Output()
		return string(out)
	}
	add("process", shell(fmt.Sprintf("(pgrep -af '%s'; pgrep -af 'qemu-system.*atoll') | grep -v pgrep", suite.dataDir)))
	add("mount", shell(fmt.Sprintf("grep '%s' /proc/self/mounts", suite.dataDir)))
	add("link", shell("ip -o link | grep -E ' (atoll0|at[0-9a-z]{6,}|veth[0-9a-f]{8})[@:]'"))
	add("nftables", shell("nft list tables 2>/dev/null | grep -E 'atoll|kube-proxy'"))
	add("cgroup", shell("find /sys/fs/cgroup -maxdepth 3 -type d -name 'kubepods*'"))
	if tree, err := datadir.New(suite.dataDir); err == nil && tree.CgroupRoot() != "" {
		add("cgroup", shell("find /sys/fs/cgroup -maxdepth 2 -type d -path '*"+tree.CgroupRoot()+"'"))
	}
	if _, err := os.Stat(suite.dataDir); err == nil {
		left = append(left, "directory: "+suite.dataDir)
	}
	return left
}
