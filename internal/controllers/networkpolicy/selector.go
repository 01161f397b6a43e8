package networkpolicy

import (
	"cmp"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// selector is a set of pods that rules name: by their namespace or its labels, and by their labels. With a port it is
// the endpoints of that port instead of addresses.
type selector struct {
	// namespace is the only one, or namespaces selects them; both are nothing for all pods.
	namespace  string
	namespaces labels.Selector
	pods       labels.Selector
	port       *namedPort // its number is not used

	users   int
	content map[*pod]bool
	set     *policyv1.Set // nil when it must be built
}

// empty is a new selector of the same pods.
func (s *selector) empty() *selector {
	return &selector{namespace: s.namespace, namespaces: s.namespaces, pods: s.pods, port: s.port, content: map[*pod]bool{}}
}

// id names the selector; equal ones have equal ids.
func (s *selector) id() string {
	id := "ns=" + s.namespace
	if s.namespaces != nil {
		id = "nss=" + s.namespaces.String()
	}
	id += ";pods=" + s.pods.String()
	if s.port != nil {
		id += ";port=" + s.port.name + "/" + string(s.port.protocol)
	}
	return id
}

// replace takes a pod out and, if it matches, another version of it in.
func (s *selector) replace(old, now *pod, namespace labels.Set) {
	match := s.matches(now, namespace)
	if old != nil && s.content[old] {
		if match && old == now {
			return
		}
		delete(s.content, old)
		s.set = nil
	}
	if match {
		s.content[now] = true
		s.set = nil
	}
}

func (s *selector) remove(p *pod) {
	if s.content[p] {
		delete(s.content, p)
		s.set = nil
	}
}

func (s *selector) matches(p *pod, namespace labels.Set) bool {
	switch {
	case p.ended:
		return false
	case s.namespace != "" && s.namespace != p.name.Namespace:
		return false
	case s.namespaces != nil && (namespace == nil || !s.namespaces.Matches(namespace)):
		return false
	}
	return s.pods.Matches(p.labels)
}

// build is the set, the same pointer as long as its content is the same.
func (s *selector) build() *policyv1.Set {
	if s.set != nil {
		return s.set
	}
	set := &policyv1.Set{}
	if s.port != nil {
		set.Endpoints = []policyv1.Endpoint{}
	}
	for p := range s.content {
		if s.port == nil {
			set.Addresses = append(set.Addresses, p.addresses...)
			continue
		}
		for _, port := range p.ports {
			if port.name != s.port.name || port.protocol != s.port.protocol {
				continue
			}
			for _, a := range p.addresses {
				set.Endpoints = append(set.Endpoints, policyv1.Endpoint{Address: a, Protocol: port.protocol, Port: port.port})
			}
		}
	}
	slices.SortFunc(set.Addresses, netip.Addr.Compare)
	set.Addresses = slices.Compact(set.Addresses)
	slices.SortFunc(set.Endpoints, func(a, b policyv1.Endpoint) int {
		return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
	set.Endpoints = slices.Compact(set.Endpoints)
	s.set = set
	return set
}
