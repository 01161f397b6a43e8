package fields

// others are the kinds that are not about one machine and its size.
func others() []Kind {
	return []Kind{
		{Name: "VirtualMachineImage, ClusterVirtualMachineImage", Fields: []Field{
			{Path: "spec.providerRef", Effect: Honoured, Note: "the library item it is made of; written by the controller of images"},
		}},
		{Name: "VirtualMachineService", Fields: VirtualMachineService()},
		{Name: "VirtualMachineReplicaSet", Fields: VirtualMachineReplicaSet()},
		{Name: "VirtualMachineGroup", Fields: VirtualMachineGroup()},
		{Name: "VirtualMachineSnapshot", Fields: []Field{
			{Path: "spec.vmName", Effect: Honoured},
			{Path: "spec.memory", Effect: Honoured, Note: "of a running or suspended machine"},
			{Path: "spec.quiesce.timeout", Effect: Honoured, Note: "by the guest agent, while the machine runs"},
			{Path: "spec.description", Effect: Honoured, Note: "for people"},
		}},
		{Name: "VirtualMachineWebConsoleRequest", Fields: []Field{
			{Path: "spec.name", Effect: Honoured},
			{Path: "spec.publicKey", Effect: Honoured, Note: "RSA, in PEM"},
		}},
		{Name: "VirtualMachinePublishRequest", Fields: VirtualMachinePublishRequest()},
		{Name: "VirtualMachineGroupPublishRequest", Fields: []Field{
			{Path: "spec.source", Effect: Honoured, Note: "a group; that of its own name when empty"},
			{Path: "spec.virtualMachines", Effect: Honoured, Note: "all of the group and of the groups in it when empty"},
			{Path: "spec.target", Effect: Honoured},
			{Path: "spec.ttlSecondsAfterFinished", Effect: Honoured},
		}},
		{Name: "VirtualMachineImageCache", Fields: []Field{
			{Path: "spec.providerID", Effect: None, Note: "an image is brought into a datastore when the first machine needs it there"},
			{Path: "spec.providerVersion", Effect: None, Note: "see providerID"},
			{Path: "spec.locations", Effect: None, Note: "see providerID"},
		}},
		{Name: "ContentLibrary, ClusterContentLibrary (imageregistry.vmware.com)", Fields: []Field{
			{Path: "spec.uuid", Effect: Honoured, Note: "that of the object when empty"},
			{Path: "spec.writable", Effect: Honoured},
			{Path: "spec.allowImport", Effect: Honoured},
			{Path: "spec.registry", Effect: Honoured, Note: "our own field: the library is a project of the registry"},
		}},
		{Name: "ContentLibraryItem, ClusterContentLibraryItem (imageregistry.vmware.com)", Fields: []Field{
			{Path: "spec.uuid", Effect: Honoured, Note: "that of the object when empty"},
			{Path: "spec.library", Effect: Honoured, Note: "our own field, as all below"},
			{Path: "spec.name", Effect: Honoured, Note: "display name of the image"},
			{Path: "spec.description", Effect: Honoured},
			{Path: "spec.source", Effect: Honoured, Note: "a web server, a registry, or an upload"},
			{Path: "spec.push", Effect: Honoured, Note: "set by the controller of VirtualMachinePublishRequests"},
			{Path: "spec.os", Effect: Honoured},
			{Path: "spec.firmware", Effect: Honoured},
		}},
		{Name: "ContentLibraryItemImportRequest (imageregistry.vmware.com)", Fields: []Field{
			{Path: "spec.source.url", Effect: Honoured},
			{Path: "spec.source.pem", Effect: Honoured},
			{Path: "spec.source.sslCertificate", Effect: Honoured, Note: "the same as pem"},
			{Path: "spec.source.checksum", Effect: Honoured},
			{Path: "spec.target.item.name", Effect: Honoured},
			{Path: "spec.target.item.itemName", Effect: Honoured, Note: "the same as name"},
			{Path: "spec.target.item.description", Effect: Honoured},
			{Path: "spec.target.item.type", Effect: None, Note: "the type is what is in the file"},
			{Path: "spec.target.library", Effect: Honoured},
			{Path: "spec.ttlSecondsAfterFinished", Effect: Honoured},
		}},
		{Name: "Network (netoperator.vmware.com)", Fields: Network()},
		{Name: "NetworkInterface (netoperator.vmware.com)", Fields: NetworkInterface()},
	}
}

// VirtualMachineService is the table of VirtualMachineService.spec.
func VirtualMachineService() []Field {
	return []Field{
		{Path: "spec.type", Effect: Mapped, Note: "ClusterIP and LoadBalancer; a load balancer is a port of the node's address, or of one of its own"},
		{Path: "spec.ports[].name", Effect: Honoured},
		{Path: "spec.ports[].protocol", Effect: Honoured},
		{Path: "spec.ports[].port", Effect: Honoured},
		{Path: "spec.ports[].targetPort", Effect: Honoured},
		{Path: "spec.selector", Effect: Honoured},
		{Path: "spec.loadBalancerIP", Effect: Mapped, Note: "an address of --load-balancer-range; others have no effect"},
		{Path: "spec.loadBalancerSourceRanges", Effect: Honoured},
		{Path: "spec.clusterIp", Effect: Honoured},
		{Path: "spec.externalName", Effect: None, Note: "as with VMware, the type ExternalName is not supported"},
	}
}

// VirtualMachineReplicaSet is the table of VirtualMachineReplicaSet.spec.
func VirtualMachineReplicaSet() []Field {
	return []Field{
		{Path: "spec.replicas", Effect: Honoured, Note: "also by the subresource scale"},
		{Path: "spec.deletePolicy", Effect: Mapped, Note: "always those first that are not ready, then the newest"},
		{Path: "spec.selector", Effect: Honoured},
		{Path: "spec.template.metadata", Effect: Honoured},
		{Path: "spec.template.spec", Effect: Honoured, Note: "see VirtualMachine"},
	}
}

// VirtualMachineGroup is the table of VirtualMachineGroup.spec.
func VirtualMachineGroup() []Field {
	return []Field{
		{Path: "spec.groupName", Effect: Honoured, Note: "the group that this one is a member of"},
		{Path: "spec.bootOrder[].members", Effect: Honoured},
		{Path: "spec.bootOrder[].powerOnDelay", Effect: Honoured, Note: "delays add up"},
		{Path: "spec.powerState", Effect: Honoured, Note: "handed over once for each change"},
		{Path: "spec.nextForcePowerStateSyncTime", Effect: Honoured, Note: "only now"},
		{Path: "spec.powerOffMode", Effect: Honoured},
		{Path: "spec.suspendMode", Effect: Honoured, Note: "handed over; see VirtualMachine"},
	}
}

// VirtualMachinePublishRequest is the table of VirtualMachinePublishRequest.spec.
func VirtualMachinePublishRequest() []Field {
	return []Field{
		{Path: "spec.source", Effect: Honoured, Note: "a VirtualMachine; that of its own name when empty"},
		{Path: "spec.target.item.name", Effect: Honoured, Note: "name of the machine and -image when empty; REPOSITORY or REPOSITORY:TAG in a library that is a project of the registry"},
		{Path: "spec.target.item.description", Effect: Honoured},
		{Path: "spec.target.location", Effect: Honoured, Note: "a ContentLibrary of the namespace; the default one when empty, registry for the namespace's project in the registry"},
		{Path: "spec.ttlSecondsAfterFinished", Effect: Honoured},
		{Path: "spec.backoffLimit", Effect: Honoured},
	}
}
