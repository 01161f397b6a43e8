package policies

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"atoll.dev/atoll/bench/rig"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/lease"
)

// Changes measures a change of a policy through the API until traffic between two pods shows it.
func Changes(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	const others = 100
	server, err := h.Tool(ctx, "policy-server", "atoll", "iperf3", "-s")
	if err != nil {
		return nil, err
	}
	policies := h.Kube.NetworkingV1().NetworkPolicies(rig.Namespace)
	all := metav1.LabelSelector{}
	for i := range others {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("other-%d", i)}, Spec: networkingv1.NetworkPolicySpec{
			PodSelector: all,
			Ingress: []networkingv1.NetworkPolicyIngressRule{{
				From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"n": fmt.Sprint(i)}}}},
				Ports: []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromInt32(int32(2000 + i)))}},
			}},
		}}
		if _, err := policies.Create(ctx, p, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
			return nil, err
		}
	}
	client, err := h.Tool(ctx, "policy-client", "runc", "sleep", "100000")
	if err != nil {
		return nil, err
	}
	samples, err := toggle(ctx, h, client, server)
	row := rig.Compare(fmt.Sprintf("change of a NetworkPolicy through the API, beside %d others, until enforced", others), "ms", samples, nil)
	row.Note = "goal: p95 <= 1000"
	deleted := policies.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
	return []rig.Row{row}, errors.Join(err, deleted, h.DeletePods(ctx))
}

// toggle allows and denies a port, watching it from the client's network namespace.
func toggle(ctx context.Context, h *rig.Host, client, server *corev1.Pod) ([]float64, error) {
	path, err := netnsOf(h, client)
	if err != nil {
		return nil, err
	}
	policies := h.Kube.NetworkingV1().NetworkPolicies(rig.Namespace)
	target := net.JoinHostPort(server.Status.PodIP, "5201")
	var samples []float64
	for i := range 20 {
		open := i%2 == 0
		began := time.Now()
		if open {
			_, err = policies.Create(ctx, &networkingv1.NetworkPolicy{
				ObjectMeta: metav1.ObjectMeta{Name: "toggle"},
				Spec:       networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{Ports: []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromInt32(5201))}}}}},
			}, metav1.CreateOptions{})
		} else {
			err = policies.Delete(ctx, "toggle", metav1.DeleteOptions{})
		}
		if err != nil {
			return samples, err
		}
		for time.Since(began) < 30*time.Second && dials(path, target) != open {
		}
		samples = append(samples, rig.Milliseconds(time.Since(began)))
	}
	return samples, nil
}

// netnsOf is the network namespace of a pod of this host.
func netnsOf(h *rig.Host, pod *corev1.Pod) (string, error) {
	tree, err := datadir.New(h.Options.DataDir)
	if err != nil {
		return "", err
	}
	store, err := lease.Open(tree.CNIState())
	if err != nil {
		return "", err
	}
	address, err := netip.ParseAddr(pod.Status.PodIP)
	if err != nil {
		return "", fmt.Errorf("address of pod %s: %w", pod.Name, err)
	}
	l, err := store.Holder(address)
	if err != nil {
		return "", err
	}
	return l.Netns, nil
}

// dials tells whether a connection from a network namespace comes about quickly.
func dials(path, target string) bool {
	return netns.Do(path, func() error {
		c, err := net.DialTimeout("tcp4", target, 50*time.Millisecond)
		if err != nil {
			return err
		}
		return c.Close()
	}) == nil
}
