package manager

import (
	"fmt"
	"slices"
	"strings"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	vmopv1a2 "github.com/vmware-tanzu/vm-operator/api/v1alpha2"
	vmopv1a3 "github.com/vmware-tanzu/vm-operator/api/v1alpha3"
	vmopv1a4 "github.com/vmware-tanzu/vm-operator/api/v1alpha4"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
)

// NewScheme knows Kubernetes' own kinds and every kind that the controllers deal with.
func NewScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		clientgoscheme.AddToScheme,
		vmopv1a2.AddToScheme, vmopv1a3.AddToScheme, vmopv1a4.AddToScheme, vmopv1.AddToScheme,
		netop.AddToScheme, snapshotv1.AddToScheme, imageregistry.AddToScheme,
		atoll.AddToScheme, encryption.AddToScheme,
	} {
		if err := add(s); err != nil {
			return nil, fmt.Errorf("scheme: %w", err)
		}
	}
	return s, nil
}

// definedKinds are the kinds of the scheme that are defined by CustomResourceDefinitions, in the versions that are
// stored.
func definedKinds(s *runtime.Scheme) []schema.GroupVersionKind {
	var out []schema.GroupVersionKind
	for kind := range s.AllKnownTypes() {
		stored := kind.GroupVersion() == vmopv1.GroupVersion || kind.GroupVersion() == netop.GroupVersion ||
			kind.GroupVersion() == imageregistry.GroupVersion() || kind.GroupVersion() == atoll.GroupVersion()
		if stored && s.IsGroupRegistered(kind.Group) && s.Recognizes(kind.GroupVersion().WithKind(kind.Kind+"List")) {
			out = append(out, kind)
		}
	}
	slices.SortFunc(out, func(a, b schema.GroupVersionKind) int { return strings.Compare(a.String(), b.String()) })
	return out
}
