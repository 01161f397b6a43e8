// Package csi connects a CSI driver on this host with Kubernetes: it registers the driver with the kubelet
// and runs what usually are its sidecar containers (external-provisioner, external-attacher,
// external-resizer, external-snapshotter) as libraries in the agent, on one set of informers.
//
// It is not the driver, which is internal/storage/csi and is reached over its socket like any other. The
// agent calls Run with a kubeconfig of its own, whose rights internal/kube/bootstrap gives. The sidecars run
// in the way that external-provisioner calls node deployment: each host's agent does what concerns its host
// and leaves the rest to the others. docs/decisions/0008-csi-sidecars-as-libraries.md says how this fits
// into one process.
//
// What can go wrong: the API server or the driver is away; everything is tried again, with pauses that grow.
package csi
