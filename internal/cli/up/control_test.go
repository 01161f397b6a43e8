package up

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"

	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/supervise"
)

// TestControl talks to a supervisor that has one service, over its socket.
func TestControl(t *testing.T) {
	tree, err := datadir.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	tree = tree.WithRun(t.TempDir())
	client := NewClient(tree)
	if _, err := client.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Fatalf("Status without a supervisor = %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	u := &Up{cfg: Config{Tree: tree, Version: "v1", Logger: slog.New(slog.DiscardHandler)}, stop: stop}
	u.children, err = supervise.New(supervise.Config{
		Logger: u.cfg.Logger,
		Services: []supervise.Service{{Name: "one", Run: func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	childrenDone := make(chan error, 1)
	go func() { childrenDone <- u.children.Run(ctx) }()
	controlCtx, stopControl := context.WithCancel(t.Context())
	controlDone := make(chan error, 1)
	go func() { controlDone <- u.serveControl(controlCtx) }()
	if err := u.children.WaitReady(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	var report Report
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if report, err = client.Status(t.Context()); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if report.Version != "v1" || len(report.Services) != 2 || report.Services[1].State != supervise.Ready || report.Pool != nil {
		t.Errorf("report = %+v", report)
	}
	if info, err := os.Stat(tree.Control()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the control socket: %v, %v", info.Mode(), err)
	}
	if err := client.StopService(t.Context(), "two"); err == nil {
		t.Error("StopService of an unknown service succeeded")
	}
	if err := client.StopService(t.Context(), "one"); err != nil {
		t.Error(err)
	}
	if err := client.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-childrenDone; err != nil {
		t.Error(err)
	}
	stopControl()
	if err := <-controlDone; err != nil {
		t.Error(err)
	}
}
