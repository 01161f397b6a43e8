#!/usr/bin/env bash
# Builds the upstream Kubernetes end-to-end suite and runs it against a running
# supervisor. Called by `make conformance`; needs root for nothing itself.
#
#   FOCUS     regular expression of specs (default: [NodeConformance])
#   SKIP      regular expression of specs left out (default: [Serial] and [Slow]; empty: none)
#   PROCS     specs at a time (default: 4)
#   STORAGE   if set, the specs of an external storage driver are run against csi.atoll.dev, which
#             storage/driver.yaml describes (default FOCUS: all of them)
#   ATOLL_DATA_DIR  of the supervisor (default: /var/lib/atoll)
#   KUBECONFIG      (default: the administrator's in there)
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
driver=()
if [ -n "${STORAGE:-}" ]; then
  FOCUS=${FOCUS:-'External\.Storage'}
  driver=(-storage.testdriver="$PWD/storage/driver.yaml" --repo-root="$PWD/storage")
fi
focus=${FOCUS:-'\[NodeConformance\]'}
skip=${SKIP-'\[Serial\]|\[Slow\]'}
procs=${PROCS:-4}
export ATOLL_DATA_DIR=${ATOLL_DATA_DIR:-/var/lib/atoll}
export KUBECONFIG=${KUBECONFIG:-$ATOLL_DATA_DIR/admin.kubeconfig}
out=$root/build/conformance
mkdir -p "$out"

version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
echo "building the suite of Kubernetes $version"
pkg=k8s.io/component-base/version
go test -c -vet=off -o "$out/e2e.test" \
  -ldflags "-s -w -X $pkg.gitVersion=$version -X $pkg.gitMajor=1 -X $pkg.gitMinor=$(echo "$version" | cut -d. -f2)" \
  k8s.io/kubernetes/test/e2e
go build -o "$out/ginkgo" github.com/onsi/ginkgo/v2/ginkgo

atoll=$root/bin/atoll
printf '#!/bin/sh\nexec %s kubectl "$@"\n' "$atoll" >"$out/kubectl"
chmod 755 "$out/kubectl"
"$atoll" image load "$root"/build/images/*.tar
"$atoll" kubectl apply -f policy.yaml
trap '"$atoll" kubectl delete --ignore-not-found -f policy.yaml' EXIT

status=0
"$out/ginkgo" --procs="$procs" --timeout="${TIMEOUT:-3h}" --flake-attempts=1 --no-color --silence-skips \
  --focus="$focus" --skip="$skip" --output-dir="$out" --json-report=report.json \
  "$out/e2e.test" -- \
  --kubeconfig="$KUBECONFIG" --provider=skeleton --kubectl-path="${KUBECTL:-$out/kubectl}" \
  "${driver[@]}" --allowed-not-ready-nodes=0 --num-nodes=1 --dump-logs-on-failure=false \
  --disable-log-dump=true >"$out/output.log" 2>&1 || status=$?
go run ./summary "$out/report.json"
exit $status
