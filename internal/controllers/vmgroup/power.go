package vmgroup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/controllers/condition"
)

// powerAnnotation of a group is a handed as JSON.
const powerAnnotation = "atoll.dev/group-power"

// handed is which power state was handed over, and to whom.
type handed struct {
	State vmopv1.VirtualMachinePowerState `json:"state"`
	// Force is the group's spec.nextForcePowerStateSyncTime.
	Force string      `json:"force,omitempty"`
	At    time.Time   `json:"at"`
	Done  []types.UID `json:"done,omitempty"`
}

// power hands the group's power state to members whose time has come, and returns when the next one's comes.
func (r *Reconciler) power(ctx context.Context, g *vmopv1.VirtualMachineGroup, list []member) (time.Duration, error) {
	kind := vmopv1.VirtualMachineGroupMemberConditionPowerStateSynced
	if g.Spec.PowerState == "" {
		for i := range list {
			condition.Remove(&list[i].status.Conditions, kind)
		}
		return 0, nil
	}
	now := r.Now()
	if strings.EqualFold(g.Spec.NextForcePowerStateSyncTime, "now") {
		base := g.DeepCopy()
		changed := g.DeepCopy()
		changed.Spec.NextForcePowerStateSyncTime = now.UTC().Format(time.RFC3339Nano)
		if err := r.Patch(ctx, changed, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
			return 0, fmt.Errorf("noting the time: %w", err)
		}
		g.Spec, g.ResourceVersion = changed.Spec, changed.ResourceVersion
	}
	var h handed
	if err := json.Unmarshal([]byte(g.Annotations[powerAnnotation]), &h); err != nil || h.State != g.Spec.PowerState || h.Force != g.Spec.NextForcePowerStateSyncTime {
		h = handed{State: g.Spec.PowerState, Force: g.Spec.NextForcePowerStateSyncTime, At: now.UTC().Truncate(time.Second)}
		// Written first: the delays count from the same moment even when this process ends now.
		if err := r.remember(ctx, g, h); err != nil {
			return 0, err
		}
	}
	g.Status.LastUpdatedPowerStateTime = new(metav1.NewTime(h.At))
	var next time.Duration
	var failed error
	done := slices.Clone(h.Done)
	for i := range list {
		m := &list[i]
		if !m.linked {
			continue
		}
		if !slices.Contains(done, m.status.UID) {
			at := h.At
			if h.State == vmopv1.VirtualMachinePowerStateOn {
				at = at.Add(m.delay)
			}
			if left := at.Sub(now); left > 0 {
				if next == 0 || left < next {
					next = left
				}
				condition.False(&m.status.Conditions, kind, reasonPending, "it is to be %s at %s", h.State, at.Format(time.RFC3339))
				continue
			}
			if err := r.hand(ctx, g, m); err != nil {
				condition.False(&m.status.Conditions, kind, reasonPatchPower, "%s", err)
				failed = errors.Join(failed, err)
				continue
			}
			done = append(done, m.status.UID)
		}
		synced(m, h.State)
	}
	done = slices.DeleteFunc(done, func(uid types.UID) bool {
		return !slices.ContainsFunc(list, func(m member) bool { return m.linked && m.status.UID == uid })
	})
	if !slices.Equal(done, h.Done) {
		h.Done = done
		failed = errors.Join(failed, r.remember(ctx, g, h))
	}
	return next, failed
}

// synced tells whether a member is as the group wants it.
func synced(m *member, want vmopv1.VirtualMachinePowerState) {
	kind := vmopv1.VirtualMachineGroupMemberConditionPowerStateSynced
	vm, ok := m.object.(*vmopv1.VirtualMachine)
	switch {
	case !ok: // a group says by its own condition how its members are
		condition.Remove(&m.status.Conditions, kind)
	case vm.Status.PowerState == want:
		condition.True(&m.status.Conditions, kind)
	case vm.Spec.PowerState != want:
		condition.False(&m.status.Conditions, kind, reasonNotSynced, "its own spec.powerState was set to %s later; set spec.nextForcePowerStateSyncTime of the group to \"now\" to change it", vm.Spec.PowerState)
	default:
		condition.False(&m.status.Conditions, kind, reasonNotSynced, "it is to become %s and is %s", want, or(string(vm.Status.PowerState), "not made yet"))
	}
}

func or(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}

// hand gives the group's power state to a member.
func (r *Reconciler) hand(ctx context.Context, g *vmopv1.VirtualMachineGroup, m *member) error {
	base := m.object.DeepCopyObject().(client.Object)
	state := g.Spec.PowerState
	switch o := m.object.(type) {
	case *vmopv1.VirtualMachine:
		o.Spec.PowerState = state
		if state == vmopv1.VirtualMachinePowerStateOff && g.Spec.PowerOffMode != "" {
			o.Spec.PowerOffMode = g.Spec.PowerOffMode
		}
		if state == vmopv1.VirtualMachinePowerStateSuspended && g.Spec.SuspendMode != "" {
			o.Spec.SuspendMode = g.Spec.SuspendMode
		}
	case *vmopv1.VirtualMachineGroup:
		o.Spec.PowerState = state
		if g.Spec.PowerOffMode != "" {
			o.Spec.PowerOffMode = g.Spec.PowerOffMode
		}
		if g.Spec.SuspendMode != "" {
			o.Spec.SuspendMode = g.Spec.SuspendMode
		}
		o.Spec.NextForcePowerStateSyncTime = g.Spec.NextForcePowerStateSyncTime
	}
	if err := r.Patch(ctx, m.object, client.MergeFrom(base)); err != nil {
		return fmt.Errorf("changing the power state of %s: %w", m.name, err)
	}
	return nil
}

// remember writes down what was handed over.
func (r *Reconciler) remember(ctx context.Context, g *vmopv1.VirtualMachineGroup, h handed) error {
	text, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("noting the power state: %w", err)
	}
	// The status is not written yet and must stay as it is here.
	base := g.DeepCopy()
	changed := g.DeepCopy()
	metav1.SetMetaDataAnnotation(&changed.ObjectMeta, powerAnnotation, string(text))
	if err := r.Patch(ctx, changed, client.MergeFrom(base)); err != nil {
		return fmt.Errorf("noting the power state: %w", err)
	}
	g.Annotations, g.ResourceVersion = changed.Annotations, changed.ResourceVersion
	return nil
}
