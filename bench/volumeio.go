package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"atoll.dev/atoll/internal/vm/qmp"
)

// Bounds of the measured part of a volume. What is written for the first time on the host is behind what the guest
// has written.
const (
	ioBytes = 256 << 20
	ioPort  = "10809" // of the host's loopback, for NBD
)

// ioJob is one way to use a volume.
type ioJob struct {
	measure string
	args    []string
	read    bool
}

func ioJobs() []ioJob {
	return []ioJob{
		{"sequential read", []string{"--rw=read", "--bs=1M", "--iodepth=4", "--time_based", "--runtime=4"}, true},
		{"sequential write", []string{"--rw=write", "--bs=1M", "--iodepth=4", "--time_based", "--runtime=4"}, false},
		{"4k random read", []string{"--rw=randread", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=4"}, true},
		{"4k random write", []string{"--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=4"}, false},
	}
}

// volumeIO runs fio on a block volume in a micro-VM, and on the same image opened on the host by QEMU's storage
// daemon, with the same fio and depth. The host's fio reaches the daemon by NBD over the loopback, which copies less
// than any file or device would; what a pod of the host gets, a loop device over FUSE, is measured as well.
func volumeIO(ctx context.Context, h *host) ([]Row, error) {
	var rows []Row
	for _, kind := range []struct{ name, class string }{{"thin", benchClass}, {"encrypted", encryptedClass}} {
		got, err := h.compareIO(ctx, kind.name, kind.class)
		rows = append(rows, got...)
		if err != nil {
			return rows, err
		}
	}
	return rows, nil
}

func (h *host) compareIO(ctx context.Context, name, class string) ([]Row, error) {
	claim := "io-" + name
	if err := errors.Join(h.claim(ctx, claim, class, 1<<10, true), h.bound(ctx)); err != nil {
		return nil, err
	}
	guest, err := h.ioIn(ctx, claim, "atoll", func(string) (string, error) { return claim, nil },
		[]string{"--ioengine=libaio", "--filename=" + devicePath}, 0)
	if err != nil {
		return nil, err
	}
	device, err := h.ioIn(ctx, claim, "runc", func(string) (string, error) { return claim, nil },
		[]string{"--ioengine=libaio", "--filename=" + devicePath}, ioBytes)
	if err != nil {
		return nil, err
	}
	nbd, err := h.ioIn(ctx, claim, "runc", func(volume string) (string, error) { return h.serveNBD(ctx, volume) },
		[]string{"--ioengine=nbd", "--uri=nbd://127.0.0.1:" + ioPort + "/volume"}, 2*ioBytes)
	if err != nil {
		return nil, err
	}
	jobs := append([]ioJob{{measure: "first sequential write"}}, ioJobs()...)
	var rows []Row
	for i, job := range jobs {
		measure := name + " volume, " + job.measure
		row := versus(measure, "MiB/s", guest[i], "host, NBD", nbd[i])
		row.Note = "the same image in qemu-storage-daemon on the host; first writes are to other parts of it"
		rows = append(rows, row, versus(measure, "MiB/s", guest[i], "host, FUSE and loop", device[i]))
	}
	return rows, nil
}

// ioIn runs fio on a volume that a pod of a runtime has, in the pod whose name in returns, which may be another. The
// first result is of blocks that were never written before, at an offset; the others are of the first part.
func (h *host) ioIn(ctx context.Context, claim, runtime string, in func(volume string) (string, error), engine []string, offset int64) ([][]float64, error) {
	pod := withClaim(volumePod(claim, runtime), claim, true)
	if _, err := h.start(ctx, pod); err != nil {
		return nil, err
	}
	volume, err := h.handleOf(ctx, claim)
	if err != nil {
		return nil, err
	}
	name, err := in(volume)
	if err != nil {
		return nil, err
	}
	fio := func(job ioJob, args ...string) (float64, error) {
		all := append([]string{"fio", "--name=job", "--output-format=json", "--direct=1", fmt.Sprintf("--size=%d", ioBytes)}, engine...)
		out, err := h.exec(ctx, name, append(append(all, args...), job.args...)...)
		if err != nil {
			return 0, err
		}
		return fioBandwidth(out, job.read)
	}
	first, err := fio(ioJob{args: []string{"--rw=write", "--bs=1M", "--iodepth=4", "--end_fsync=1"}}, fmt.Sprintf("--offset=%d", offset))
	if err != nil {
		return nil, err
	}
	results := [][]float64{{first}}
	for _, job := range ioJobs() {
		var samples []float64
		for range 3 {
			mib, err := fio(job)
			if err != nil {
				return nil, err
			}
			samples = append(samples, mib)
		}
		results = append(results, samples)
	}
	return results, errors.Join(h.deletePods(ctx), h.detached(ctx))
}

// handleOf is what the driver calls the volume of a claim.
func (h *host) handleOf(ctx context.Context, claim string) (string, error) {
	c, err := h.kube.CoreV1().PersistentVolumeClaims(benchNamespace).Get(ctx, claim, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	v, err := h.kube.CoreV1().PersistentVolumes().Get(ctx, c.Spec.VolumeName, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	if v.Spec.CSI == nil {
		return "", fmt.Errorf("volume %s is not one of the driver", v.Name)
	}
	return v.Spec.CSI.VolumeHandle, nil
}

// serveNBD has the storage daemon that a pod of the host has a volume from show it by NBD instead, and starts a pod
// that can reach that.
func (h *host) serveNBD(ctx context.Context, volume string) (string, error) {
	sum := sha256.Sum256([]byte(volume))
	socket := filepath.Join(h.o.runDir, "exports", hex.EncodeToString(sum[:])[:24], "qmp.sock")
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return "", fmt.Errorf("reaching the storage daemon: %w", err)
	}
	gone := make(chan struct{}, 1)
	c := qmp.New(conn, func(e qmp.Event) {
		if e.Name == "BLOCK_EXPORT_DELETED" {
			gone <- struct{}{}
		}
	})
	defer c.Close()
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		return "", fmt.Errorf("reaching the storage daemon: %w", err)
	}
	if err := c.Execute(ctx, "block-export-del", map[string]any{"id": "volume", "mode": "hard"}, nil); err != nil {
		return "", fmt.Errorf("serving the volume by NBD: %w", err)
	}
	select {
	case <-gone:
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(time.Minute):
		return "", errors.New("serving the volume by NBD: the storage daemon does not give it up")
	}
	err = c.Run(
		ctx,
		qmp.Command{Name: "nbd-server-start", Args: map[string]any{
			"addr": map[string]any{"type": "inet", "data": map[string]any{"host": "127.0.0.1", "port": ioPort}},
		}},
		qmp.Command{Name: "block-export-add", Args: map[string]any{
			"type": "nbd", "id": "bench", "node-name": "throttle", "name": "volume", "writable": true,
		}},
	)
	if err != nil {
		return "", fmt.Errorf("serving the volume by NBD: %w", err)
	}
	pod := volumePod("nbd-client", "runc")
	pod.Spec.HostNetwork = true
	_, err = h.start(ctx, pod)
	return pod.Name, err
}
