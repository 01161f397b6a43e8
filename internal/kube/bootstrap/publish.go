package bootstrap

import (
	"fmt"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/datadir/pki"
)

// publishManifests are the library of the registry's project for all, and who may publish into projects of the registry.
func publishManifests() []manifest {
	const library, single, group = "atoll-registry-library", "atoll-publish-to-registry", "atoll-publish-group-to-registry"
	return []manifest{
		{resource: imageregistry.GroupVersion().WithResource("clustercontentlibraries"), once: true, text: fmt.Sprintf(`
apiVersion: imageregistry.vmware.com/v1alpha1
kind: ClusterContentLibrary
metadata:
  name: %s
spec:
  registry:
    project: %s
`, imageregistry.RegistryLibrary, atoll.RegistryLibrary)},
		{resource: policies("validatingadmissionpolicies"), text: fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: %[1]s
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
    - apiGroups: [imageregistry.vmware.com]
      apiVersions: ["*"]
      operations: [CREATE, UPDATE]
      resources: [contentlibraries]
  validations:
  - expression: >-
      !has(object.spec) || !has(object.spec.registry) || (oldObject != null && has(oldObject.spec) && oldObject.spec == object.spec) ||
      request.userInfo.username == %[2]q ||
      authorizer.group(%[3]q).resource(%[4]q).namespace(request.namespace).check("update").allowed()
    messageExpression: >-
      "spec.registry: whoever makes the project of namespace " + request.namespace + " a library has to have the right to push there: to update %[4]s.%[3]s in the namespace, which the role Edit has"
    reason: Forbidden
`, library, pki.VMControllerUser, atoll.RegistryGroup, atoll.RegistryRepositories)},
		{resource: policies("validatingadmissionpolicybindings"), text: policyBinding(library)},
		{resource: policies("validatingadmissionpolicies"), text: publishPolicy(single, "virtualmachinepublishrequests", "object.?spec.?target.?location.?name")},
		{resource: policies("validatingadmissionpolicybindings"), text: publishBinding(single)},
		{resource: policies("validatingadmissionpolicies"), text: publishPolicy(group, "virtualmachinegrouppublishrequests", "object.?spec.?target")},
		{resource: policies("validatingadmissionpolicybindings"), text: publishBinding(group)},
	}
}

// publishPolicy lets only those publish into a library that is a project of the registry who may push there: the host
// that does it pushes as itself. It is asked for each library of the namespace; target is the name that a request has.
func publishPolicy(name, resource, target string) string {
	return fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: %s
spec:
  failurePolicy: Fail
  paramKind:
    apiVersion: imageregistry.vmware.com/v1alpha1
    kind: ContentLibrary
  matchConstraints:
    resourceRules:
    - apiGroups: [vmoperator.vmware.com]
      apiVersions: ["*"]
      operations: [CREATE, UPDATE]
      resources: [%s]
  variables:
  - name: target
    expression: '%s.orValue("")'
  - name: meant
    expression: >-
      params.metadata.name == variables.target ||
      variables.target == "" && (params.metadata.name == %q || %q in params.metadata.?labels.orValue({}))
  validations:
  - expression: >-
      !has(params.spec) || !has(params.spec.registry) || !variables.meant ||
      (oldObject != null && has(oldObject.spec) && has(object.spec) && oldObject.spec == object.spec) ||
      request.userInfo.username == %q ||
      authorizer.group(%q).resource(%q).namespace(request.namespace).check("update").allowed()
    messageExpression: >-
      "ContentLibrary " + params.metadata.name + " is the project of namespace " + request.namespace + " in the registry, and " + request.userInfo.username +
      " may not push there: it takes the right to update %[8]s.%[7]s in the namespace, which the role Edit has; name another library"
    reason: Forbidden
`, name, resource, target, imageregistry.DefaultLibrary, imageregistry.DefaultLibraryLabel, pki.VMControllerUser, atoll.RegistryGroup, atoll.RegistryRepositories)
}

// publishBinding asks a publishPolicy about all libraries of the request's namespace.
func publishBinding(name string) string {
	return policyBinding(name, `  paramRef:
    selector: {}
    parameterNotFoundAction: Allow
`)
}
