package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// volumeLeak makes many volumes, attaches them one after another, deletes them, and compares the host before and
// after. Of ten, one is a block volume of a micro-VM and one is used by a pod of the host, which take loop devices,
// mounts and a storage daemon.
func volumeLeak(ctx context.Context, h *host) ([]Row, error) {
	cycle := func(first, count int) (took []float64, err error) {
		for i := first; i < first+count; i++ {
			if err := h.claim(ctx, fmt.Sprintf("v-%d", i), benchClass, 64, i%10 == 3); err != nil {
				return nil, err
			}
		}
		if err := h.bound(ctx); err != nil {
			return nil, err
		}
		for i := first; i < first+count; i++ {
			runtime := "atoll"
			if i%10 == 7 {
				runtime = "runc"
			}
			name := fmt.Sprintf("v-%d", i)
			begin := time.Now()
			if _, err := h.startPod(ctx, withClaim(volumePod(name, runtime), name, i%10 == 3), isReady); err != nil {
				return nil, err
			}
			if err := errors.Join(h.deletePods(ctx), h.detached(ctx)); err != nil {
				return nil, err
			}
			took = append(took, milliseconds(time.Since(begin)))
			if (i+1)%20 == 0 {
				fmt.Fprintf(os.Stderr, "bench: %d of %d volumes attached\n", i+1, count)
			}
		}
		return took, h.deleteClaims(ctx)
	}
	if _, err := cycle(0, 10); err != nil { // makes what is made once
		return nil, err
	}
	before, err := h.stateAtRest(ctx, clearTime)
	if err != nil {
		return nil, err
	}
	took, err := cycle(0, h.o.volumes)
	if err != nil {
		return nil, err
	}
	after, err := h.stateCleared(ctx, before)
	if err != nil {
		return nil, err
	}
	row, err := verdict(Row{
		Measure: "volumes made, attached in turn and deleted", Unit: "volumes", Atoll: Value{P50: float64(h.o.volumes)},
	}, before, after)
	return []Row{row, compare("volume attached to a pod and detached again", "ms", took, nil)}, err
}
