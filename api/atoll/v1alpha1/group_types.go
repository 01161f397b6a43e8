package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Group is a set of Users. To Kubernetes it is the group sso:NAME@atoll.local, so it can never be one of
// Kubernetes' own. Who is in it is looked up at each request.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,categories=atoll
// +kubebuilder:printcolumn:name="Members",type=string,JSONPath=".spec.members"
// +kubebuilder:printcolumn:name="Groups",type=string,JSONPath=".spec.groups",priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-._a-z0-9]*[a-z0-9])?$')",message="the name must be up to 63 lower-case letters, digits, '-' and '.', and begin and end with a letter or digit"
// +kubebuilder:validation:XValidation:rule="!has(self.spec) || !has(self.spec.groups) || !self.spec.groups.exists(g, g == self.metadata.name)",message="a group cannot be in itself"
type Group struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec GroupSpec `json:"spec,omitempty"`
}

// GroupList is a list of Groups.
//
// +kubebuilder:object:root=true
type GroupList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Group `json:"items"`
}

// GroupSpec is what an administrator decides.
type GroupSpec struct {
	// Members are names of Users. A name without a User means nothing until there is one.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=1000
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	Members []string `json:"members,omitempty"`
	// Groups are names of Groups whose members are members of this one, too. Groups that contain each other in a
	// circle have the same members.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=100
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	Groups []string `json:"groups,omitempty"`
}
