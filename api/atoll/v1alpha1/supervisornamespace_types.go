package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Names that the expansion of a SupervisorNamespace is known by.
const (
	// SupervisorNamespaceLabel is on the Namespace and on every object a SupervisorNamespace expands into; its value
	// is the name of the SupervisorNamespace. Only the controller and administrators change such objects.
	SupervisorNamespaceLabel = "atoll.dev/supervisor-namespace"
	// TierLabel set to TierAdministrator on a NetworkPolicy makes it a bound that the other policies of the namespace
	// cannot widen: traffic must be allowed by both.
	TierLabel         = "atoll.dev/tier"
	TierAdministrator = "administrator"
	// DeleteContentsAnnotation set to "true" on a SupervisorNamespace allows its deletion while there is something in it.
	DeleteContentsAnnotation = "atoll.dev/delete-contents"
	// RestartPriorityAnnotation of a Namespace is the HA restart priority of what runs in it.
	RestartPriorityAnnotation = "atoll.dev/restart-priority"
	// LocalDomain is the domain of local users and groups: sso:NAME@atoll.local.
	LocalDomain = "atoll.local"
	// SubjectPrefix precedes the names of people and their groups in Kubernetes: sso:NAME@DOMAIN, as vSphere has it.
	SubjectPrefix = "sso:"
)

// SupervisorNamespace is a namespace with what an administrator bounds it by. Its name is the name of the Namespace.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,categories=atoll,shortName=svns
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].status"
// +kubebuilder:printcolumn:name="CPU",type=string,JSONPath=".status.cpu"
// +kubebuilder:printcolumn:name="Memory",type=string,JSONPath=".status.memory"
// +kubebuilder:printcolumn:name="Storage",type=string,JSONPath=".status.storage"
// +kubebuilder:printcolumn:name="Over",type=string,JSONPath=".status.conditions[?(@.type=='WithinLimits')].reason",priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="the name must be a DNS label of at most 63 characters: it becomes the name of the Namespace"
type SupervisorNamespace struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec SupervisorNamespaceSpec `json:"spec,omitempty"`
	// +optional
	Status SupervisorNamespaceStatus `json:"status,omitempty"`
}

// SupervisorNamespaceList is a list of SupervisorNamespaces.
//
// +kubebuilder:object:root=true
type SupervisorNamespaceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []SupervisorNamespace `json:"items"`
}

// SupervisorNamespaceSpec is what the administrator decides. What is not given is not bounded.
type SupervisorNamespaceSpec struct {
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Description string `json:"description,omitempty"`
	// ClassName is the SupervisorNamespaceTemplate it was made from. What the spec does not say comes from there.
	// Owners who make a namespace themselves must give it. It cannot change.
	// +optional
	ClassName string `json:"className,omitempty"`
	// +optional
	Resources NamespaceResources `json:"resources,omitempty"`
	// StorageClasses that may be used, each with its limit. Nil allows all.
	// +optional
	// +listType=map
	// +listMapKey=name
	StorageClasses []NamespaceStorageClass `json:"storageClasses,omitempty"`
	// VMClasses that virtual machines may have; they are in the namespace as VirtualMachineClass. Nil allows all.
	// +optional
	// +listType=map
	// +listMapKey=name
	VMClasses []NamespaceReference `json:"vmClasses,omitempty"`
	// ContentSources are the content libraries whose images virtual machines may be made from. Nil allows all of the cluster.
	// +optional
	// +listType=map
	// +listMapKey=name
	ContentSources []NamespaceContentSource `json:"contentSources,omitempty"`
	// Images are patterns of container images that pods may use (path.Match with ** for any depth), such as
	// registry.atoll.local/shop/*. Nil allows all.
	// +optional
	Images []string `json:"images,omitempty"`
	// AccessList says who may do what in the namespace.
	// +optional
	// +kubebuilder:validation:MaxItems=500
	AccessList []NamespaceAccess `json:"accessList,omitempty"`
	// Zones it may use: values of the node label topology.kubernetes.io/zone. Nil is all.
	// +optional
	// +listType=map
	// +listMapKey=name
	Zones []NamespaceReference `json:"zones,omitempty"`
	// Hosts it may use, by node name. Nil is all of its zones.
	// +optional
	// +listType=set
	Hosts []string `json:"hosts,omitempty"`
	// +optional
	Network NamespaceNetwork `json:"network,omitempty"`
	// +optional
	Encryption NamespaceEncryption `json:"encryption,omitempty"`
	// +optional
	PodRuntime NamespacePodRuntime `json:"podRuntime,omitempty"`
	// +optional
	Registry NamespaceRegistry `json:"registry,omitempty"`
	// RestartPriority is for the order of starts after a host has failed. It is kept; with one host it orders nothing. Empty is Medium.
	// +optional
	// +kubebuilder:validation:Enum="";Lowest;Low;Medium;High;Highest
	RestartPriority string `json:"restartPriority,omitempty"`
}

// NamespaceResources bounds pods and virtual machines together.
type NamespaceResources struct {
	// CPULimit and MemoryLimit bound the sum of the limits of pods, virtual machines included, with their overhead.
	// +optional
	CPULimit *resource.Quantity `json:"cpuLimit,omitempty"`
	// +optional
	MemoryLimit *resource.Quantity `json:"memoryLimit,omitempty"`
	// CPUReservation and MemoryReservation are kept free for the namespace: other namespaces cannot request them.
	// +optional
	CPUReservation *resource.Quantity `json:"cpuReservation,omitempty"`
	// +optional
	MemoryReservation *resource.Quantity `json:"memoryReservation,omitempty"`
	// StorageRequestLimit bounds the sizes of all volumes together.
	// +optional
	StorageRequestLimit *resource.Quantity `json:"storageRequestLimit,omitempty"`
	// Defaults of containers that say nothing themselves.
	// +optional
	CPULimitDefault *resource.Quantity `json:"cpuLimitDefault,omitempty"`
	// +optional
	CPURequestDefault *resource.Quantity `json:"cpuRequestDefault,omitempty"`
	// +optional
	MemoryLimitDefault *resource.Quantity `json:"memoryLimitDefault,omitempty"`
	// +optional
	MemoryRequestDefault *resource.Quantity `json:"memoryRequestDefault,omitempty"`
	// Counts of objects.
	// +optional
	Counts NamespaceCounts `json:"counts,omitempty"`
}

// NamespaceCounts bounds how many objects there may be. Nil is no bound.
type NamespaceCounts struct {
	// +optional
	// +kubebuilder:validation:Minimum=0
	Pods *int64 `json:"podCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	VirtualMachines *int64 `json:"virtualMachineCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	Services *int64 `json:"serviceCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	Deployments *int64 `json:"deploymentCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	DaemonSets *int64 `json:"daemonSetCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	ReplicaSets *int64 `json:"replicaSetCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	ReplicationControllers *int64 `json:"replicationControllerCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	StatefulSets *int64 `json:"statefulSetCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	Jobs *int64 `json:"jobCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	ConfigMaps *int64 `json:"configMapCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	Secrets *int64 `json:"secretCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	PersistentVolumeClaims *int64 `json:"persistentVolumeClaimCount,omitempty"`
	// VolumeSnapshots are those of volumes. What snapshots and images take is in no limit of storage.
	// +optional
	// +kubebuilder:validation:Minimum=0
	VolumeSnapshots *int64 `json:"volumeSnapshotCount,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	VirtualMachineSnapshots *int64 `json:"virtualMachineSnapshotCount,omitempty"`
	// ContentLibraryItems are the images of virtual machines in its own content libraries.
	// +optional
	// +kubebuilder:validation:Minimum=0
	ContentLibraryItems *int64 `json:"contentLibraryItemCount,omitempty"`
}

// NamespaceStorageClass is a storage policy a namespace may use.
type NamespaceStorageClass struct {
	// +kubebuilder:validation:MinLength=1
	Name string `json:"name"`
	// Limit of the sizes of its volumes together. Nil is no limit.
	// +optional
	Limit *resource.Quantity `json:"limit,omitempty"`
	// VolumeAttributesClasses may be given to its volumes, and replace what the policy says of speed. Without any, none may.
	// +optional
	// +listType=set
	VolumeAttributesClasses []string `json:"volumeAttributesClasses,omitempty"`
}

// NamespaceReference names something a namespace may use.
type NamespaceReference struct {
	// +kubebuilder:validation:MinLength=1
	Name string `json:"name"`
}

// NamespaceContentSource is a content library.
type NamespaceContentSource struct {
	// +kubebuilder:validation:MinLength=1
	Name string `json:"name"`
	// +optional
	// +kubebuilder:validation:Enum=ContentLibrary;ClusterContentLibrary
	// +kubebuilder:default=ClusterContentLibrary
	Type string `json:"type,omitempty"`
}

// Roles in a namespace.
const (
	// RoleOwner is RoleEdit, and may make and delete namespaces from templates.
	RoleOwner = "Owner"
	// RoleEdit may create, change and delete what is in the namespace.
	RoleEdit = "Edit"
	// RoleView may read it, but no Secrets.
	RoleView = "View"
)

// NamespaceAccess gives one user or group a role.
type NamespaceAccess struct {
	// +kubebuilder:validation:Enum=User;Group
	SubjectType string `json:"subjectType"`
	// Subject is the name without prefix and domain.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[^@:\s]+$`
	Subject string `json:"subject"`
	// Domain of the subject: atoll.local for local people, that of an IdentityProvider for others.
	// +optional
	// +kubebuilder:default=atoll.local
	Domain string `json:"domain,omitempty"`
	// +kubebuilder:validation:Enum=Owner;Edit;View
	Role string `json:"role"`
}

// Modes of isolation.
const (
	IsolationOpen     = "Open"
	IsolationIsolated = "Isolated"
	IsolationDenyAll  = "DenyAll"
)

// NamespaceNetwork bounds traffic. It expands into NetworkPolicies of the tier administrator.
type NamespaceNetwork struct {
	// Isolation: Open, Isolated (only the namespace itself, the cluster's DNS and what is outside of the cluster), or
	// DenyAll (only the cluster's DNS and what the lists below allow). Empty is Open.
	// +optional
	// +kubebuilder:validation:Enum="";Open;Isolated;DenyAll
	Isolation string `json:"isolation,omitempty"`
	// IngressCIDRs and EgressCIDRs bound traffic with addresses outside of the cluster. Nil leaves it to Isolation.
	// +optional
	IngressCIDRs []string `json:"ingressCIDRs,omitempty"`
	// +optional
	EgressCIDRs []string `json:"egressCIDRs,omitempty"`
	// FromNamespaces and ToNamespaces are exceptions of the isolation, by name.
	// +optional
	FromNamespaces []string `json:"fromNamespaces,omitempty"`
	// +optional
	ToNamespaces []string `json:"toNamespaces,omitempty"`
}

// NamespaceEncryption demands encrypted volumes.
type NamespaceEncryption struct {
	// Required refuses volumes, boot disks of virtual machines among them, whose StorageClass does not encrypt.
	// +optional
	Required bool `json:"required,omitempty"`
	// ClassName is the EncryptionClass of the namespace that they must be encrypted by. Empty is any.
	// +optional
	ClassName string `json:"className,omitempty"`
}

// Policies of pod runtimes.
const (
	// RuntimeMicroVM allows pods in micro-VMs only, without privileged containers.
	RuntimeMicroVM = "MicroVM"
	// RuntimeRunc allows pods under runc, which share the kernel of the host, and what needs the host.
	RuntimeRunc = "Runc"
)

// NamespacePodRuntime bounds how pods run.
type NamespacePodRuntime struct {
	// Policy is MicroVM or Runc. Empty is MicroVM.
	// +optional
	// +kubebuilder:validation:Enum="";MicroVM;Runc
	Policy string `json:"policy,omitempty"`
	// PrivilegedAllowed allows privileged containers. In a micro-VM they have the kernel of the pod, under runc that of the host.
	// +optional
	PrivilegedAllowed bool `json:"privilegedAllowed,omitempty"`
}

// NamespaceRegistry bounds the namespace's project in the registry.
type NamespaceRegistry struct {
	// Quota of the bytes of all its images.
	// +optional
	Quota *resource.Quantity `json:"quota,omitempty"`
	// ImmutableTags are patterns (path.Match) of repository:tag that cannot be pushed twice or deleted by hand.
	// +optional
	ImmutableTags []string `json:"immutableTags,omitempty"`
	// Retention keeps the newest tags of a pattern and removes older ones.
	// +optional
	Retention []RegistryRetention `json:"retention,omitempty"`
}

// RegistryRetention is one rule. A tag that no rule matches is kept.
type RegistryRetention struct {
	// Pattern (path.Match) of repository:tag.
	// +kubebuilder:validation:MinLength=1
	Pattern string `json:"pattern"`
	// KeepLast is how many of the tags that match are kept in each repository, the newest.
	// +kubebuilder:validation:Minimum=1
	KeepLast int32 `json:"keepLast"`
}

// Types of conditions of a SupervisorNamespace.
const (
	// NamespaceReady: everything is in place.
	NamespaceReady = "Ready"
	// NamespaceWithinLimits: nothing is above its limit. False after a limit was lowered; nothing is evicted.
	NamespaceWithinLimits = "WithinLimits"
	// NamespaceReservationsMet: the hosts have what is reserved.
	NamespaceReservationsMet = "ReservationsMet"
	// NamespacePeopleKnown: all who have access exist, or come from an issuer that does.
	NamespacePeopleKnown = "PeopleKnown"
	// NamespaceWithinTemplate: what somebody made by themselves is no wider than its template, or an administrator has widened
	// it. False after the template has become stricter: what the template allows is enforced.
	NamespaceWithinTemplate = "WithinTemplate"
	// NamespaceDeleting says what a deletion waits for.
	NamespaceDeleting = "Deleting"
)

// SupervisorNamespaceStatus is what the controller reports.
type SupervisorNamespaceStatus struct {
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Effective is the spec with what comes from its template and with all defaults: what is enforced. It is written
	// before anything else is done.
	// +optional
	Effective *SupervisorNamespaceSpec `json:"effective,omitempty"`
	// NamespaceEndpointURL is the API server that the namespace is reached at.
	// +optional
	NamespaceEndpointURL string `json:"namespaceEndpointURL,omitempty"`
	// RegistryProject is where its images are pushed to, HOST/NAMESPACE.
	// +optional
	RegistryProject string `json:"registryProject,omitempty"`
	// CPU, Memory and Storage are used/limit, for people.
	// +optional
	CPU string `json:"cpu,omitempty"`
	// +optional
	Memory string `json:"memory,omitempty"`
	// +optional
	Storage string `json:"storage,omitempty"`
	// Usage of everything that is bounded, and of CPU, memory and storage always.
	// +optional
	// +listType=map
	// +listMapKey=resource
	Usage []NamespaceUsage `json:"usage,omitempty"`
	// Top are the objects that use most, up to five of each of CPU, memory and storage.
	// +optional
	Top []NamespaceTop `json:"top,omitempty"`
}

// NamespaceUsage is one limit and what is used of it.
type NamespaceUsage struct {
	// Resource is cpu, memory, storage, registry, storageclass/NAME, or count/RESOURCE.
	Resource string            `json:"resource"`
	Used     resource.Quantity `json:"used"`
	// +optional
	Limit *resource.Quantity `json:"limit,omitempty"`
	// +optional
	Reservation *resource.Quantity `json:"reservation,omitempty"`
}

// NamespaceTop is one object that uses much.
type NamespaceTop struct {
	// Resource is cpu, memory or storage.
	Resource string            `json:"resource"`
	Kind     string            `json:"kind"`
	Name     string            `json:"name"`
	Used     resource.Quantity `json:"used"`
}

// SupervisorNamespaceTemplate is what owners may make namespaces from by themselves.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,categories=atoll,shortName=svnstemplate
// +kubebuilder:printcolumn:name="Self-service",type=boolean,JSONPath=".spec.selfService.enabled"
// +kubebuilder:printcolumn:name="Namespaces",type=integer,JSONPath=".status.namespaces"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type SupervisorNamespaceTemplate struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec SupervisorNamespaceTemplateSpec `json:"spec"`
	// +optional
	Status SupervisorNamespaceTemplateStatus `json:"status,omitempty"`
}

// SupervisorNamespaceTemplateList is a list of templates.
//
// +kubebuilder:object:root=true
type SupervisorNamespaceTemplateList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []SupervisorNamespaceTemplate `json:"items"`
}

// SupervisorNamespaceTemplateSpec says what a namespace made from it gets.
type SupervisorNamespaceTemplateSpec struct {
	// BasedOn is another template whose values this one takes where it says nothing itself. A cycle is refused.
	// +optional
	BasedOn string `json:"basedOn,omitempty"`
	// Template is the spec of the namespaces. In a namespace made by self-service its limits are bounds: they can be
	// lowered, lists can be narrowed, and nothing can be widened.
	Template SupervisorNamespaceSpec `json:"template"`
	// +optional
	SelfService TemplateSelfService `json:"selfService,omitempty"`
}

// TemplateSelfService says who may make namespaces from a template.
type TemplateSelfService struct {
	// Enabled lets owners of any SupervisorNamespace, and who is listed, make namespaces.
	// +optional
	Enabled bool `json:"enabled,omitempty"`
	// Subjects who may, owner of a namespace or not. The role is not used.
	// +optional
	Subjects []TemplateSubject `json:"subjects,omitempty"`
	// MaxPerUser bounds how many namespaces one user may have from it at a time. 0 is no bound.
	// +optional
	// +kubebuilder:validation:Minimum=0
	MaxPerUser int32 `json:"maxPerUser,omitempty"`
	// Default is the template of a plain `kubectl create namespace` by an owner.
	// +optional
	Default bool `json:"default,omitempty"`
}

// TemplateSubject is a user or group.
type TemplateSubject struct {
	// +kubebuilder:validation:Enum=User;Group
	SubjectType string `json:"subjectType"`
	// +kubebuilder:validation:MinLength=1
	Subject string `json:"subject"`
	// +optional
	// +kubebuilder:default=atoll.local
	Domain string `json:"domain,omitempty"`
}

// SupervisorNamespaceTemplateStatus is what the controller reports.
type SupervisorNamespaceTemplateStatus struct {
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Namespaces made from it.
	// +optional
	Namespaces int32 `json:"namespaces"`
}
