package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Names that people are known by.
const (
	// IdentityNamespace holds the Secrets of people: password hashes, sessions, secrets of IdentityProviders.
	IdentityNamespace = "atoll-system"
	// FirstAdministrator is the User that a cluster begins with, AdministratorsGroup the Group whose members may do
	// everything.
	FirstAdministrator  = "administrator"
	AdministratorsGroup = "administrators"
	// PasswordSecretPrefix precedes the name of a User in the name of the Secret with the hash of the password.
	PasswordSecretPrefix = "user-"
	// PasswordHashKey is the entry of that Secret.
	PasswordHashKey = "hash"
	// PasswordChangedKey is the entry with the time (RFC 3339) the password was set at.
	PasswordChangedKey = "changed"
	// PasswordSecretLabel is on these Secrets; its value is the name of the User.
	PasswordSecretLabel = "atoll.dev/user"
)

// LocalSubject is the name of a local user or group in Kubernetes.
func LocalSubject(name string) string { return Subject(name, LocalDomain) }

// Subject is the name of a user or group of a domain in Kubernetes. An empty domain is the local one.
func Subject(name, domain string) string {
	if domain == "" {
		domain = LocalDomain
	}
	return SubjectPrefix + name + "@" + domain
}

// User is a person of the domain atoll.local. Its name is what they log in with; to Kubernetes they are
// sso:NAME@atoll.local. The hash of the password is in the Secret user-NAME in the namespace atoll-system; without
// it nobody logs in as this user. `atoll user` sets it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,categories=atoll
// +kubebuilder:printcolumn:name="Full name",type=string,JSONPath=".spec.fullName"
// +kubebuilder:printcolumn:name="Disabled",type=boolean,JSONPath=".spec.disabled"
// +kubebuilder:printcolumn:name="Last login",type=date,JSONPath=".status.lastLogin"
// +kubebuilder:printcolumn:name="Locked until",type=string,JSONPath=".status.lockedUntil",priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=".metadata.creationTimestamp"
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-._a-z0-9]*[a-z0-9])?$')",message="the name must be up to 63 lower-case letters, digits, '-' and '.', and begin and end with a letter or digit"
type User struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec UserSpec `json:"spec,omitempty"`
	// +optional
	Status UserStatus `json:"status,omitempty"`
}

// UserList is a list of Users.
//
// +kubebuilder:object:root=true
type UserList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []User `json:"items"`
}

// UserSpec is what an administrator decides.
type UserSpec struct {
	// +optional
	// +kubebuilder:validation:MaxLength=256
	FullName string `json:"fullName,omitempty"`
	// Disabled ends the sessions of the user and refuses new ones.
	// +optional
	Disabled bool `json:"disabled,omitempty"`
	// MustChangePassword refuses sessions until the user has set another password.
	// +optional
	MustChangePassword bool `json:"mustChangePassword,omitempty"`
	// SessionGeneration ends all sessions of the user when it is changed; `atoll user revoke` adds one.
	// +optional
	SessionGeneration int64 `json:"sessionGeneration,omitempty"`
}

// UserStatus is what logging in leaves behind.
type UserStatus struct {
	// +optional
	LastLogin *metav1.Time `json:"lastLogin,omitempty"`
	// LastLoginFrom is the address of it.
	// +optional
	LastLoginFrom string `json:"lastLoginFrom,omitempty"`
	// FailedLogins since the last one that was not, or since the lock was taken off.
	// +optional
	FailedLogins int32 `json:"failedLogins,omitempty"`
	// LockedUntil is the time before which no password is looked at. `atoll user unlock` removes it.
	// +optional
	LockedUntil *metav1.Time `json:"lockedUntil,omitempty"`
	// PasswordChanged is when the password was set.
	// +optional
	PasswordChanged *metav1.Time `json:"passwordChanged,omitempty"`
}
