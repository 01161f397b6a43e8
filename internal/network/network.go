// Package network wires pods to the host: it joins a micro-VM's tap to the
// pod's interface, forwards ports into micro-VMs, and sets up and cleans up
// the host.
//
// It is not the CNI plugin (internal/network/cni), which makes a pod's
// interface, and not kube-proxy or DNS. It takes plain paths and addresses and
// knows nothing of Kubernetes objects.
//
// Callers: the pool makes taps (NewTap), the shim joins them (JoinTap) and
// serves port-forward (ServePortForward), the agent keeps the host in order
// (Host), `atoll down` removes every trace (Cleanup).
//
// # How a pod is wired
//
// A pod's eth0 is a veth. Its other end on the host is in no bridge: the host
// has a route to the pod's address through it, and the pod a route to
// everything through the gateway address, with nobody else on the wire.
// Addresses are /32. So the host's IP stack sees every packet once, also
// between two pods of one host: Services, masquerading and later policies need
// no br_netfilter and are not confused by it; a pod can neither answer ARP for
// another nor reach it around the host; and a source address that is not the
// pod's own is dropped at the first hook.
//
// The bridge atoll0 has no ports. It is there to hold the gateway address, on
// which DNS listens before there is a pod.
//
// # How a micro-VM is wired
//
// A tap is made before its pod is known, in a namespace of the pool, and stays
// there. At pod start a veth pair is laid from there to the pod's namespace,
// and four tc rules pass every frame on: tap <-> pair, pair <-> eth0. They take
// a frame before the namespace's own protocol stack sees it, so eth0 keeps its
// address for whoever looks, but ARP, ICMP and everything else is answered by
// the guest alone, which uses the same MAC and address.
//
// # What can go wrong
//
// The pod's namespace vanishes while it is being wired (the pod was deleted):
// errors wrap os.ErrNotExist or netns.ErrNotNetNS. Another program flushes the
// nftables ruleset or deletes the bridge: Host repairs both.
package network
