package apiserver

import (
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/generic"
)

// withoutWatchCache leaves out the watch cache of kinds served in many versions.
//
// The API server has one such cache for each version of a custom resource and fills all of them always: each change of
// a virtual machine would be converted to every version by the webhook, and each machine be held four times, although
// hardly anybody watches but the controllers, in the version that is stored. Their watches read etcd instead.
type withoutWatchCache struct{ generic.RESTOptionsGetter }

// GetRESTOptions implements generic.RESTOptionsGetter.
func (g withoutWatchCache) GetRESTOptions(resource schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
	opts, err := g.RESTOptionsGetter.GetRESTOptions(resource, example)
	if err == nil && resource.Group == vmopv1.GroupName {
		opts.Decorator = generic.UndecoratedStorage
	}
	return opts, err
}
