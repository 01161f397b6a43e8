package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Keys of Secrets of IdentityProviders.
const (
	// ClientSecretKey is the entry of the Secret that clientSecretRef names.
	ClientSecretKey = "clientSecret"
)

// Types of conditions of an IdentityProvider.
const (
	// IdentityProviderReady: the API server takes its tokens. False says what is wrong with it.
	IdentityProviderReady = "Ready"
)

// IdentityProvider is an OIDC issuer whose users may use this cluster. To Kubernetes its users and groups are
// sso:NAME@DOMAIN.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,categories=atoll,shortName=idp
// +kubebuilder:printcolumn:name="Domain",type=string,JSONPath=".spec.domain"
// +kubebuilder:printcolumn:name="Issuer",type=string,JSONPath=".spec.issuerURL"
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].status"
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=".status.conditions[?(@.type=='Ready')].reason"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
type IdentityProvider struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec IdentityProviderSpec `json:"spec"`
	// +optional
	Status IdentityProviderStatus `json:"status,omitempty"`
}

// IdentityProviderList is a list of IdentityProviders.
//
// +kubebuilder:object:root=true
type IdentityProviderList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []IdentityProvider `json:"items"`
}

// IdentityProviderSpec describes the issuer and how its tokens are read.
type IdentityProviderSpec struct {
	// DisplayName is for people who choose where to log in.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	DisplayName string `json:"displayName,omitempty"`
	// Domain of its users and groups. atoll.local and what is below it is reserved.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`
	// +kubebuilder:validation:XValidation:rule="self != 'atoll.local' && !self.endsWith('.atoll.local')",message="atoll.local is the domain of local users; choose another domain"
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="the domain cannot be changed: what its users may do is bound to it; make another IdentityProvider"
	Domain string `json:"domain"`
	// IssuerURL is what the claim iss of its tokens says; /.well-known/openid-configuration below it is read.
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:Pattern=`^https://[^/?#@\s]+(/[^?#\s]*)?$`
	IssuerURL string `json:"issuerURL"`
	// ClientID is that of Atoll at the issuer; tokens must be made for it.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	ClientID string `json:"clientID"`
	// ClientSecretRef names a Secret in the namespace atoll-system whose entry clientSecret is the secret of the
	// client. It stays on the server. A public client needs none.
	// +optional
	ClientSecretRef *IdentityProviderSecretRef `json:"clientSecretRef,omitempty"`
	// CertificateAuthority is the PEM of the authority of the issuer's certificate. Empty means those of the host.
	// +optional
	// +kubebuilder:validation:MaxLength=65536
	CertificateAuthority string `json:"certificateAuthority,omitempty"`
	// UsernameClaim is the claim with the name of the user, perhaps a path: a.b. A name that ends with @DOMAIN loses
	// it; a name with another @ is refused.
	// +optional
	// +kubebuilder:default=preferred_username
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`
	UsernameClaim string `json:"usernameClaim,omitempty"`
	// GroupsClaim is the claim with the list of the names of groups. Names that are none are left out.
	// +optional
	// +kubebuilder:default=groups
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`
	GroupsClaim string `json:"groupsClaim,omitempty"`
	// Scopes are asked for at login.
	// +optional
	// +kubebuilder:default={"openid","profile","email","offline_access"}
	// +kubebuilder:validation:MaxItems=16
	Scopes []string `json:"scopes,omitempty"`
}

// IdentityProviderSecretRef names a Secret.
type IdentityProviderSecretRef struct {
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// IdentityProviderStatus is what the server found.
type IdentityProviderStatus struct {
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}
