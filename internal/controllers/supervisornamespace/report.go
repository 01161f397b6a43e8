package supervisornamespace

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/usage"
)

// report writes into the status what is used and whether that is within the limits.
func (r *Reconciler) report(ctx context.Context, sn *atoll.SupervisorNamespace) error {
	in := usage.Input{Name: sn.Name, Spec: sn.EffectiveSpec()}
	var pods corev1.PodList
	if err := r.List(ctx, &pods, client.InNamespace(sn.Name)); err != nil {
		return fmt.Errorf("listing pods: %w", err)
	}
	var claims corev1.PersistentVolumeClaimList
	if err := r.Shared.List(ctx, &claims, client.InNamespace(sn.Name)); err != nil {
		return fmt.Errorf("listing PersistentVolumeClaims: %w", err)
	}
	var quotas corev1.ResourceQuotaList
	if err := r.Shared.List(ctx, &quotas, client.InNamespace(sn.Name), client.MatchingLabels{atoll.SupervisorNamespaceLabel: sn.Name}); err != nil {
		return fmt.Errorf("listing ResourceQuotas: %w", err)
	}
	in.Pods, in.Claims, in.Quotas = pods.Items, claims.Items, quotas.Items
	if r.Registry != nil {
		// A registry that cannot say is not what a namespace waits for; its own health is shown elsewhere.
		if bytes, err := r.Registry.Usage(ctx, sn.Name); err == nil {
			in.Registry = &bytes
		}
	}
	report := usage.Of(in)
	sn.Status.CPU, sn.Status.Memory, sn.Status.Storage = report.CPU, report.Memory, report.Storage
	sn.Status.Usage, sn.Status.Top = report.Usage, report.Top
	condition := metav1.Condition{Type: atoll.NamespaceWithinLimits, Status: metav1.ConditionTrue, Reason: "WithinLimits", ObservedGeneration: sn.Generation}
	if len(report.Over) > 0 {
		condition.Status, condition.Reason = metav1.ConditionFalse, "OverLimit"
		condition.Message = strings.Join(report.Over, "; ") + ". Nothing is evicted; nothing more can be made until less is used or the limit is raised"
	}
	meta.SetStatusCondition(&sn.Status.Conditions, condition)
	return r.reservations(ctx, sn)
}

// reservations says whether the hosts have what is reserved here and elsewhere.
func (r *Reconciler) reservations(ctx context.Context, sn *atoll.SupervisorNamespace) error {
	if res := sn.EffectiveSpec().Resources; res.CPUReservation == nil && res.MemoryReservation == nil {
		meta.RemoveStatusCondition(&sn.Status.Conditions, atoll.NamespaceReservationsMet)
		return nil
	}
	capacity := usage.Capacity{Allocatable: corev1.ResourceList{}, Reserved: map[string]corev1.ResourceList{}, Requested: map[string]corev1.ResourceList{}}
	var nodes corev1.NodeList
	if err := r.Shared.List(ctx, &nodes); err != nil {
		return fmt.Errorf("listing hosts: %w", err)
	}
	for i := range nodes.Items {
		if ready(&nodes.Items[i]) {
			add(capacity.Allocatable, nodes.Items[i].Status.Allocatable)
		}
	}
	var all atoll.SupervisorNamespaceList
	if err := r.List(ctx, &all); err != nil {
		return fmt.Errorf("listing SupervisorNamespaces: %w", err)
	}
	for i := range all.Items {
		spec := all.Items[i].EffectiveSpec().Resources
		if all.Items[i].Name == sn.Name {
			spec = sn.EffectiveSpec().Resources
		}
		list := corev1.ResourceList{}
		if spec.CPUReservation != nil {
			list[corev1.ResourceCPU] = *spec.CPUReservation
		}
		if spec.MemoryReservation != nil {
			list[corev1.ResourceMemory] = *spec.MemoryReservation
		}
		capacity.Reserved[all.Items[i].Name] = list
	}
	var pods corev1.PodList
	if err := r.List(ctx, &pods); err != nil {
		return fmt.Errorf("listing pods: %w", err)
	}
	for i := range pods.Items {
		list := capacity.Requested[pods.Items[i].Namespace]
		if list == nil {
			list = corev1.ResourceList{}
			capacity.Requested[pods.Items[i].Namespace] = list
		}
		add(list, usage.Requests(&pods.Items[i]))
	}
	condition := metav1.Condition{Type: atoll.NamespaceReservationsMet, Status: metav1.ConditionTrue, Reason: "Reserved", ObservedGeneration: sn.Generation}
	if missing := capacity.Missing(); len(missing) > 0 {
		condition.Status, condition.Reason = metav1.ConditionFalse, "InsufficientCapacity"
		condition.Message = strings.Join(missing, "; ") + ". Add a host, or lower a reservation"
	}
	meta.SetStatusCondition(&sn.Status.Conditions, condition)
	return nil
}

func add(sum, more corev1.ResourceList) {
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		total := sum[name]
		total.Add(more[name])
		sum[name] = total
	}
}

func ready(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
