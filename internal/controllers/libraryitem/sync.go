package libraryitem

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

// sync does what one item needs, and tells when to look at it again, 0 being when it changes.
func (c *Controller) sync(ctx context.Context, k key) (time.Duration, error) {
	item, err := c.get(k)
	if err != nil || item == nil || item.DeletionTimestamp != nil {
		return 0, err
	}
	switch {
	case item.Spec.Source == nil:
		return 0, c.report(ctx, k, item, refused(item, api.ItemSourceBad,
			"spec.source is missing; set one of http, oci and upload, or use `atoll image import`"))
	case item.Status.Host == "":
		if !c.cfg.Host.Takes(item) {
			return pollUpload, nil
		}
		status := started(item)
		status.Host = c.cfg.Node
		if err := c.report(ctx, k, item, status); err != nil {
			if apierrors.IsConflict(err) || apierrors.IsInvalid(err) { // another host was faster, or the item has changed
				return 0, nil
			}
			return 0, err
		}
		return 0, nil // the informer brings it again
	case item.Status.Host != c.cfg.Node:
		return 0, nil
	case item.Status.Ready && item.Status.ObservedGeneration == item.Generation:
		return 0, nil
	case failed(item):
		return 0, nil
	}
	return c.bring(ctx, k, item)
}

// failed tells whether an item was given up as it is now.
func failed(item *api.ContentLibraryItem) bool {
	ready := meta.FindStatusCondition(item.Status.Conditions, api.ReadyCondition)
	if ready == nil || ready.ObservedGeneration != item.Generation {
		return false
	}
	return slices.Contains([]string{api.ItemChecksum, api.ItemSourceBad, api.ItemContentBad, api.ItemPushRefused}, ready.Reason)
}

// bring brings in the content.
func (c *Controller) bring(ctx context.Context, k key, item *api.ContentLibraryItem) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.mu.Lock()
	c.running[k] = cancel
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.running, k)
	}()
	var last time.Time
	var phase string
	content, err := c.cfg.Host.Bring(ctx, item, k.namespace != "", func(p api.ItemProgress) {
		if p.Phase == phase && time.Since(last) < tellEvery {
			return
		}
		last, phase = time.Now(), p.Phase
		if p.BytesTotal > 0 {
			p.Percent = int32(min(100, p.BytesDone*100/p.BytesTotal))
		}
		if err := c.report(ctx, k, item, under(item, p)); err != nil && ctx.Err() == nil {
			c.cfg.Logger.Warn("writing the progress of a library item", "item", k.String(), "error", err)
		}
	})
	var permanent Permanent
	switch {
	case ctx.Err() != nil:
		c.sweepSoon() // it may have gone meanwhile
		return 0, nil
	case err == nil:
		return 0, c.report(ctx, k, item, finished(item, content))
	case errors.Is(err, ErrWaiting):
		return pollUpload, c.report(ctx, k, item, refused(item, api.ItemUploading, err.Error()))
	case errors.As(err, &permanent):
		return 0, c.report(ctx, k, item, refused(item, permanent.Reason, err.Error()))
	}
	return 0, errors.Join(err, c.report(ctx, k, item, refused(item, api.ItemRetrying, "another attempt follows: "+err.Error())))
}

// started is the status of an item that this host takes.
func started(item *api.ContentLibraryItem) api.ContentLibraryItemStatus {
	next := *item.Status.DeepCopy()
	next.ContentLibraryRef = &api.NameAndKindRef{Kind: "ContentLibrary", Name: item.Spec.Library}
	if item.Namespace == "" {
		next.ContentLibraryRef.Kind = "ClusterContentLibrary"
	}
	next.Name = item.Spec.Name
	if next.Name == "" {
		next.Name = item.Name
	}
	next.Description = &item.Spec.Description
	next.CreationTime = item.CreationTimestamp.UTC().Format(time.RFC3339)
	next.ObservedGeneration = item.Generation
	return next
}

// under is the status of an item that is under way.
func under(item *api.ContentLibraryItem, p api.ItemProgress) api.ContentLibraryItemStatus {
	next := started(item)
	next.Progress, next.Ready, next.Cached = &p, false, false
	text := fmt.Sprintf("%d bytes", p.BytesDone)
	if p.BytesTotal > 0 {
		text = fmt.Sprintf("%d of %d bytes", p.BytesDone, p.BytesTotal)
	}
	ready(&next, item, metav1.ConditionFalse, p.Phase, text)
	return next
}

// refused is the status of an item that does not go on.
func refused(item *api.ContentLibraryItem, reason, message string) api.ContentLibraryItemStatus {
	next := started(item)
	next.Ready, next.Cached = false, false
	if reason != api.ItemUploading && reason != api.ItemRetrying {
		next.Progress = nil
	}
	if len(message) > 2000 {
		message = message[:2000] + "..."
	}
	ready(&next, item, metav1.ConditionFalse, reason, message)
	return next
}

// finished is the status of an item that is complete.
func finished(item *api.ContentLibraryItem, content Content) api.ContentLibraryItemStatus {
	next := started(item)
	next.Progress, next.Ready, next.Cached = nil, true, true
	next.Type, next.ContentVersion, next.MetadataVersion = content.Type, content.SHA256, fmt.Sprint(item.Generation)
	next.SizeInBytes = *resource.NewQuantity(content.Bytes, resource.BinarySI)
	next.FileInfo = []api.FileInfo{{Name: content.FileName, SizeInBytes: next.SizeInBytes, Cached: true}}
	next.Disks, next.Hardware, next.Digest = content.Disks, content.Hardware, content.Digest
	if next.LastModifiedTime == "" {
		next.LastModifiedTime = time.Now().UTC().Format(time.RFC3339)
	}
	ready(&next, item, metav1.ConditionTrue, api.ItemReady, "")
	return next
}

func ready(next *api.ContentLibraryItemStatus, item *api.ContentLibraryItem, status metav1.ConditionStatus, reason, message string) {
	meta.SetStatusCondition(&next.Conditions, metav1.Condition{
		Type: api.ReadyCondition, Status: status, Reason: reason, Message: message, ObservedGeneration: item.Generation,
		LastTransitionTime: metav1.NewTime(time.Now().Truncate(time.Second)),
	})
}

// report writes the status if it says something new. Only who takes an item writes it against others.
func (c *Controller) report(ctx context.Context, k key, item *api.ContentLibraryItem, next api.ContentLibraryItemStatus) error {
	if equality.Semantic.DeepEqual(item.Status, next) {
		return nil
	}
	ops := []map[string]any{{"op": "add", "path": "/status", "value": next}}
	if item.Status.Host == "" {
		ops = append([]map[string]any{{"op": "test", "path": "/metadata/resourceVersion", "value": item.ResourceVersion}}, ops...)
	}
	patch, err := json.Marshal(ops)
	if err != nil {
		return fmt.Errorf("encoding the status of item %s: %w", k, err)
	}
	var target dynamic.ResourceInterface = c.client.Resource(k.resource())
	if k.namespace != "" {
		target = c.client.Resource(k.resource()).Namespace(k.namespace)
	}
	if _, err := target.Patch(ctx, k.name, types.JSONPatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("writing the status of item %s: %w", k, err)
	}
	c.announce(item, next)
	item.Status = next
	return nil
}

// announce makes an event when the condition has a new reason that somebody wants to know of.
func (c *Controller) announce(item *api.ContentLibraryItem, next api.ContentLibraryItemStatus) {
	now := meta.FindStatusCondition(next.Conditions, api.ReadyCondition)
	before := meta.FindStatusCondition(item.Status.Conditions, api.ReadyCondition)
	if now == nil || before != nil && before.Reason == now.Reason {
		return
	}
	switch now.Reason {
	case api.ItemReady:
		c.events.Event(item, corev1.EventTypeNormal, now.Reason, "the image is complete")
	case api.ItemChecksum, api.ItemSourceBad, api.ItemContentBad, api.ItemPushRefused, api.ItemRetrying:
		c.events.Event(item, corev1.EventTypeWarning, now.Reason, now.Message)
	}
}
