//go:build integration

package csi_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/storage/csi"
	"atoll.dev/atoll/internal/storage/csi/export"
	"atoll.dev/atoll/internal/storage/csi/node"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/directory"
	"atoll.dev/atoll/internal/storage/stores"
)

// TestSanity is csi-sanity in full, on a directory, with the node service of pods on the host: it really
// attaches, formats and mounts. It needs root, FUSE, loop devices and the tools of QEMU.
func TestSanity(t *testing.T) {
	dir := t.TempDir()
	set := &stores.Set{}
	engine, err := directory.New(directory.Config{Path: filepath.Join(dir, "store"), Limits: datastore.Limits{WarnAt: 0.98, RefuseAt: 0.99}})
	if err != nil {
		t.Fatal(err)
	}
	exports := export.New(export.Config{Dir: filepath.Join(dir, "run", "exports"), Patience: 5 * time.Minute})
	t.Cleanup(func() { tidyUp(t, dir, exports) })
	if _, err := engine.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	set.Put(stores.Store{Name: stores.Default, Backend: engine})
	set.Listed()
	logger := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	local, err := node.New(node.Config{
		Node: "n1", Stores: set, Kubelet: filepath.Join(dir, "kubelet"), RunDir: filepath.Join(dir, "run"),
		MicroVM: func(context.Context, string, string, string) (bool, error) { return false, nil },
		Export:  exports, Logger: logger,
	})
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	socket := filepath.Join(dir, "csi.sock")
	driver, err := csi.New(csi.Config{
		Version: "test", Node: "n1", Stores: set, Open: local, NodeService: local, Socket: socket, Logger: logger,
		OnReady: func() { close(ready) },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- driver.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	config := sanity.NewTestConfig()
	config.Address = "unix://" + socket
	config.TargetPath, config.StagingPath = filepath.Join(dir, "target"), filepath.Join(dir, "staging")
	config.TestVolumeSize = 64 << 20
	config.TestVolumeExpandSize = 128 << 20
	config.TestVolumeMutableParameters = map[string]string{csi.ParamIOPS: "500"}
	config.IdempotentCount = 3
	config.RemoveTargetPathCmd, config.RemoveStagingPathCmd = "", ""
	config.CheckPathCmdTimeout = time.Minute
	sanity.Test(t, config)
}

// tidyUp takes off the host what a test that failed has left mounted.
func tidyUp(t *testing.T, dir string, exports *export.Set) {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if strings.HasPrefix(fields[1], dir+"/") && strings.HasPrefix(fields[0], "/dev/loop") {
			t.Errorf("%s was left mounted", fields[1])
			if err := unix.Unmount(fields[1], unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	}
	if err := exports.RemoveAll(); err != nil {
		t.Error(err)
	}
}
