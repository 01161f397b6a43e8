package pods

import (
	"context"
	"fmt"

	"atoll.dev/atoll/bench/rig"
)

// LeakCycles creates and deletes pods one after another and compares the host before and after.
func LeakCycles(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	cycle := func() error {
		s, _, err := h.StartCRI(ctx, "atoll")
		if err == nil {
			h.StopCRI(s)
		}
		return err
	}
	for range 5 {
		if err := cycle(); err != nil {
			return nil, err
		}
	}
	before, err := h.StateAtRest(ctx, 3*rig.SampleTime) // the kubelet stands still
	if err != nil {
		return nil, err
	}
	for i := range h.Options.Cycles {
		if err := cycle(); err != nil {
			return nil, fmt.Errorf("cycle %d: %w", i, err)
		}
	}
	after, err := h.StateCleared(ctx, before)
	if err != nil {
		return nil, err
	}
	row, err := rig.Verdict(rig.Row{Measure: "create/delete cycles", Unit: "cycles", Atoll: rig.Value{P50: float64(h.Options.Cycles)}}, before, after)
	return []rig.Row{row}, err
}
