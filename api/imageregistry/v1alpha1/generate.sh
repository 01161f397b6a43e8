#!/bin/sh
# Regenerates the deep copies and the CustomResourceDefinitions of this package with controller-gen, which
# is pinned in tools/controllergen/go.mod.
set -eu
cd "$(dirname "$0")"
root=$(cd ../../.. && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
go build -C "$root/tools/controllergen" -o "$out/controller-gen" sigs.k8s.io/controller-tools/cmd/controller-gen
"$out/controller-gen" object paths=.
"$out/controller-gen" crd paths=. "output:crd:dir=$out/crds"
cat "$out"/crds/*.yaml >crds.yaml
