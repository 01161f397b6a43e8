package machines

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/bench/rig"
)

// Snapshot snapshots an idle machine of 1 GiB with its memory, and measures how long its guest does not answer.
func Snapshot(ctx context.Context, m *Machines) ([]rig.Row, error) {
	const name = "pause"
	if err := m.boot(ctx, m.machine(name, tinyImage, gibClass)); err != nil {
		return nil, err
	}
	vm := m.machine(name, "", "")
	address, err := m.address(ctx, vm)
	if err != nil {
		return nil, err
	}
	if err := answers80(ctx, address); err != nil {
		return nil, err
	}
	time.Sleep(machineIdles)
	var pauses, gaps, took, quiet []float64
	for i := range 5 {
		gap, err := longestGap(ctx, address, func() error { time.Sleep(5 * time.Second); return nil })
		if err != nil {
			return nil, err
		}
		quiet = append(quiet, gap)
		var pause float64
		begin := time.Now()
		gap, err = longestGap(ctx, address, func() (err error) { pause, err = m.snapshot(ctx, name, i); return err })
		if err != nil {
			return nil, err
		}
		gaps, pauses, took = append(gaps, gap), append(pauses, pause), append(took, rig.Milliseconds(time.Since(begin)))
	}
	seen := rig.Compare("snapshot with RAM of an idle 1 GiB VM, longest time without an answer", "ms", gaps, nil)
	seen.Note = fmt.Sprintf("the bar is 1000; without a snapshot the longest is %.0f", slices.Max(quiet))
	return []rig.Row{
		seen,
		rig.Compare("  the machine stood still", "ms", pauses, nil),
		rig.Compare("  created to ready", "ms", took, nil),
	}, nil
}

// snapshot takes one and returns for how many milliseconds the machine stood still.
func (m *Machines) snapshot(ctx context.Context, name string, i int) (float64, error) {
	snap := &vmopv1.VirtualMachineSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: rig.Namespace, Name: fmt.Sprintf("%s-%d", name, i)}}
	snap.Spec.VMName, snap.Spec.Memory = name, true
	// What was done is forgotten as soon as it is known, so it must be waited for from the beginning.
	type result struct {
		st  machinev1.State
		err error
	}
	taken := make(chan result, 1)
	watching := make(chan struct{})
	go func() {
		var before map[string]bool // operations that are not ours
		st, err := m.state(ctx, name, "the snapshot is taken", func(st machinev1.State) bool {
			if before == nil {
				before = map[string]bool{}
				for _, o := range st.Operations {
					before[o.ID] = true
				}
				close(watching)
			}
			return slices.ContainsFunc(st.Operations, func(o machinev1.OperationState) bool { return o.Done && !before[o.ID] })
		})
		taken <- result{st, err}
	}()
	select {
	case <-watching:
	case r := <-taken:
		return 0, r.err
	}
	if err := m.Create(ctx, snap); err != nil {
		return 0, fmt.Errorf("making snapshot %s: %w", snap.Name, err)
	}
	r := <-taken
	if r.err != nil {
		return 0, r.err
	}
	var pause float64
	for _, o := range r.st.Operations {
		switch {
		case !strings.Contains(o.ID, string(snap.UID)):
		case o.Error != "":
			return 0, fmt.Errorf("snapshot %s: %s", snap.Name, o.Error)
		default:
			pause = float64(o.PauseMillis)
		}
	}
	return pause, rig.Until(ctx, "snapshot "+snap.Name+" is ready", func() (bool, error) {
		err := m.Get(ctx, client.ObjectKeyFromObject(snap), snap)
		return slices.ContainsFunc(snap.Status.Conditions, func(c metav1.Condition) bool {
			return c.Type == vmopv1.VirtualMachineSnapshotReadyCondition && c.Status == metav1.ConditionTrue
		}), err
	})
}

// longestGap asks a guest's web server without a pause while something is done, and returns the longest time between two
// answers in milliseconds.
func longestGap(ctx context.Context, address string, do func() error) (float64, error) {
	c := http.Client{Timeout: time.Minute}
	defer c.CloseIdleConnections()
	done := make(chan error, 1)
	go func() { done <- do() }()
	longest, last := time.Duration(0), time.Now()
	for {
		select {
		case err := <-done:
			return rig.Milliseconds(longest), err
		case <-time.After(5 * time.Millisecond):
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/hostname", nil)
		if err != nil {
			return 0, err
		}
		resp, err := c.Do(req)
		if err != nil {
			return 0, errors.Join(err, <-done)
		}
		_ = resp.Body.Close()
		longest, last = max(longest, time.Since(last)), time.Now()
	}
}
