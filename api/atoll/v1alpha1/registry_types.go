package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Names of the registry.
const (
	// RegistryGroup and RegistryRepositories are the resource that rights in the registry are given on: get is pull, update
	// push, delete and list what they say. The namespace is the project.
	RegistryGroup        = "registry.atoll.dev"
	RegistryRepositories = "repositories"
	// RegistryHost is the name that every host of the cluster finds the registry by.
	RegistryHost = "registry.atoll.local"
	// RegistryAudience is the audience of service account tokens for the registry.
	RegistryAudience = "registry.atoll.local"
	// RegistryLibrary is the project that every identity may pull from and administrators push to.
	RegistryLibrary = "library"
	// RegistryConfigurationName is the name of the one RegistryConfiguration.
	RegistryConfigurationName = "cluster"
	// RobotPrefix precedes NAMESPACE+NAME in the user name of a robot account.
	RobotPrefix = "robot$"
)

// RobotUser is the name a robot account logs in with.
func RobotUser(namespace, name string) string { return RobotPrefix + namespace + "+" + name }

// RobotAccount is a credential for the registry project of its namespace, for programs.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,categories=atoll,shortName=robot
// +kubebuilder:printcolumn:name="User",type=string,JSONPath=".status.user"
// +kubebuilder:printcolumn:name="Permissions",type=string,JSONPath=".spec.permissions"
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].status"
// +kubebuilder:printcolumn:name="Expires",type=string,JSONPath=".spec.expiresAt"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63",message="the name must have at most 63 characters"
type RobotAccount struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec RobotAccountSpec `json:"spec"`
	// +optional
	Status RobotAccountStatus `json:"status,omitempty"`
}

// RobotAccountList is a list of robot accounts.
//
// +kubebuilder:object:root=true
type RobotAccountList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []RobotAccount `json:"items"`
}

// RobotPermission is what a robot account may do in its project.
//
// +kubebuilder:validation:Enum=pull;push
type RobotPermission string

// Permissions of robot accounts. Push includes pull.
const (
	RobotPull RobotPermission = "pull"
	RobotPush RobotPermission = "push"
)

// RobotAccountSpec says what the account is for.
type RobotAccountSpec struct {
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Description string `json:"description,omitempty"`
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=2
	Permissions []RobotPermission `json:"permissions"`
	// ExpiresAt is when the account ends to work. Never when omitted.
	// +optional
	ExpiresAt *metav1.Time `json:"expiresAt,omitempty"`
	// SecretName is the Secret of type kubernetes.io/dockerconfigjson that the password is written to; the name of the
	// account with robot- before it when omitted. It cannot change.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="secretName cannot change"
	SecretName string `json:"secretName,omitempty"`
	// Rotation is raised to have a new password made; the old one ends at once.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Rotation int64 `json:"rotation,omitempty"`
}

// RobotReady is the condition that sums a robot account up.
const RobotReady = "Ready"

// RobotAccountStatus is what the controller reports.
type RobotAccountStatus struct {
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// User is the name to log in with.
	// +optional
	User string `json:"user,omitempty"`
	// SecretName is the Secret with the password.
	// +optional
	SecretName string `json:"secretName,omitempty"`
	// SecretHash is the SHA-256 of the password, which has 256 bits of chance, so that the hash tells nothing.
	// +optional
	SecretHash string `json:"secretHash,omitempty"`
	// Rotation that the password belongs to.
	// +optional
	Rotation int64 `json:"rotation,omitempty"`
}

// RegistryConfiguration says how the hosts of the cluster reach registries. There is one, called cluster.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,categories=atoll
// +kubebuilder:printcolumn:name="External",type=string,JSONPath=".spec.external.url"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
// +kubebuilder:validation:XValidation:rule="self.metadata.name == 'cluster'",message="there is one RegistryConfiguration, and its name is cluster"
type RegistryConfiguration struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec RegistryConfigurationSpec `json:"spec,omitempty"`
}

// RegistryConfigurationList is a list of configurations.
//
// +kubebuilder:object:root=true
type RegistryConfigurationList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []RegistryConfiguration `json:"items"`
}

// RegistryConfigurationSpec is what the administrator decides.
type RegistryConfigurationSpec struct {
	// Mirrors of upstream registries, which hosts ask first.
	// +optional
	// +listType=map
	// +listMapKey=registry
	// +kubebuilder:validation:MaxItems=100
	Mirrors []RegistryMirror `json:"mirrors,omitempty"`
	// External is a registry (Harbor or another) that is used in place of the embedded one.
	// +optional
	External *ExternalRegistry `json:"external,omitempty"`
	// GarbageCollection of the embedded registry.
	// +optional
	GarbageCollection RegistryGarbageCollection `json:"garbageCollection,omitempty"`
}

// RegistryMirror says where images of an upstream registry are pulled from.
//
// +kubebuilder:validation:XValidation:rule="self.registry != 'registry.atoll.local'",message="the cluster's own registry has no mirror: it would be sent the tokens of pods; spec.external names a registry in its place"
type RegistryMirror struct {
	// Registry is the upstream registry as images name it, HOST or HOST:PORT.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?(:[0-9]{1,5})?$`
	Registry string `json:"registry"`
	// Endpoints are tried in order, and the upstream registry itself last.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=10
	Endpoints []RegistryEndpoint `json:"endpoints"`
	// CA is the PEM certificates the endpoints are trusted by. Those of the host when omitted.
	// +optional
	// +kubebuilder:validation:MaxLength=65536
	CA string `json:"ca,omitempty"`
}

// RegistryEndpoint is the URL of a registry, http or https, with no path or with one that is used as it is.
//
// +kubebuilder:validation:MaxLength=1024
// +kubebuilder:validation:Pattern=`^https?://[^\s"'\\?#@]+$`
type RegistryEndpoint string

// ExternalRegistry is a registry in place of the embedded one.
type ExternalRegistry struct {
	// URL such as https://harbor.example.com. registry.atoll.local/NAMESPACE/... is pulled from there.
	URL RegistryEndpoint `json:"url"`
	// CA is the PEM certificates it is trusted by. Those of the host when omitted.
	// +optional
	// +kubebuilder:validation:MaxLength=65536
	CA string `json:"ca,omitempty"`
}

// RegistryGarbageCollection says when what nobody uses is removed.
type RegistryGarbageCollection struct {
	// UntaggedAge is how long a manifest that no tag points to, and that nobody has pulled, is kept.
	// +optional
	// +kubebuilder:default="168h"
	UntaggedAge *metav1.Duration `json:"untaggedAge,omitempty"`
}
