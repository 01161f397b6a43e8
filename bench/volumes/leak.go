package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"atoll.dev/atoll/bench/rig"
)

// Leak makes many volumes, attaches them one after another, deletes them, and compares the host before and
// after. Of ten, one is a block volume of a micro-VM and one is used by a pod of the host, which take loop devices,
// mounts and a storage daemon.
func Leak(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	cycle := func(first, count int) (took []float64, err error) {
		for i := first; i < first+count; i++ {
			if err := h.Claim(ctx, fmt.Sprintf("v-%d", i), rig.VolumeClass, 64, i%10 == 3); err != nil {
				return nil, err
			}
		}
		if err := h.Bound(ctx); err != nil {
			return nil, err
		}
		for i := first; i < first+count; i++ {
			runtime := "atoll"
			if i%10 == 7 {
				runtime = "runc"
			}
			name := fmt.Sprintf("v-%d", i)
			begin := time.Now()
			if _, err := h.StartPod(ctx, withClaim(volumePod(name, runtime), name, i%10 == 3), rig.IsReady); err != nil {
				return nil, err
			}
			if err := errors.Join(h.DeletePods(ctx), h.Detached(ctx)); err != nil {
				return nil, err
			}
			took = append(took, rig.Milliseconds(time.Since(begin)))
			if (i+1)%20 == 0 {
				fmt.Fprintf(os.Stderr, "bench: %d of %d volumes attached\n", i+1, count)
			}
		}
		return took, h.DeleteClaims(ctx)
	}
	if _, err := cycle(0, 10); err != nil { // makes what is made once
		return nil, err
	}
	before, err := h.StateAtRest(ctx, rig.ClearTime)
	if err != nil {
		return nil, err
	}
	took, err := cycle(0, h.Options.Volumes)
	if err != nil {
		return nil, err
	}
	after, err := h.StateCleared(ctx, before)
	if err != nil {
		return nil, err
	}
	row, err := rig.Verdict(rig.Row{
		Measure: "volumes made, attached in turn and deleted", Unit: "volumes", Atoll: rig.Value{P50: float64(h.Options.Volumes)},
	}, before, after)
	return []rig.Row{row, rig.Compare("volume attached to a pod and detached again", "ms", took, nil)}, err
}
