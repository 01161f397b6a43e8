// Package policy enforces NetworkPolicies for the pods of this host in an nftables table of its own.
//
// It is not the translation of API objects (internal/controllers/networkpolicy), not the reader of what was denied
// (internal/network/denied), and not the table with host ports and masquerading (internal/network/nat), beside which
// its table stands. It takes the plain structs of api/policy/v1. The agent calls Engine.Apply on every change, Host
// calls Engine.Prepare before there are pods, `atoll network` reads Counters, Cleanup deletes the tables (TableName,
// CutTableName).
//
// # The table
//
// A pod is routed, so each packet of it passes the hooks of the host once: forward for what goes to other pods and
// away, input for what goes to the host itself. What the host sends to its own pods is not looked at: probes of the
// kubelet must get through. Every combination of direction and tier is a base chain of its own at the hook: accepting
// a packet in one of them ends that chain only, so that all of them must agree.
//
//	guard                   prerouting: only known (interface, MAC, address) get in from a pod; no IPv6, and nothing to link-local
//	                        addresses but DNS
//	known                   forward: nothing goes to an address of the pod network that is no known pod's
//	egress-administrator    forward and input; address of the pod -> chain of its group
//	egress-owner
//	ingress-administrator   forward
//	ingress-owner
//
//	g-...                   group: pods with the same policies: jump to each policy, then to the chain that denies
//	p-...                   policy and direction: one rule for each kind of peer and protocol: accept
//	d-...                   namespace, direction and tier: count, log a few, drop
//	s-..., n-...            sets of addresses and of endpoints, shared between all rules with the same selector
//
// Pods that no policy selects are in none of the maps and pass. A connection is looked at when it begins; what it is
// followed by passes by connection tracking (`ct state established`). When rules become narrower, the connections that
// they do not allow any more are looked for in the kernel's table and cut, see Engine.Cut.
//
// # What was cut
//
// The packets of who may still send begin a new entry in the kernel's table, to which those of who may not would be
// answers. A second table, which is left alone when the first is written anew, keeps both from that:
//
//	flows, protocols        from, to, ports and protocol of who may not send: its answers are dropped, until it has
//	                        been silent for some minutes or may send again
//	ports, peers            the same for many ports: from any port, then of all ports, for an hour at most
//	senders, receivers      the same for many addresses: from, or to, and the port of to, for an hour
//	silent, deaf            the same for all answers of a pod, or to it, for an hour
//	pairs                   addresses between which a TCP connection was cut: none is taken up in its middle
//	loose                   the same for a pod with many of these
//
// The wide ones take the place of narrow ones when a pod has too many: finder.plan. Nobody fills the sets of the host.
//
// # What can go wrong
//
// The program nft is missing or the kernel refuses: Apply says so, what is in the kernel stays, and pods that are not
// in it have no network. Somebody else deletes the table: Engine.Damaged tells, and the next Apply makes it anew. The
// kernel has no nfnetlink_log: nothing is logged, but counted (Engine.Limits).
package policy
