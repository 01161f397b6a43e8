// Package vmreplicaset keeps as many virtual machines as a VirtualMachineReplicaSet asks for.
//
// Machines are made of the template, under generated names, with the replica set as their controller; ones that
// match the selector and have no controller are adopted, ones that do not match any more are let go. Changing
// the template changes no machine that exists. When there are too many, those go first that are not ready, then
// the newest.
//
// A machine counts as ready when its condition Ready is True, or when it has no readiness probe and is powered
// on with an address. The scale subresource works with autoscalers: the selector is also written to
// status.selector as text, a field that VM Operator's own type does not have.
//
// What can go wrong: a machine is refused (quota, admission); the conditions ReplicaFailure and
// VirtualMachinesCreated say why, and it is tried again. The controllers' manager in the server calls Setup.
package vmreplicaset
