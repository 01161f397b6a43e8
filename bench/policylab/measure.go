package policylab

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
	"atoll.dev/atoll/internal/linux/netns"
)

// Result is what was measured.
type Result struct {
	// Without and With policies: Gbit/s of one connection between two pods.
	Without, With []float64
	// Whole is how long everything took from nothing, Changes how long one change did until traffic showed it.
	Whole   time.Duration
	Changes []time.Duration
}

// Run measures changes and throughput with Policies policies over Pods pods.
func Run(ctx context.Context) (Result, error) {
	l, err := newPolicyLab()
	if err != nil {
		return Result{}, err
	}
	r, err := l.measure(ctx)
	return r, errors.Join(err, l.close())
}

func (l *policyLab) measure(ctx context.Context) (r Result, err error) {
	many := l.state
	none := &policyv1.State{Pods: map[netip.Addr]*policyv1.Pod{}}
	for a, p := range many.Pods {
		open := *p
		open.Policies = nil
		none.Pods[a] = &open
	}
	port, err := l.openPort(many)
	if err != nil {
		return r, err
	}
	for range 10 {
		for state, samples := range map[*policyv1.State]*[]float64{none: &r.Without, many: &r.With} {
			if err := l.apply(ctx, state); err != nil {
				return r, err
			}
			gbits, err := l.throughput(port, time.Second)
			if err != nil {
				return r, err
			}
			*samples = append(*samples, gbits)
		}
	}
	if err := l.apply(ctx, none); err != nil {
		return r, err
	}
	began := time.Now()
	if err := l.apply(ctx, many); err != nil {
		return r, err
	}
	r.Whole = time.Since(began)
	for i := range 60 {
		took, err := l.change(ctx, i)
		if err != nil {
			return r, err
		}
		r.Changes = append(r.Changes, took)
	}
	return r, nil
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
