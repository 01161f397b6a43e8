package v1alpha1

import (
	_ "embed"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupName and Version of this API.
const (
	GroupName = "atoll.dev"
	Version   = "v1alpha1"
)

// GroupVersion is group and version as the libraries want them.
func GroupVersion() schema.GroupVersion {
	return schema.GroupVersion{Group: GroupName, Version: Version}
}

// Datastores is the resource of kind Datastore.
func Datastores() schema.GroupVersionResource { return GroupVersion().WithResource("datastores") }

// SupervisorNamespaces is the resource of kind SupervisorNamespace.
func SupervisorNamespaces() schema.GroupVersionResource {
	return GroupVersion().WithResource("supervisornamespaces")
}

// SupervisorNamespaceTemplates is the resource of kind SupervisorNamespaceTemplate.
func SupervisorNamespaceTemplates() schema.GroupVersionResource {
	return GroupVersion().WithResource("supervisornamespacetemplates")
}

// RobotAccounts is the resource of kind RobotAccount.
func RobotAccounts() schema.GroupVersionResource { return GroupVersion().WithResource("robotaccounts") }

// RegistryConfigurations is the resource of kind RegistryConfiguration.
func RegistryConfigurations() schema.GroupVersionResource {
	return GroupVersion().WithResource("registryconfigurations")
}

// Users is the resource of kind User.
func Users() schema.GroupVersionResource { return GroupVersion().WithResource("users") }

// Groups is the resource of kind Group.
func Groups() schema.GroupVersionResource { return GroupVersion().WithResource("groups") }

// IdentityProviders is the resource of kind IdentityProvider.
func IdentityProviders() schema.GroupVersionResource {
	return GroupVersion().WithResource("identityproviders")
}

// AddToScheme adds the kinds of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion(), &Datastore{}, &DatastoreList{},
		&SupervisorNamespace{}, &SupervisorNamespaceList{}, &SupervisorNamespaceTemplate{}, &SupervisorNamespaceTemplateList{},
		&User{}, &UserList{}, &Group{}, &GroupList{}, &IdentityProvider{}, &IdentityProviderList{},
		&RobotAccount{}, &RobotAccountList{}, &RegistryConfiguration{}, &RegistryConfigurationList{})
	metav1.AddToGroupVersion(s, GroupVersion())
	return nil
}

// CRDs are the CustomResourceDefinitions of this package as YAML documents.
//
//go:embed crds.yaml
var CRDs []byte
