package gates_test

import (
	"testing"

	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/component-base/featuregate"

	attacher "github.com/kubernetes-csi/external-attacher/v4/pkg/features"
	provisioner "github.com/kubernetes-csi/external-provisioner/v6/pkg/features"
	resizer "github.com/kubernetes-csi/external-resizer/v2/pkg/features"
	snapshotter "github.com/kubernetes-csi/external-snapshotter/v8/pkg/features"
	_ "k8s.io/kubernetes/pkg/features" // panics at start when a gate differs

	"atoll.dev/atoll/internal/kube/csi/gates"
)

// TestEveryGateOfTheSidecarsIsKnown would panic, not fail, on a gate that is not.
func TestEveryGateOfTheSidecarsIsKnown(t *testing.T) {
	if gates.Registered != nil {
		t.Fatal(gates.Registered)
	}
	for gate, want := range map[featuregate.Feature]bool{
		provisioner.Topology: true, provisioner.CrossNamespaceVolumeDataSource: false, provisioner.VolumeAttributesClass: true,
		provisioner.ReleaseLeaderElectionOnExit: false, attacher.MutableCSINodeAllocatableCount: true,
		resizer.AnnotateFsResize: false, resizer.RecoverVolumeExpansionFailure: true, snapshotter.VolumeGroupSnapshot: false,
	} {
		if got := utilfeature.DefaultFeatureGate.Enabled(gate); got != want {
			t.Errorf("%s is %v", gate, got)
		}
	}
}
