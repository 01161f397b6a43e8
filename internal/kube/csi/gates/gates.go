// Package gates lets the libraries of the CSI sidecars and the Kubernetes components live in one process.
//
// Both register feature gates of the same names in the same registry while the process starts, but with
// different histories: the sidecars know only today's state. Who comes second fails; the sidecars ignore
// that, Kubernetes panics. So this package, which comes before both, registers these gates with the history
// that Kubernetes has (which makes its own registration a repetition, and that is allowed), and the gates
// that only the sidecars have (which their failed registration would leave out).
//
// That it comes first follows from the Go specification: of the packages whose imports are initialized the
// one with the lowest import path is next, and this one imports no more than the feature packages of the
// sidecars do, with a lower path. docs/decisions/0008-csi-sidecars-as-libraries.md has the whole story. What
// can go wrong: a new version of Kubernetes or of a sidecar changes a gate. Then every process of this
// module that holds both panics at start and names the gate, so no test passes.
package gates

import (
	"k8s.io/apimachinery/pkg/util/version"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/component-base/featuregate"
)

// Registered is the outcome, nil when everything went well. Whoever uses a sidecar looks at it.
var Registered = register()

func register() error {
	at := func(v string, on bool, stage string) featuregate.FeatureSpec {
		spec := featuregate.FeatureSpec{Version: version.MustParse(v), Default: on}
		switch stage {
		case "alpha":
			spec.PreRelease = featuregate.Alpha
		case "beta":
			spec.PreRelease = featuregate.Beta
		case "locked":
			spec.PreRelease, spec.LockToDefault = featuregate.GA, true
		default:
			spec.PreRelease = featuregate.GA
		}
		return spec
	}
	// As in k8s.io/kubernetes/pkg/features/kube_features.go.
	err := utilfeature.DefaultMutableFeatureGate.AddVersioned(map[featuregate.Feature]featuregate.VersionedSpecs{
		"CrossNamespaceVolumeDataSource": {at("1.26", false, "alpha")},
		"MutableCSINodeAllocatableCount": {
			at("1.33", false, "alpha"), at("1.34", false, "beta"), at("1.35", true, "beta"), at("1.36", true, "locked"),
		},
		"RecoverVolumeExpansionFailure": {at("1.23", false, "alpha"), at("1.32", true, "beta"), at("1.34", true, "locked")},
		"VolumeAttributesClass": {
			at("1.29", false, "alpha"), at("1.31", false, "beta"), at("1.34", true, "ga"), at("1.36", true, "locked"),
		},
	})
	if err != nil {
		return err
	}
	// As in pkg/features of the sidecars.
	return utilfeature.DefaultMutableFeatureGate.Add(map[featuregate.Feature]featuregate.FeatureSpec{
		"Topology":                    {Default: true, PreRelease: featuregate.GA},
		"AnnotateFsResize":            {Default: false, PreRelease: featuregate.Alpha},
		"ReleaseLeaderElectionOnExit": {Default: false, PreRelease: featuregate.Alpha},
		"CSIVolumeGroupSnapshot":      {Default: false, PreRelease: featuregate.Beta},
	})
}
