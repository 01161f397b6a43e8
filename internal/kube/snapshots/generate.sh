#!/bin/sh
# Copies the CustomResourceDefinitions of the snapshot API out of the module of their client, without the
# comments and without the notes of its authors to themselves.
set -eu
cd "$(dirname "$0")"
dir=$(go list -m -f '{{.Dir}}' github.com/kubernetes-csi/external-snapshotter/client/v8)/config/crd
for kind in volumesnapshotclasses volumesnapshotcontents volumesnapshots; do
	echo ---
	sed -e '/^---$/d' -e 's/TO\(DO\)/To do/' "$dir/snapshot.storage.k8s.io_$kind.yaml"
done >crds.yaml
