package volumes

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

	"atoll.dev/atoll/bench/rig"
	"atoll.dev/atoll/internal/vm/qmp"
)

// A volume has three parts: the guest writes the first one, the host the second one, and qemu-img the third one, so
// that each is the first to write. All else is done in the part that is one's own.
const (
	ioBytes = 256 << 20
	ioParts = 3
	ioPort  = "10809" // of the host's loopback, for NBD
)

// ioJob is one way to use a volume, as arguments of fio and of qemu-img bench.
type ioJob struct {
	measure string
	args    []string
	read    bool
	image   []string
	bytes   int64 // that qemu-img reads or writes
}

func ioJobs() []ioJob {
	// Steps of a prime number of blocks, for want of random ones.
	const stride = "32436224"
	large, small := []string{"-c", "768", "-d", "4", "-s", "1M"}, []string{"-c", "50000", "-d", "16", "-s", "4k", "-S", stride}
	const largeBytes, smallBytes = 768 << 20, 50000 << 12
	fio := func(rw, bs, depth string) []string {
		return []string{"--rw=" + rw, "--bs=" + bs, "--iodepth=" + depth, "--time_based", "--runtime=4"}
	}
	return []ioJob{
		{"sequential read", fio("read", "1M", "4"), true, large, largeBytes},
		{"sequential write", fio("write", "1M", "4"), false, append([]string{"-w"}, large...), largeBytes},
		{"4k random read", fio("randread", "4k", "16"), true, small, smallBytes},
		{"4k random write", fio("randwrite", "4k", "16"), false, append([]string{"-w"}, small...), smallBytes},
	}
}

// IO runs fio on a block volume in a micro-VM, and compares it with the same image opened on the host, by QEMU
// with the same cache and depth, in two ways. Of the storage daemon that opens volumes for pods of the host the same
// fio asks by NBD over the loopback: all is as in the guest, but for the copies that NBD makes, which slow down large
// requests. And qemu-img bench uses the image without anything in between, which is as fast as it can get; it knows no
// random requests, and makes long steps instead; nor does it know keys.
func IO(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	var rows []rig.Row
	for _, kind := range []struct {
		name, class string
		image       bool
	}{{"thin", rig.VolumeClass, true}, {"encrypted", rig.EncryptedClass, false}} {
		got, err := compareIO(ctx, h, kind.name, kind.class, kind.image)
		rows = append(rows, got...)
		if err != nil {
			return rows, err
		}
	}
	return rows, nil
}

func compareIO(ctx context.Context, h *rig.Host, name, class string, withImage bool) ([]rig.Row, error) {
	claim := "io-" + name
	if err := errors.Join(h.Claim(ctx, claim, class, ioParts*ioBytes>>20, true), h.Bound(ctx)); err != nil {
		return nil, err
	}
	guest, err := ioIn(ctx, h, claim, "atoll", func(string) (string, error) { return claim, nil },
		[]string{"--ioengine=libaio", "--filename=" + devicePath}, 0)
	if err != nil {
		return nil, err
	}
	nbd, err := ioIn(ctx, h, claim, "runc", func(volume string) (string, error) { return serveNBD(ctx, h, volume) },
		[]string{"--ioengine=nbd", "--uri=nbd://127.0.0.1:" + ioPort + "/volume"}, ioBytes)
	if err != nil {
		return nil, err
	}
	var image [][]float64
	if withImage {
		volume, err := handleOf(ctx, h, claim)
		if err != nil {
			return nil, err
		}
		if image, err = imageIO(ctx, h, volume); err != nil {
			return nil, err
		}
	}
	jobs := append([]ioJob{{measure: "first sequential write"}}, ioJobs()...)
	var rows []rig.Row
	for i, job := range jobs {
		measure := name + " volume, " + job.measure
		rows = append(rows, rig.Versus(measure, "MiB/s", guest[i], "fio on the host, NBD", nbd[i]))
		if withImage {
			rows = append(rows, rig.Versus(measure, "MiB/s", guest[i], "qemu-img bench", image[i]))
		}
	}
	return rows, nil
}

// ioIn runs fio on a volume that a pod of a runtime has, in the pod whose name in returns, which may be another. It
// uses the part at the offset; the first result is of blocks that were never written before.
func ioIn(ctx context.Context, h *rig.Host, claim, runtime string, in func(volume string) (string, error), engine []string, offset int64) ([][]float64, error) {
	pod := withClaim(volumePod(claim, runtime), claim, true)
	if _, err := h.Start(ctx, pod); err != nil {
		return nil, err
	}
	volume, err := handleOf(ctx, h, claim)
	if err != nil {
		return nil, err
	}
	name, err := in(volume)
	if err != nil {
		return nil, err
	}
	fio := func(job ioJob) (float64, error) {
		all := append([]string{"fio", "--name=job", "--output-format=json", "--direct=1", fmt.Sprintf("--size=%d", ioBytes), fmt.Sprintf("--offset=%d", offset)}, engine...)
		out, err := h.Exec(ctx, name, append(all, job.args...)...)
		if err != nil {
			return 0, err
		}
		return rig.FioBandwidth(out, job.read)
	}
	first, err := fio(ioJob{args: []string{"--rw=write", "--bs=1M", "--iodepth=4", "--end_fsync=1"}})
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
	return results, errors.Join(h.DeletePods(ctx), h.Detached(ctx))
}

// handleOf is what the driver calls the volume of a claim.
func handleOf(ctx context.Context, h *rig.Host, claim string) (string, error) {
	c, err := h.Kube.CoreV1().PersistentVolumeClaims(rig.Namespace).Get(ctx, claim, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	v, err := h.Kube.CoreV1().PersistentVolumes().Get(ctx, c.Spec.VolumeName, metav1.GetOptions{})
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
func serveNBD(ctx context.Context, h *rig.Host, volume string) (string, error) {
	sum := sha256.Sum256([]byte(volume))
	socket := filepath.Join(h.Options.RunDir, "exports", hex.EncodeToString(sum[:])[:24], "qmp.sock")
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
	_, err = h.Start(ctx, pod)
	return pod.Name, err
}
