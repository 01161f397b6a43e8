// Package policies measures network policies: how fast the engine enforces a thousand and what they cost traffic, in
// network namespaces of its own, and how fast a change through the API shows between two pods.
//
// The bench calls each exported function as one part. Engine uses nothing of the running supervisor and needs root only.
// What is timed is what traffic sees: a change that is not enforced in ten seconds is an error of Engine, while Changes
// counts one that takes longer than thirty as thirty.
package policies

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/bench/rig"
	"atoll.dev/atoll/internal/linux/netns"
)

// Engine measures changes and throughput with many policies, in network namespaces of its own.
func Engine(ctx context.Context, _ *rig.Host) ([]rig.Row, error) {
	l, err := newLab()
	if err != nil {
		return nil, err
	}
	rows, err := l.measure(ctx)
	return rows, errors.Join(err, l.close())
}

func (l *lab) measure(ctx context.Context) ([]rig.Row, error) {
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
	for range 10 {
		for state, samples := range map[*policyv1.State]*[]float64{none: &without, many: &with} {
			if err := l.apply(ctx, state); err != nil {
				return nil, err
			}
			gbits, err := l.throughput(port, time.Second)
			if err != nil {
				return nil, err
			}
			*samples = append(*samples, gbits)
		}
	}
	row := rig.Versus(fmt.Sprintf("pod to pod TCP with %d policies", labPolicies), "Gbit/s", with, "none", without)
	row.Note = "network namespaces as pods"
	began := time.Now()
	if err := l.apply(ctx, none); err != nil {
		return nil, err
	}
	if err := l.apply(ctx, many); err != nil {
		return nil, err
	}
	whole := rig.Compare(fmt.Sprintf("%d policies over %d pods, from nothing", labPolicies, labPods), "ms", []float64{rig.Milliseconds(time.Since(began))}, nil)
	var changes []float64
	for i := range 60 {
		took, err := l.change(ctx, i)
		if err != nil {
			return nil, err
		}
		changes = append(changes, rig.Milliseconds(took))
	}
	changed := rig.Compare(fmt.Sprintf("change of one of %d policies over %d pods until enforced", labPolicies, labPods), "ms", changes, nil)
	changed.Note = "engine; goal: p95 <= 1000"
	return []rig.Row{row, whole, changed}, nil
}

// openPort finds a port of the receiver that the sender may use.
func (l *lab) openPort(s *policyv1.State) (int, error) {
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
func (l *lab) change(ctx context.Context, i int) (time.Duration, error) {
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
func (l *lab) probe(server net.PacketConn, port int) (bool, error) {
	err := netns.Do(l.from.netns, func() error {
		c, err := net.Dial("udp4", netip.AddrPortFrom(l.to.address, uint16(port)).String())
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
