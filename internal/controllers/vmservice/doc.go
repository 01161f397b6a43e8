// Package vmservice makes a VirtualMachineService work: a Service of the same name without a selector, and the
// addresses of the virtual machines that its selector matches, as EndpointSlices, which the host's proxy reads,
// and as Endpoints, which clients of VM Operator read.
//
// A machine is an endpoint when it is powered on, has an address and is not being deleted. It is a ready one
// when it has no readiness probe or its condition Ready is True.
//
// Types: ClusterIP and LoadBalancer. A Service of type LoadBalancer gets the address of a node as its ingress, on which
// the proxy of that node answers. Where it wants a port that a host needs itself (reserved), or that another Service has
// there, it gets an address of its own from Config.Range, which the proxies of all nodes answer, too, for packets that
// come to a node: those of its pods, its virtual machines and itself, and of a network that is routed to it. What does
// not work is told by a warning event and the annotation ProblemAnnotation, since the kind has no conditions up to
// v1alpha5.
//
// The controllers' manager in the server calls Setup. Deleting is left to the garbage collector: everything is
// owned by the VirtualMachineService.
package vmservice
