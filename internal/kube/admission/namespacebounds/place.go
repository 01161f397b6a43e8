package namespacebounds

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/apis/core"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// requirements are what a node must have to be one of the namespace's. A host is named by its node, and required by the
// label that the node has for its name.
func (p *Plugin) requirements(b *atoll.SupervisorNamespace) []core.NodeSelectorRequirement {
	var out []core.NodeSelectorRequirement
	if b.Spec.Zones != nil {
		out = append(out, core.NodeSelectorRequirement{Key: corev1.LabelTopologyZone, Operator: core.NodeSelectorOpIn, Values: orNone(names(b.Spec.Zones))})
	}
	if b.Spec.Hosts != nil {
		values := make([]string, 0, len(b.Spec.Hosts))
		for _, host := range b.Spec.Hosts {
			if node, err := p.source.nodes.Get(host); err == nil && node.Labels[corev1.LabelHostname] != "" {
				host = node.Labels[corev1.LabelHostname]
			}
			values = append(values, host)
		}
		out = append(out, core.NodeSelectorRequirement{Key: corev1.LabelHostname, Operator: core.NodeSelectorOpIn, Values: orNone(values)})
	}
	return out
}

// orNone makes a list of values that the API takes, of which an empty one means nothing.
func orNone(values []string) []string {
	if len(values) == 0 {
		return []string{"none"}
	}
	return values
}

// place ANDs the requirements into the affinity of a pod.
func (p *Plugin) place(b *atoll.SupervisorNamespace, pod *core.Pod) {
	more := p.requirements(b)
	if len(more) == 0 {
		return
	}
	if pod.Spec.Affinity == nil {
		pod.Spec.Affinity = &core.Affinity{}
	}
	if pod.Spec.Affinity.NodeAffinity == nil {
		pod.Spec.Affinity.NodeAffinity = &core.NodeAffinity{}
	}
	required := &pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	if *required == nil {
		*required = &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{MatchExpressions: more}}}
		return
	}
	terms := (*required).NodeSelectorTerms
	for i := range terms {
		if isEmpty(terms[i]) { // matches no node
			continue
		}
		for _, r := range more {
			if !slices.ContainsFunc(terms[i].MatchExpressions, func(has core.NodeSelectorRequirement) bool { return same(has, r) }) {
				terms[i].MatchExpressions = append(terms[i].MatchExpressions, r)
			}
		}
	}
}

func isEmpty(t core.NodeSelectorTerm) bool {
	return len(t.MatchExpressions) == 0 && len(t.MatchFields) == 0
}

func same(a, b core.NodeSelectorRequirement) bool {
	return a.Key == b.Key && a.Operator == b.Operator && slices.Equal(a.Values, b.Values)
}

// placed makes sure that a new pod can only be on hosts of the namespace.
func (p *Plugin) placed(b *atoll.SupervisorNamespace, pod *core.Pod) error {
	if pod.Spec.NodeName != "" {
		if err := p.node(b, pod.Spec.NodeName, "spec.nodeName "+pod.Spec.NodeName); err != nil {
			return err
		}
	}
	more := p.requirements(b)
	if len(more) == 0 {
		return nil
	}
	var terms []core.NodeSelectorTerm
	if a := pod.Spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		terms = a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	}
	bound := len(terms) > 0
	for _, t := range terms {
		for _, r := range more {
			bound = bound && (isEmpty(t) || slices.ContainsFunc(t.MatchExpressions, func(has core.NodeSelectorRequirement) bool { return same(has, r) }))
		}
	}
	if !bound {
		return refuseText(b, limitPlaces(b), allowedPlaces(b), "a pod whose required node affinity a webhook or policy has changed; it must leave what was added")
	}
	return nil
}

// node tells whether a host is one of the namespace's. The error names what was asked.
func (p *Plugin) node(b *atoll.SupervisorNamespace, name, asked string) error {
	if b.Spec.Hosts != nil && !slices.Contains(b.Spec.Hosts, name) {
		return refuse(b, "spec.hosts", b.Spec.Hosts, asked)
	}
	if b.Spec.Zones == nil {
		return nil
	}
	zone := ""
	if node, err := p.source.nodes.Get(name); err == nil {
		zone = node.Labels[corev1.LabelTopologyZone]
	}
	if zone == "" || !slices.Contains(names(b.Spec.Zones), zone) {
		return refuse(b, "spec.zones", names(b.Spec.Zones), fmt.Sprintf("%s in zone %q", asked, zone))
	}
	return nil
}

// limitPlaces names the fields that bound where pods may be.
func limitPlaces(b *atoll.SupervisorNamespace) string {
	switch {
	case b.Spec.Hosts != nil && b.Spec.Zones != nil:
		return "spec.hosts, spec.zones"
	case b.Spec.Hosts != nil:
		return "spec.hosts"
	}
	return "spec.zones"
}

func allowedPlaces(b *atoll.SupervisorNamespace) string {
	return "only " + list(slices.Concat(b.Spec.Hosts, names(b.Spec.Zones))) + " may be used"
}
