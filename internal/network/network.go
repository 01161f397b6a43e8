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
// A pod's eth0 is a veth whose other end is a port of the bridge atoll0. Ports
// are isolated from each other and learn nothing: every packet a pod sends
// goes to the gateway address on the bridge and is routed by the host, also
// between two pods of one host. So Services, masquerading and later policies
// see every packet without br_netfilter, and a guest can neither answer ARP
// for another pod nor reach it around the host. Addresses are /32.
//
// # How a micro-VM is wired
//
// Two tc rules in the pod's namespace, one on eth0 and one on the tap, take
// every arriving frame and send it out of the other. Taking happens before the
// namespace's own protocol stack sees the frame, so eth0 keeps its address for
// whoever looks, but ARP, ICMP and everything else is answered by the guest
// alone, which uses the same MAC and address.
//
// # What can go wrong
//
// The pod's namespace vanishes while it is being wired (the pod was deleted):
// errors wrap os.ErrNotExist or netns.ErrNotNetNS. Another program flushes the
// nftables ruleset or deletes the bridge: Host repairs both.
package network
