// Package early has the boot disk of a virtual machine made before its pod is there.
//
// Storage classes of Atoll wait for a pod, so that the scheduler chooses a host with room for both. Where there is one
// host only there is nothing to choose, and upstream's scheduler looks once a second whether a disk is there: half of
// what a virtual machine takes to start. So the claim says the host from the beginning, as the scheduler would have,
// and the pod is made when the disk is there, or a little later without it: then all goes on as with several hosts.
//
// The controller of VirtualMachines calls it. What can go wrong: nothing more than without it. A disk that cannot be
// made is an event on its claim, and the scheduler asks again when the pod is there. A machine that its only host can
// never take has a disk there nevertheless, which goes with the machine.
package early

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/volume"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// most is how long a pod waits for its disk.
const most = 3 * time.Second

// Place names the host in a claim that is not made yet, if there is only one and it takes new machines.
func Place(ctx context.Context, c client.Reader, claim *corev1.PersistentVolumeClaim) error {
	var nodes corev1.NodeList
	if err := c.List(ctx, &nodes); err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	if len(nodes.Items) == 1 && takes(&nodes.Items[0]) {
		metav1.SetMetaDataAnnotation(&claim.ObjectMeta, volume.AnnSelectedNode, nodes.Items[0].Name)
	}
	return nil
}

// takes tells whether new pods are started on a node.
func takes(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue && !n.Spec.Unschedulable
		}
	}
	return false
}

// Wait is how much longer the pod should wait for the disk of a claim, 0 if it should not.
func Wait(claim *corev1.PersistentVolumeClaim, now time.Time) time.Duration {
	if claim.Annotations[volume.AnnSelectedNode] == "" || claim.Status.Phase == corev1.ClaimBound {
		return 0
	}
	return max(0, claim.CreationTimestamp.Add(most).Sub(now))
}
