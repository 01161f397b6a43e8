// Package csi is the CSI driver csi.atoll.dev: its identity and controller services over the datastores of
// this host, and the gRPC server they and the node service (internal/storage/csi/node) are reached at.
//
// One driver runs in each host's agent, next to the kubelet; it is node-local ("node deployment" in the
// words of external-provisioner). It knows nothing of Kubernetes objects: the sidecars in internal/kube/csi
// call it over a unix socket like any other CSI driver. The protocol is the Container Storage Interface 1.13
// (https://github.com/container-storage-interface/spec).
//
// Who holds what. A volume's holder in the engine is one use of it: the node service attaches with
// Holder(node, use) when a volume is published to a pod, so that the engine's lock covers just the time that
// something has the images open, and nothing else can open them for writing. ControllerPublishVolume
// therefore attaches nothing: it checks that the volume may go to the node, and notes the mode in a label.
// ControllerUnpublishVolume drops the label and what holders of the node are left. Kubernetes calls neither
// (attachRequired is false, docs/decisions/0009).
//
// Handles of volumes and snapshots are <datastore>/<id>. The id comes from the name that the caller gives,
// so that a call that is made again finds what the first one made.
//
// What can go wrong: every error of the engine is translated to a gRPC code in one place (status). Calls
// that take long go on when their caller gives up, and the next call of the same name waits for them. A
// datastore that is not open (yet) is Unavailable, never NotFound: nothing is forgotten because of a start.
package csi
