package detach

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/process"
)

// runEnv tells the run directory to processes that this test binary starts
// itself as.
const runEnv = "ATOLL_TEST_RUN_DIR"

// TestMain lets the test binary be the atoll binary: as `up` it holds the lock
// and watches the keeper, as `keeper` it is the keeper.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 || (os.Args[1] != "up" && os.Args[1] != "keeper") {
		os.Exit(m.Run())
	}
	if err := beAtoll(os.Args[1], strings.TrimPrefix(os.Args[len(os.Args)-1], "--data-dir=")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func beAtoll(role, root string) error {
	tree, err := datadir.New(root)
	if err != nil {
		return err
	}
	tree = tree.WithRun(os.Getenv(runEnv))
	d := &Detacher{tree: tree, logger: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if role == "keeper" {
		return d.Keep(ctx)
	}
	if _, err := tree.Acquire(); err != nil {
		return err
	}
	return d.Watch(ctx)
}

// TestHealing kills the supervisor and the keeper in turn; the other brings it
// back. Then both are stopped for good.
func TestHealing(t *testing.T) {
	tree, err := datadir.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	tree = tree.WithRun(t.TempDir())
	t.Setenv(runEnv, tree.Run())
	if err := tree.Create(); err != nil {
		t.Fatal(err)
	}
	d := &Detacher{tree: tree, logger: slog.New(slog.DiscardHandler)}
	if changed, err := d.InstallBinary(); err != nil || !changed {
		t.Fatalf("InstallBinary = %v, %v", changed, err)
	}
	if changed, err := d.InstallBinary(); err != nil || changed {
		t.Fatalf("second InstallBinary = %v, %v", changed, err)
	}
	if err := d.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.Remove(tree.Keep())
		for _, holder := range []func() (int, error){tree.Holder, tree.KeeperHolder} {
			if pid, err := holder(); err == nil && pid > 0 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	up := waitHolder(t, "the supervisor", tree.Holder, 0)
	keeper := waitHolder(t, "the keeper", tree.KeeperHolder, 0)
	if err := syscall.Kill(up, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	up = waitHolder(t, "the supervisor again", tree.Holder, up)
	if err := syscall.Kill(keeper, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitHolder(t, "the keeper again", tree.KeeperHolder, keeper)

	if err := d.Disable(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	info, err := process.Read(up)
	if err != nil {
		t.Fatalf("stopping the keeper stopped the supervisor: %v", err)
	}
	if err := process.End(t.Context(), 5*time.Second, info); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * minDelay) // in which nobody may come back
	for what, holder := range map[string]func() (int, error){"supervisor": tree.Holder, "keeper": tree.KeeperHolder} {
		if pid, err := holder(); pid != 0 || err != nil {
			t.Errorf("the %s is back: %d, %v", what, pid, err)
		}
	}
}

// waitHolder waits until another process than old holds a lock.
func waitHolder(t *testing.T, what string, holder func() (int, error), old int) int {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		pid, err := holder()
		if err == nil && pid != 0 && pid != old {
			return pid
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not run: %d, %v", what, pid, err)
		}
	}
}

func TestUnit(t *testing.T) {
	tree, err := datadir.New("/srv/lab")
	if err != nil {
		t.Fatal(err)
	}
	text := unitText(tree)
	for _, want := range []string{
		"ExecStart=/srv/lab/bin/atoll up --background --data-dir=/srv/lab\n", "Restart=always\n",
		"KillMode=process\n", "Delegate=yes\n", "WantedBy=multi-user.target\n", "append:/srv/lab/logs/up.log\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the unit does not say %q", want)
		}
	}
	d := &Detacher{tree: tree, systemd: "/etc/systemd/system"}
	if got := d.unitFile(); filepath.Dir(got) != d.systemd || !strings.HasPrefix(filepath.Base(got), "atoll-") {
		t.Errorf("unit file %s", got)
	}
}
