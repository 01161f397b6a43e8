package encryption

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	api "atoll.dev/atoll/api/encryption/v1alpha1"
)

// Reasons of conditions.
const (
	reasonUsable    = "KeyUsable"
	reasonUnusable  = "KeyNotUsable"
	reasonCurrent   = "AllCurrent"
	reasonRewrapped = "Rewrapping"
	reasonOldKey    = "OldKeyNeeded"
	reasonUnknown   = "Unknown"
	reasonUnseen    = "NotAllSeen"
)

// maxMessage bounds the message of a condition.
const maxMessage = 4096

// report writes the status if it says something new. Every host writes its own entry and what follows from
// all of them; who was overtaken does it again at the next look.
func (c *Controller) report(ctx context.Context, class *api.EncryptionClass, s State) error {
	before := class.Status
	next := statusOf(c.withoutGone(ctx, class), c.cfg.Node, s)
	if equality.Semantic.DeepEqual(before, next) {
		return nil
	}
	changed := class.DeepCopy()
	changed.Status = next
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(changed)
	if err != nil {
		return fmt.Errorf("encoding the status: %w", err)
	}
	written, err := c.client.Namespace(class.Namespace).UpdateStatus(ctx, &unstructured.Unstructured{Object: content}, metav1.UpdateOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case apierrors.IsConflict(err): // changed meanwhile, which is news that is on its way
		c.Touch()
		return nil
	case err != nil:
		return fmt.Errorf("writing the status: %w", err)
	}
	kind := class.TypeMeta
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(written.Object, class); err != nil {
		return fmt.Errorf("reading the status: %w", err)
	}
	class.TypeMeta = kind
	c.announce(class, before, next)
	return nil
}

// withoutGone returns a class without what hosts have said whose Nodes are gone: they will not come to it.
func (c *Controller) withoutGone(ctx context.Context, class *api.EncryptionClass) *api.EncryptionClass {
	out := class.DeepCopy()
	out.Status.Hosts = slices.DeleteFunc(out.Status.Hosts, func(h api.EncryptionClassHost) bool {
		return h.Node != "" && h.Node != c.cfg.Node && c.gone(ctx, h.Node)
	})
	return out
}

// gone tells whether there is no such Node. Nodes may be newer than what has been seen of them.
func (c *Controller) gone(ctx context.Context, node string) bool {
	if _, ok, err := c.nodes.GetStore().GetByKey(node); err != nil || ok {
		return false
	}
	_, err := c.node.Get(ctx, node, metav1.GetOptions{})
	return apierrors.IsNotFound(err)
}

// announce makes an event of each condition that has changed for the worse, or back.
func (c *Controller) announce(class *api.EncryptionClass, before, next api.EncryptionClassStatus) {
	for _, now := range next.Conditions {
		was := meta.FindStatusCondition(before.Conditions, now.Type)
		switch {
		case was == nil && now.Status == metav1.ConditionTrue, was != nil && was.Reason == now.Reason:
		case now.Status == metav1.ConditionTrue || now.Reason == reasonRewrapped || now.Reason == reasonUnseen:
			c.events.Event(class, corev1.EventTypeNormal, now.Reason, now.Message)
		default:
			c.events.Event(class, corev1.EventTypeWarning, now.Reason, now.Message)
		}
	}
}

// statusOf is the status after a look of one host.
func statusOf(class *api.EncryptionClass, node string, s State) api.EncryptionClassStatus {
	next := *class.Status.DeepCopy()
	entry := api.EncryptionClassHost{
		Node: node, Volumes: int32(s.Volumes), Current: int32(s.Current), ObservedGeneration: class.Generation,
		KeyProvider: s.Provider, KeyID: s.KeyID, Fingerprint: s.Fingerprint, KeyProblem: text(s.KeyErr), VolumeProblem: text(s.VolumeErr),
		Unseen: text(s.Unseen),
	}
	next.Hosts = slices.DeleteFunc(next.Hosts, func(h api.EncryptionClassHost) bool { return h.Node == node })
	next.Hosts = append(next.Hosts, entry)
	slices.SortFunc(next.Hosts, func(a, b api.EncryptionClassHost) int { return strings.Compare(a.Node, b.Node) })
	next.Volumes, next.Current = 0, 0
	for _, h := range next.Hosts {
		next.Volumes += h.Volumes
		next.Current += h.Current
	}
	next.KeyProvider, next.KeyID = s.Provider, s.KeyID
	for _, condition := range []metav1.Condition{ready(next), keysCurrent(class, next)} {
		condition.ObservedGeneration = class.Generation
		condition.LastTransitionTime = metav1.NewTime(time.Now().Truncate(time.Second))
		condition.Message = condition.Message[:min(len(condition.Message), maxMessage)]
		meta.SetStatusCondition(&next.Conditions, condition)
	}
	return next
}

// ready says whether the key can be used.
func ready(s api.EncryptionClassStatus) metav1.Condition {
	for _, h := range s.Hosts {
		if h.KeyProblem != "" {
			return metav1.Condition{Type: api.ClassReady, Status: metav1.ConditionFalse, Reason: reasonUnusable, Message: h.KeyProblem}
		}
	}
	return metav1.Condition{
		Type: api.ClassReady, Status: metav1.ConditionTrue, Reason: reasonUsable,
		Message: fmt.Sprintf("key %q of provider %q wraps the keys of volumes", s.KeyID, s.KeyProvider),
	}
}

// keysCurrent says whether older keys are needed no more.
func keysCurrent(class *api.EncryptionClass, s api.EncryptionClassStatus) metav1.Condition {
	out := metav1.Condition{Type: api.ClassKeysCurrent, Status: metav1.ConditionFalse}
	count := fmt.Sprintf("%d of %d volumes and snapshots have their keys wrapped with the current key", s.Current, s.Volumes)
	for _, h := range s.Hosts {
		switch {
		case h.KeyProblem != "":
			out.Status, out.Reason, out.Message = metav1.ConditionUnknown, reasonUnknown, "the key cannot be used"
			return out
		case h.VolumeProblem != "":
			out.Reason, out.Message = reasonOldKey, count+"; "+h.VolumeProblem
			return out
		}
	}
	for _, h := range s.Hosts {
		switch {
		case h.Unseen != "":
			out.Status, out.Reason = metav1.ConditionUnknown, reasonUnseen
			out.Message = fmt.Sprintf("%s, but host %s could not look at all there are; keep all older keys: %s", count, h.Node, h.Unseen)
			return out
		case h.ObservedGeneration != class.Generation || h.Fingerprint != s.Hosts[0].Fingerprint || h.KeyProvider != s.Hosts[0].KeyProvider:
			out.Reason, out.Message = reasonRewrapped, fmt.Sprintf("%s; host %s has not come to it", count, h.Node)
			return out
		}
	}
	if s.Current < s.Volumes {
		out.Reason, out.Message = reasonRewrapped, count+"; older keys are still needed"
		return out
	}
	out.Status, out.Reason, out.Message = metav1.ConditionTrue, reasonCurrent, count+"; older keys are not needed for them any more"
	return out
}

func text(err error) string {
	if err == nil {
		return ""
	}
	s := strings.ReplaceAll(err.Error(), "\n", "; ")
	return s[:min(len(s), maxMessage/2)]
}
