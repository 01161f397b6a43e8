// Package networkpolicy translates NetworkPolicies of the API into what one host enforces (api/policy/v1).
//
// It does not touch the network: that is Host's, which the agent implements with internal/network/policy. It follows
// the pods of all hosts (labels, addresses and named ports of them only), namespaces and policies, and asks Host which
// pods have an interface here. The container runtime knows the address of a pod before the API does, so a pod's rules
// are there before its first container is.
//
// # What a policy means
//
// All of networking.k8s.io/v1. A policy selects the pods of its namespace that use the pod network and have not ended;
// pods that are being deleted count until they have. Pods with the host's network are the host: no policy selects them,
// no selector names them, and what they send to pods of their host is allowed as are the kubelet's probes. A named port
// in ingress is looked up in the pods that the policy selects, in egress in the peers. Networks of IPv6 match nothing:
// pods have IPv4 only.
//
// The cluster's DNS is no pod here but serves on the host's address towards pods. Selectors that match a pod with label
// k8s-app=kube-dns in namespace kube-system, as written for every other cluster, allow egress to its port there, and to
// nothing else of the host.
//
// Policies with the label atoll.dev/tier=administrator are the tier of that name, all others that of the owner; traffic
// must be allowed by both (each only where it has a policy that selects the pod).
//
// # What can go wrong
//
// Host cannot apply: that is logged, told by Status and by an Event on the pods that have no network because of it, and
// tried again. The API server is away: what is enforced stays, and pods that start have no network until it is back.
package networkpolicy
