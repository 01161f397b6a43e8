#!/bin/sh
# Regenerates the CustomResourceDefinitions of vmoperator.vmware.com from the module with their types, with
# controller-gen, which is pinned in tools/controllergen/go.mod.
set -eu
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
go build -C "$root/tools/controllergen" -o "$out/controller-gen" sigs.k8s.io/controller-tools/cmd/controller-gen
module=github.com/vmware-tanzu/vm-operator/api
cd "$root"
"$out/controller-gen" crd:maxDescLen=0 "paths=$module/v1alpha2;$module/v1alpha3;$module/v1alpha4;$module/v1alpha5" "output:crd:dir=$out/crds"
cat "$out"/crds/*.yaml >api/vmoperator/crds.yaml
