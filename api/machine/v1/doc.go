// Package machinev1 is what the server and a host say to each other about one running virtual machine.
//
// A VirtualMachine that is powered on has a pod of its own name under RuntimeClass atoll-vm. What the machine
// is to be is in an annotation of the pod (Annotation, a Machine as JSON), which only the controller of
// VirtualMachines writes, also later to change a running machine. How it is, is in another (StateAnnotation,
// a State as JSON), which only the host's agent writes. The same two types go between the agent and the shim
// over the shim's socket (Methods).
//
//	controller --Machine--> pod --kubelet, CRI--> shim: starts QEMU
//	                         |                     ^
//	                         +--agent: Apply-------+   changes while it runs
//	controller <--State----- pod <--agent: Watch---+
//
// The package holds types, names and checks (Parse) and imports nothing of Kubernetes. Sizes are bytes, times RFC 3339.
// Nothing in a Machine or State is secret: what the guest is configured with (user data, passwords, keys) is
// in a Secret that the pod mounts, see SeedDir.
//
// What a guest says about itself (State.Guest) is bounded and cleaned by the shim, and never trusted by anybody.
package machinev1
