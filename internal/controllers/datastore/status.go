package datastore

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

// maxVolumes bounds the list in the status.
const maxVolumes = 500

// Reasons of conditions.
const (
	reasonOpen       = "Open"
	reasonFailed     = "NotReachable"
	reasonDeleting   = "NotEmpty"
	reasonEnough     = "Enough"
	reasonNearlyFull = "NearlyFull"
	reasonFull       = "Full"
	reasonUnknown    = "Unknown"
)

// hold sets the finalizer.
func (c *Controller) hold(ctx context.Context, d *api.Datastore) error {
	if slices.Contains(d.Finalizers, Finalizer) {
		return nil
	}
	return c.setFinalizers(ctx, d, append(slices.Clone(d.Finalizers), Finalizer))
}

// release lets an empty Datastore go.
func (c *Controller) release(ctx context.Context, d *api.Datastore) error {
	c.forget(d.Name)
	if !slices.Contains(d.Finalizers, Finalizer) {
		return nil
	}
	return c.setFinalizers(ctx, d, slices.DeleteFunc(slices.Clone(d.Finalizers), func(f string) bool { return f == Finalizer }))
}

func (c *Controller) setFinalizers(ctx context.Context, d *api.Datastore, to []string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"finalizers": to, "resourceVersion": d.ResourceVersion}})
	if err != nil {
		return fmt.Errorf("encoding the finalizers of datastore %s: %w", d.Name, err)
	}
	_, err = c.client.Patch(ctx, d.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err := ignoreGone(err); err != nil {
		return fmt.Errorf("setting the finalizers of datastore %s: %w", d.Name, err)
	}
	return nil
}

// report writes the status if it says something new. This agent is the only one that writes it.
func (c *Controller) report(ctx context.Context, d *api.Datastore, s State) error {
	next := statusOf(d, s)
	if equality.Semantic.DeepEqual(d.Status, next) {
		return nil
	}
	// A merge would leave what is not there any more.
	patch, err := json.Marshal([]map[string]any{{"op": "add", "path": "/status", "value": next}})
	if err != nil {
		return fmt.Errorf("encoding the status of datastore %s: %w", d.Name, err)
	}
	if _, err := c.client.Patch(ctx, d.Name, types.JSONPatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		return fmt.Errorf("writing the status of datastore %s: %w", d.Name, err)
	}
	c.announce(d, next)
	return nil
}

// announce makes an event of each condition that has changed for the worse, or back.
func (c *Controller) announce(d *api.Datastore, next api.DatastoreStatus) {
	for _, now := range next.Conditions {
		before := meta.FindStatusCondition(d.Status.Conditions, now.Type)
		switch {
		case before == nil && now.Status == metav1.ConditionTrue, before != nil && before.Reason == now.Reason:
		case now.Status == metav1.ConditionTrue:
			c.events.Event(d, corev1.EventTypeNormal, now.Reason, now.Message)
		default:
			c.events.Event(d, corev1.EventTypeWarning, now.Reason, now.Message)
		}
	}
}

// statusOf is the status after a look. Numbers of a datastore that cannot be reached stay as they were.
func statusOf(d *api.Datastore, s State) api.DatastoreStatus {
	next := *d.Status.DeepCopy()
	next.Type = "directory"
	if d.Spec.RBD != nil {
		next.Type = "rbd"
	}
	ready := metav1.Condition{Type: api.DatastoreReady, Status: metav1.ConditionTrue, Reason: reasonOpen, Message: "volumes can be used"}
	space := metav1.Condition{Type: api.DatastoreSpace, Status: metav1.ConditionTrue, Reason: reasonEnough, Message: "there is room"}
	switch {
	case s.Err != nil:
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, reasonFailed, s.Err.Error()
		space.Status, space.Reason, space.Message = metav1.ConditionUnknown, reasonUnknown, "the datastore cannot be reached"
	case d.DeletionTimestamp != nil:
		ready.Status, ready.Reason = metav1.ConditionFalse, reasonDeleting
		ready.Message = fmt.Sprintf("cannot be deleted: %d volumes and %d snapshots are left", len(s.Volumes), s.Snapshots)
	}
	switch {
	case s.Err != nil:
	case s.Full:
		space.Status, space.Reason = metav1.ConditionFalse, reasonFull
		space.Message = fmt.Sprintf("more than %d%% are used: nothing is created, grown or snapshotted", d.Spec.RefusePercent)
	case s.NearlyFull:
		space.Status, space.Reason = metav1.ConditionFalse, reasonNearlyFull
		space.Message = fmt.Sprintf("more than %d%% are used; at %d%% nothing is created any more", d.Spec.WarnPercent, d.Spec.RefusePercent)
	}
	for _, condition := range []metav1.Condition{ready, space} {
		condition.ObservedGeneration = d.Generation
		condition.LastTransitionTime = metav1.NewTime(time.Now().Truncate(time.Second))
		meta.SetStatusCondition(&next.Conditions, condition)
	}
	if s.Err != nil {
		return next
	}
	next.ID = s.ID
	next.Capacity, next.Provisioned = bytesOf(s.Capacity), bytesOf(s.Provisioned)
	next.Free, next.Used = coarse(s.Free), coarse(s.Used)
	next.VolumeCount, next.SnapshotCount = int32(len(s.Volumes)), int32(s.Snapshots)
	next.Volumes = s.Volumes[:min(len(s.Volumes), maxVolumes)]
	return next
}

func bytesOf(n int64) resource.Quantity { return *resource.NewQuantity(n, resource.BinarySI) }

// coarse rounds what changes all the time to 16 MiB, so that a write somewhere is not a write to etcd.
func coarse(n int64) resource.Quantity { return bytesOf(n &^ (16<<20 - 1)) }
