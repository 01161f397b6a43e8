package volumes

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"

	"atoll.dev/atoll/bench/rig"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/directory"
	"atoll.dev/atoll/internal/storage/qemuimg"
	"atoll.dev/atoll/internal/storage/stores"
)

// imageIO runs qemu-img bench on a volume in clear that nobody has. The first result is of the last part, which was never
// written before; the others are of the whole volume.
func imageIO(ctx context.Context, h *rig.Host, volume string) (_ [][]float64, err error) {
	store, id, err := stores.Split(volume)
	if err != nil {
		return nil, err
	}
	tree, err := datadir.New(h.Options.DataDir)
	if err != nil {
		return nil, err
	}
	engine, err := directory.New(directory.Config{Path: tree.Datastore(store)})
	if err != nil {
		return nil, err
	}
	const holder = "bench"
	disk, err := engine.Attach(ctx, id, holder, datastore.ReadWrite)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, engine.Detach(context.WithoutCancel(ctx), id, holder)) }()
	return imageJobs(ctx, disk)
}

func imageJobs(ctx context.Context, disk handover.Disk) ([][]float64, error) {
	name, err := qemuimg.Name(qemuimg.Node(disk.Layers))
	if err != nil {
		return nil, err
	}
	bench := func(bytes int64, args ...string) (float64, error) {
		all := append([]string{"bench", "-t", "writeback"}, args...)
		out, err := exec.CommandContext(ctx, "qemu-img", append(all, name)...).CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("qemu-img bench: %w: %s", err, out)
		}
		took := regexp.MustCompile(`completed in ([0-9.]+) seconds`).FindSubmatch(out)
		if took == nil {
			return 0, fmt.Errorf("qemu-img bench says %q", out)
		}
		seconds, err := strconv.ParseFloat(string(took[1]), 64)
		if err != nil || seconds == 0 {
			return 0, fmt.Errorf("qemu-img bench says %q", out)
		}
		return float64(bytes) / (1 << 20) / seconds, nil
	}
	first, err := bench(ioBytes, "-w", "-c", "256", "-d", "4", "-s", "1M", "-o", fmt.Sprint((ioParts-1)*ioBytes), "--flush-interval=256")
	if err != nil {
		return nil, err
	}
	results := [][]float64{{first}}
	for _, job := range ioJobs() {
		var samples []float64
		for range 3 {
			mib, err := bench(job.bytes, job.image...)
			if err != nil {
				return nil, err
			}
			samples = append(samples, mib)
		}
		results = append(results, samples)
	}
	return results, nil
}
