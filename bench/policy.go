package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/lease"
)

// policyEngine measures changes and throughput with many policies, in network namespaces of its own.
func policyEngine(ctx context.Context, _ *host) ([]Row, error) {
	l, err := newPolicyLab()
	if err != nil {
		return nil, err
	}
	rows, err := l.measure(ctx)
	return rows, errors.Join(err, l.close())
}

func (l *policyLab) measure(ctx context.Context) ([]Row, error) {
	many := l.state
	none := &policyv1.State{Pods: map[netip.Addr]*policyv1.Pod{}}
	for a, p := range many.Pods {
		open := *p
		open.Policies = nil
		none.Pods[a] = &open
	}
	// A port that one of the policies of the receiver allows the sender.
	port, err := l.openPort(many)
	if err != nil {
		return nil, err
	}
	var without, with []float64
	for range 5 {
		for state, samples := range map[*policyv1.State]*[]float64{none: &without, many: &with} {
			if err := l.apply(ctx, state); err != nil {
				return nil, err
			}
			gbits, err := l.throughput(port, 2*time.Second)
			if err != nil {
				return nil, err
			}
			*samples = append(*samples, gbits)
		}
	}
	row := versus(fmt.Sprintf("pod to pod TCP with %d policies", labPolicies), "Gbit/s", with, "none", without)
	row.Note = "network namespaces as pods"
	began := time.Now()
	if err := l.apply(ctx, none); err != nil {
		return nil, err
	}
	if err := l.apply(ctx, many); err != nil {
		return nil, err
	}
	whole := compare(fmt.Sprintf("%d policies over %d pods, from nothing", labPolicies, labPods), "ms", []float64{milliseconds(time.Since(began))}, nil)
	var changes []float64
	for i := range 60 {
		took, err := l.change(ctx, i)
		if err != nil {
			return nil, err
		}
		changes = append(changes, milliseconds(took))
	}
	changed := compare(fmt.Sprintf("change of one of %d policies over %d pods until enforced", labPolicies, labPods), "ms", changes, nil)
	changed.Note = "engine; goal: p95 <= 1000"
	return []Row{row, whole, changed}, nil
}

// openPort finds a port of the receiver that the sender may use.
func (l *policyLab) openPort(s *policyv1.State) (int, error) {
	for _, id := range s.Pods[l.to.address].Policies {
		r := s.Policies[id].Ingress.Rules[0]
		if slices.Contains(s.Sets[r.Peers[0]].Addresses, l.from.address) {
			return int(r.Ports[0].First), nil
		}
	}
	return 0, errors.New("no policy allows the two pods to talk")
}

// change alters one thing and returns how long it took until traffic shows it: whether the sender may use a port that
// nobody else may.
func (l *policyLab) change(ctx context.Context, i int) (time.Duration, error) {
	const port = 999
	id := l.state.Pods[l.to.address].Policies[0]
	old := l.state.Policies[id]
	next := *l.state
	next.Policies = maps.Clone(l.state.Policies)
	p := &policyv1.Policy{ID: id, Tier: old.Tier, Egress: old.Egress, Ingress: &policyv1.Direction{Rules: slices.Clone(old.Ingress.Rules[:2])}}
	open := i%2 == 0
	if open {
		p.Ingress.Rules = append(p.Ingress.Rules, policyv1.Rule{
			Blocks: []policyv1.Block{{CIDR: netip.PrefixFrom(l.from.address, 32)}}, Ports: []policyv1.PortRange{{Protocol: policyv1.UDP, First: port, Last: port}},
		})
	}
	next.Policies[id] = p
	server, err := listenPacket(l.to, port)
	if err != nil {
		return 0, err
	}
	defer server.Close()
	began := time.Now()
	applied := make(chan error, 1)
	go func() { applied <- l.apply(ctx, &next) }()
	// Each datagram is a connection of its own: the state of the one before must not help it.
	for time.Since(began) < 10*time.Second {
		passed, err := l.probe(server, port)
		if err != nil {
			return 0, err
		}
		if passed == open {
			return time.Since(began), <-applied
		}
	}
	return 0, errors.Join(<-applied, fmt.Errorf("the change was not enforced within ten seconds"))
}

func listenPacket(end *labEnd, port int) (c net.PacketConn, err error) {
	err = netns.Do(end.netns, func() error {
		c, err = net.ListenPacket("udp4", fmt.Sprintf("%s:%d", end.address, port))
		return err
	})
	return c, err
}

// probe sends a datagram and tells whether it came.
func (l *policyLab) probe(server net.PacketConn, port int) (bool, error) {
	err := netns.Do(l.from.netns, func() error {
		c, err := net.Dial("udp4", fmt.Sprintf("%s:%d", l.to.address, port))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("?"))
		return err
	})
	if err != nil {
		return false, err
	}
	if err := server.SetReadDeadline(time.Now().Add(5 * time.Millisecond)); err != nil {
		return false, err
	}
	_, _, err = server.ReadFrom(make([]byte, 8))
	return err == nil, nil
}

// policyChanges measures a change of a policy through the API until traffic between two pods shows it.
func policyChanges(ctx context.Context, h *host) ([]Row, error) {
	const others = 100
	server, err := h.tool(ctx, "policy-server", "atoll", "iperf3", "-s")
	if err != nil {
		return nil, err
	}
	policies := h.kube.NetworkingV1().NetworkPolicies(benchNamespace)
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
	client, err := h.tool(ctx, "policy-client", "runc", "sleep", "100000")
	if err != nil {
		return nil, err
	}
	samples, err := h.toggle(ctx, client, server)
	row := compare(fmt.Sprintf("change of a NetworkPolicy through the API, beside %d others, until enforced", others), "ms", samples, nil)
	row.Note = "goal: p95 <= 1000"
	deleted := policies.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
	return []Row{row}, errors.Join(err, deleted, h.deletePods(ctx))
}

// toggle allows and denies a port, watching it from the client's network namespace.
func (h *host) toggle(ctx context.Context, client, server *corev1.Pod) ([]float64, error) {
	path, err := h.netnsOf(client)
	if err != nil {
		return nil, err
	}
	policies := h.kube.NetworkingV1().NetworkPolicies(benchNamespace)
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
		samples = append(samples, milliseconds(time.Since(began)))
	}
	return samples, nil
}

// netnsOf is the network namespace of a pod of this host.
func (h *host) netnsOf(pod *corev1.Pod) (string, error) {
	tree, err := datadir.New(h.o.dataDir)
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
