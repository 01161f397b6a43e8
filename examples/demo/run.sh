#!/bin/bash
# The demo: starts a supervisor on this host, runs a small web application in
# micro-VMs and shows it. `make demo` calls it; doing it again is fine.
#
#   run.sh <atoll binary> <data directory>
set -euo pipefail
atoll=$1
data=$2
here=$(cd "$(dirname "$0")" && pwd)
images=$here/../../build/images
node_port=30080

say() { printf '\n== %s\n' "$*"; }
kubectl() { "$atoll" kubectl --kubeconfig "$data/admin.kubeconfig" "$@"; }
demo() { kubectl -n demo "$@"; }

# show <kubectl arguments>: prints the command as a person would type it, and
# runs it.
show() {
	printf '$ kubectl -n demo %s\n' "$*"
	demo "$@"
}

say "starting a supervisor on this host"
"$atoll" up --detach --data-dir "$data"

say "loading images (built from Debian packages, no registry)"
"$atoll" image load --data-dir "$data" "$images/busybox.tar" "$images/nginx.tar"

say "applying examples/demo"
# The client runs once: a Job cannot be changed, so an old one goes first.
demo delete job client --ignore-not-found >/dev/null 2>&1 || true
kubectl apply -f "$here"
show rollout status deployment/api --timeout=180s
show rollout status deployment/web --timeout=180s
show wait --for=condition=complete job/client --timeout=180s

say "every pod runs in its own micro-VM"
show get pods -o wide
echo "kernel of this host:            $(uname -r)"
for pod in $(demo get pods -l app=web -o name); do
	echo "kernel in $pod: $(demo exec "$pod" -- cat /proc/sys/kernel/osrelease) (booted $(demo exec "$pod" -- cut -d' ' -f1 /proc/uptime) s ago)"
done

address=$(kubectl get nodes -o 'jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}')
say "the web server answers at http://$address:$node_port/ (a NodePort)"
for attempt in $(seq 30); do
	if curl -fsS --max-time 5 "http://$address:$node_port/"; then
		break
	fi
	[ "$attempt" -lt 30 ] || { echo "no answer"; exit 1; }
	sleep 1
done
echo "and the back end behind it, three times:"
for _ in 1 2 3; do
	curl -fsS --max-time 5 "http://$address:$node_port/api/hostname"
done

say "what a pod sees of the Service by name"
show logs job/client

say "a rollout: the pods are replaced one after the other, the page stays reachable"
demo rollout restart deployment/web
failures=0
requests=0
while ! demo rollout status deployment/web --watch=false | grep -q 'successfully rolled out'; do
	curl -fsS --max-time 5 -o /dev/null "http://$address:$node_port/" || failures=$((failures + 1))
	requests=$((requests + 1))
	sleep 0.2
done
echo "$requests requests during the rollout, $failures failed"

say "the host"
"$atoll" status --data-dir "$data"

option=
[ "$data" = /var/lib/atoll ] || option=" --data-dir $data"
cat <<END

The demo works. Try:
  $atoll kubectl$option -n demo get pods
  $atoll kubectl$option -n demo exec -it deploy/web -- sh
  $atoll kubectl$option -n demo edit configmap page      # the page follows within a minute
  $atoll kubectl$option run box --image=busybox --image-pull-policy=IfNotPresent -it --rm -- sh
  $atoll status$option -o wide
Remove every trace of it with:
  make demo-down
END
