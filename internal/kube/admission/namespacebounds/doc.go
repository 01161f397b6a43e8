// Package namespacebounds is the admission plugin AtollNamespaceBounds: it enforces what a SupervisorNamespace bounds
// and quota cannot.
//
// What is bounded, by the fields of the SupervisorNamespace:
//
//	spec.images                        container images of pods, ephemeral containers and image volumes included
//	spec.podRuntime.policy             runtime class and what needs the host, its ports, or its kubelet to connect elsewhere
//	spec.podRuntime.privilegedAllowed  privileged containers
//	always                             the priority classes of the system, which preempt pods of others; spec.externalIPs of
//	                                   Services, which take the traffic of others
//	spec.hosts, spec.zones             a required node affinity that is ANDed into every pod; nodeName and bindings are checked
//	spec.storageClasses, encryption    claims with their VolumeAttributesClasses, generic ephemeral volumes, templates of StatefulSets, virtual machines
//	spec.vmClasses, contentSources     VirtualMachines and VirtualMachineReplicaSets, claims made of images
//	spec.resources.*Reservation        what others request, wherever they are: requests must fit into what the nodes have,
//	                                   less what is requested already (a pod that is larger than each node waits and takes
//	                                   nothing), less what is reserved for others and not used
//
// A change is held to what it changes only, so that what was there before a limit came can still be looked after.
//
// What a SupervisorNamespace expands into carries a label. Such objects, the label itself, the tier of
// administrators on NetworkPolicies, and the labels of the Namespace that decide what its pods may do, are changed by
// administrators (who may update every SupervisorNamespace), by their controller, and by the parts of the control plane that
// clean up. So is the EncryptionClass that spec.encryption.className names.
//
// It also adds to the refusals of upstream's plugins for quota, limit ranges and pod security who can change the limit.
//
// internal/kube/apiserver registers it and runs the Source, which watches SupervisorNamespaces and reads pods and nodes
// from caches that the API server has anyway. It does not bound counts and sums, which are ResourceQuotas.
//
// What can go wrong: the caches have not been filled, or a namespace is labelled and its SupervisorNamespace cannot be
// read. Then requests are refused. Two pods that are admitted in the same moment are counted one after the other, but a
// pod that another plugin refuses afterwards counts for a few seconds.
package namespacebounds
