package vmservice

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// number reads a port; 0 is none.
func number(text string) int32 {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0
	}
	return int32(n)
}

// protocol of a port, TCP when it says none.
func protocol(p vmopv1.VirtualMachineServicePort) corev1.Protocol {
	return corev1.Protocol(cmp.Or(strings.ToUpper(p.Protocol), string(corev1.ProtocolTCP)))
}

// ports are those of the Service; node ports stay what they are.
func ports(have []corev1.ServicePort, s *vmopv1.VirtualMachineService) []corev1.ServicePort {
	var out []corev1.ServicePort
	for _, p := range s.Spec.Ports {
		port := corev1.ServicePort{Name: p.Name, Protocol: protocol(p), Port: p.Port, TargetPort: intstr.FromInt32(cmp.Or(p.TargetPort, p.Port))}
		i := slices.IndexFunc(have, func(h corev1.ServicePort) bool { return h.Protocol == port.Protocol && h.Port == port.Port })
		if i >= 0 && s.Spec.Type == vmopv1.VirtualMachineServiceTypeLoadBalancer {
			port.NodePort = have[i].NodePort
		}
		out = append(out, port)
	}
	return out
}

// reserved says why a port of a node's address cannot be given away, or is empty. What the proxy answers on an
// address of a host never gets to the host's own programs any more.
func (r *Reconciler) reserved(port int32) string {
	switch {
	case port == r.Portal:
		return "people log in there"
	case port == 80:
		return ""
	case port < 1024:
		return "ports below 1024 but 80 belong to the host"
	case port == 2379, port == 2380, port == 6443, port == 9443, port >= 10240 && port <= 10260:
		return "it belongs to the cluster itself"
	case port >= 30000 && port <= 32767:
		return "it is in the range of node ports"
	}
	return ""
}

// errTaken marks a port of an address that the Service cannot have.
var errTaken = errors.New("taken")

// current is the address that a Service has. It is foreign when something else must have given it.
func (r *Reconciler) current(ctx context.Context, made *corev1.Service) (address string, foreign bool, err error) {
	if len(made.Status.LoadBalancer.Ingress) == 0 {
		return made.Annotations[ingressAnnotation], false, nil
	}
	address = made.Status.LoadBalancer.Ingress[0].IP
	if a, err := netip.ParseAddr(address); err == nil && r.Range.Contains(a) || address == made.Annotations[ingressAnnotation] {
		return address, false, nil
	}
	onNode, err := r.onNode(ctx, address)
	return address, !onNode, err
}

// onNode tells whether an address is that of a node.
func (r *Reconciler) onNode(ctx context.Context, address string) (bool, error) {
	have, err := r.address(ctx, address)
	return have == address, err
}

// release takes a node's address from the Service before it gets ports that it cannot have there: whatever has a port of
// that address in the meantime would lose it.
func (r *Reconciler) release(ctx context.Context, s *vmopv1.VirtualMachineService) error {
	made := &corev1.Service{}
	err := r.Get(ctx, client.ObjectKeyFromObject(s), made)
	if err != nil || !metav1.IsControlledBy(made, s) || len(made.Status.LoadBalancer.Ingress) == 0 {
		return client.IgnoreNotFound(err)
	}
	address := made.Status.LoadBalancer.Ingress[0].IP
	if onNode, err := r.onNode(ctx, address); err != nil || !onNode {
		return err
	}
	r.ingresses.Lock()
	defer r.ingresses.Unlock()
	var all corev1.ServiceList
	if err := r.List(ctx, &all); err != nil {
		return fmt.Errorf("listing Services: %w", err)
	}
	next := made.DeepCopy()
	next.Spec.Ports = ports(made.Spec.Ports, s)
	if err := r.free(all.Items, next, address); errors.Is(err, errTaken) {
		return r.putIngress(ctx, made, "")
	}
	return nil
}

// ingress gives a Service of type LoadBalancer the address of a node or, where its ports are taken, one of its own. An
// address that something else has given it stays.
func (r *Reconciler) ingress(ctx context.Context, s *vmopv1.VirtualMachineService, made *corev1.Service) error {
	if s.Spec.Type != vmopv1.VirtualMachineServiceTypeLoadBalancer {
		return nil
	}
	ours, foreign, err := r.current(ctx, made)
	if err != nil || foreign {
		return err
	}
	r.ingresses.Lock()
	defer r.ingresses.Unlock()
	address, err := r.choose(ctx, made, ours)
	if err != nil {
		address = ""
	}
	return errors.Join(err, r.putIngress(ctx, made, address))
}

// choose finds the address of the ingress; ours is the one that it had.
func (r *Reconciler) choose(ctx context.Context, made *corev1.Service, ours string) (string, error) {
	var all corev1.ServiceList
	if err := r.List(ctx, &all); err != nil {
		return "", fmt.Errorf("listing Services: %w", err)
	}
	if wanted := made.Spec.LoadBalancerIP; wanted != "" {
		if a, err := netip.ParseAddr(wanted); err == nil && r.Range.Contains(a) {
			if by := holder(all.Items, made, wanted); by != "" {
				return "", fmt.Errorf("spec.loadBalancerIP %s is taken by Service %s; name another of %s, or none", wanted, by, r.Range)
			}
			return wanted, nil
		}
	}
	if a, err := netip.ParseAddr(ours); err == nil && r.Range.Contains(a) && holder(all.Items, made, ours) == "" {
		return ours, nil // an address stays the same for as long as it can
	}
	address, err := r.address(ctx, ours)
	switch {
	case err != nil:
		return "", err
	case address == "":
		return "", errors.New("no node has an address that could be the ingress")
	}
	err = r.free(all.Items, made, address)
	if err == nil || !errors.Is(err, errTaken) {
		return address, err
	}
	own, found := r.own(all.Items, made)
	if !found {
		return "", fmt.Errorf("%w; and the load balancers' addresses %s are all used: start the supervisor with a larger --load-balancer-range", err, r.Range)
	}
	return own, nil
}

// own is an address of the range that no other Service has.
func (r *Reconciler) own(all []corev1.Service, made *corev1.Service) (string, bool) {
	if !r.Range.IsValid() {
		return "", false
	}
	used := map[string]bool{}
	for _, s := range all {
		if key(s) == key(*made) {
			continue
		}
		for _, i := range s.Status.LoadBalancer.Ingress {
			used[i.IP] = true
		}
		used[s.Annotations[ingressAnnotation]] = true // which is written before
	}
	for a := r.Range.Masked().Addr().Next(); r.Range.Contains(a.Next()); a = a.Next() { // without the first and the last
		if !used[a.String()] {
			return a.String(), true
		}
	}
	return "", false
}

// holder is another Service that has the address, and had it before.
func holder(all []corev1.Service, made *corev1.Service, address string) string {
	for _, other := range all {
		if key(other) != key(*made) && has(other, address) && older(other, *made, address) {
			return key(other)
		}
	}
	return ""
}

// address is that of a node that is ready: the one that the Service has already if it can stay.
func (r *Reconciler) address(ctx context.Context, have string) (string, error) {
	var nodes corev1.NodeList
	if err := r.List(ctx, &nodes); err != nil {
		return "", fmt.Errorf("listing nodes: %w", err)
	}
	slices.SortFunc(nodes.Items, func(a, b corev1.Node) int { return cmp.Compare(a.Name, b.Name) })
	first := ""
	for _, n := range nodes.Items {
		for _, a := range n.Status.Addresses {
			if a.Type != corev1.NodeInternalIP {
				continue
			}
			if a.Address == have {
				return have, nil
			}
			if first == "" && ready(n) {
				first = a.Address
			}
		}
	}
	return first, nil
}

func ready(n corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// free tells why the address cannot be the Service's ingress: a port of it is taken.
func (r *Reconciler) free(all []corev1.Service, made *corev1.Service, address string) error {
	for _, p := range made.Spec.Ports {
		if why := r.reserved(p.Port); why != "" {
			return fmt.Errorf("port %d of the node's address is %w: %s", p.Port, errTaken, why)
		}
	}
	for _, other := range all {
		if key(other) == key(*made) || !has(other, address) || !older(other, *made, address) {
			continue
		}
		for _, p := range made.Spec.Ports {
			if slices.ContainsFunc(other.Spec.Ports, func(o corev1.ServicePort) bool { return o.Port == p.Port && o.Protocol == p.Protocol }) {
				return fmt.Errorf("port %d of the node's address %s is %w by Service %s", p.Port, address, errTaken, key(other))
			}
		}
	}
	return nil
}

func has(s corev1.Service, address string) bool {
	return slices.ContainsFunc(s.Status.LoadBalancer.Ingress, func(i corev1.LoadBalancerIngress) bool { return i.IP == address })
}

// older tells whether a Service that has the address comes before another one.
func older(other, one corev1.Service, address string) bool {
	if !has(one, address) {
		return true
	}
	if !other.CreationTimestamp.Equal(&one.CreationTimestamp) {
		return other.CreationTimestamp.Before(&one.CreationTimestamp)
	}
	return key(other) < key(one)
}

func key(s corev1.Service) string { return s.Namespace + "/" + s.Name }

// putIngress writes the address, first into the annotation that says that it is ours.
func (r *Reconciler) putIngress(ctx context.Context, made *corev1.Service, address string) error {
	if made.Annotations[ingressAnnotation] != address && address != "" {
		base := made.DeepCopy()
		metav1.SetMetaDataAnnotation(&made.ObjectMeta, ingressAnnotation, address)
		if err := r.Patch(ctx, made, client.MergeFrom(base)); err != nil {
			return fmt.Errorf("marking Service %s: %w", made.Name, err)
		}
	}
	var want []corev1.LoadBalancerIngress
	if address != "" {
		want = []corev1.LoadBalancerIngress{{IP: address}}
	}
	base := made.DeepCopy()
	if len(want) == len(base.Status.LoadBalancer.Ingress) && (len(want) == 0 || want[0].IP == base.Status.LoadBalancer.Ingress[0].IP) {
		return nil
	}
	made.Status.LoadBalancer.Ingress = want
	if equality.Semantic.DeepEqual(base.Status, made.Status) {
		return nil
	}
	if err := r.Status().Patch(ctx, made, client.MergeFrom(base)); err != nil {
		return fmt.Errorf("writing the ingress of Service %s: %w", made.Name, err)
	}
	return nil
}
