#!/bin/bash
# The demo: starts a supervisor on this host, runs a small web application with
# a database in micro-VMs, virtual machines beside it, and shows them. `make demo`
# calls it; doing it again is fine, and the databases keep what they have.
#
#   run.sh <atoll binary> <data directory>
set -euo pipefail
atoll=$1
data=$2
here=$(cd "$(dirname "$0")" && pwd)
images=$here/../../build/images
disks=$here/../../build/vm
node_port=30080
hello_port=30081

say() { printf '\n== %s\n' "$*"; }
kubectl() { "$atoll" kubectl --kubeconfig "$data/admin.kubeconfig" "$@"; }
demo() { kubectl -n demo "$@"; }

# show <kubectl arguments>: prints the command as a person would type it, and
# runs it.
show() {
	printf '$ kubectl -n demo %s\n' "$*"
	demo "$@"
}

# secret <namespace> <name> <key> <command>: makes a Secret of what a command
# prints, unless there is one: what it protects must stay readable.
secret() {
	kubectl -n "$1" get secret "$2" -o name 2>/dev/null && return
	"${@:4}" | kubectl -n "$1" create secret generic "$2" --from-file="$3=/dev/stdin"
}
password() { head -c 18 /dev/urandom | base64 | tr -d '\n'; }

# page <path>: what the web server answers, within three minutes.
page() {
	local began=$SECONDS said=$SECONDS answer
	until answer=$(curl -fsS --max-time 10 "http://$address:$node_port$1" 2>&1); do
		if [ $((SECONDS - began)) -gt 180 ]; then
			echo "no answer from http://$address:$node_port$1: $answer" >&2
			demo get pods >&2
			exit 1
		fi
		if [ $((SECONDS - said)) -ge 10 ]; then
			said=$SECONDS
			echo "... $((SECONDS - began)) s; ready: $(demo get pods -l 'app in (db, api, web)' --no-headers | awk '{printf "%s %s  ", $1, $2}')"
		fi
		sleep 1
	done
	echo "$answer"
}

# try <seconds> <command>: runs a command until it succeeds.
try() {
	local began=$SECONDS limit=$1
	shift
	until "$@" 2>/dev/null; do
		if [ $((SECONDS - began)) -gt "$limit" ]; then
			echo "this did not succeed within $limit s: $*" >&2
			"$@"
			exit 1
		fi
		sleep 2
	done
}

# answers <text>: whether the Service hello answers with the text.
answers() { curl -fsS --max-time 10 "http://$address:$hello_port/" | grep "$1"; }

# rows: how many visits the database has.
rows() { demo exec db-0 -- psql -qAtc 'SELECT count(*) FROM visits'; }

# kept <rows> <event>: fails when the database has fewer rows than before.
kept() {
	local now
	page /api/visits
	now=$(rows)
	if [ "$now" -lt "$1" ]; then
		echo "the database had $1 rows before $2 and has $now now"
		exit 1
	fi
	echo "rows before $2: $1, and now: $now"
}

say "starting a supervisor on this host"
"$atoll" up --detach --data-dir "$data"

say "loading images (built from Debian packages, no registry)"
"$atoll" image load --data-dir "$data" "$images/busybox.tar" "$images/nginx.tar" "$images/postgres.tar"

say "importing disks of virtual machines (built from Debian packages)"
"$atoll" image import --data-dir "$data" "$disks/tiny.qcow2" --name tiny
"$atoll" image import --data-dir "$data" "$disks/debian-12-postgres.qcow2" --name debian-12-postgres

say "applying examples/demo"
kubectl apply -f "$here/namespace.yaml"
secret atoll-keys demo key head -c 32 /dev/urandom
secret demo db password password
# The client runs once: a Job cannot be changed, so an old one goes first.
demo delete job client --ignore-not-found >/dev/null 2>&1 || true
kubectl apply -f "$here"
show rollout status statefulset/db --timeout=300s
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
page /
echo "and the back end behind it, three times:"
for _ in 1 2 3; do
	page /api/hostname
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

say "PostgreSQL on an encrypted volume: /api/visits notes each visit there"
show get statefulset,pvc
"$atoll" volume ls --data-dir "$data" -o wide
for _ in 1 2 3; do
	page /api/visits
done

say "the database's pod is deleted; the new one has the same volume"
before=$(rows)
show delete pod db-0
show rollout status statefulset/db --timeout=180s
kept "$before" "its deletion"

say "virtual machines, in the same namespace: one API, one network, one scheduler"
show wait --for=condition=Ready vm/vmdb vm/hello-vm --timeout=900s
show get vm
show get pods -l vmoperator.vmware.com/vm-name

say "a Debian configured by cloud-init runs PostgreSQL; pods in micro-VMs write to it through the Service vmdb"
show rollout status deployment/ledger --timeout=180s
try 180 sh -c "'$atoll' kubectl --kubeconfig '$data/admin.kubeconfig' -n demo logs deployment/ledger --tail=2 | grep row"

say "kubectl on a virtual machine: logs and attach are its serial console, exec goes to its guest agent"
show logs vmdb --tail=5
try 120 demo exec vmdb -- uname -a
show exec vmdb -- sh -c 'lsblk -o NAME,SIZE,MOUNTPOINTS; systemctl is-active postgresql@15-main'
printf '$ kubectl -n demo attach -it hello-vm    # "hostname" is typed there\n'
(sleep 3; echo hostname; sleep 5) | script -qec "timeout 15 '$atoll' kubectl --kubeconfig '$data/admin.kubeconfig' -n demo attach -it hello-vm" /dev/null | tail -n 3 || true

say "one Service, its endpoints two pods and a virtual machine: http://$address:$hello_port/"
show get endpointslices -l kubernetes.io/service-name=hello
try 120 answers pod
try 120 answers virtual

say "atoll down, atoll up: every pod and virtual machine ends, and comes back"
ledger() { demo exec vmdb -- sudo -u postgres psql -qAtc 'SELECT count(*) FROM ledger'; }
before=$(rows)
written=$(ledger)
"$atoll" down --data-dir "$data"
"$atoll" up --detach --data-dir "$data"
echo "waiting for the application ..."
kept "$before" "atoll down"
show rollout status deployment/web --timeout=180s
show wait --for=condition=Ready vm/vmdb vm/hello-vm --timeout=900s
try 120 ledger >/dev/null
echo "rows that the virtual machine had: $written, and has now: $(ledger)"
[ "$(ledger)" -ge "$written" ]

say "the host"
"$atoll" status --data-dir "$data"

option=
[ "$data" = /var/lib/atoll ] || option=" --data-dir $data"
cat <<END

The demo works. Try:
  $atoll kubectl$option -n demo get pods
  $atoll kubectl$option -n demo exec -it deploy/web -- sh
  $atoll kubectl$option -n demo exec -it db-0 -- psql    # SELECT * FROM visits;
  $atoll kubectl$option -n demo edit configmap page      # the page follows within a minute
  $atoll vm ls$option -n demo
  $atoll vm console$option -n demo vmdb
  $atoll vm create$option mine --image tiny
  $atoll kubectl$option run box --image=busybox --image-pull-policy=IfNotPresent -it --rm -- sh
  $atoll status$option -o wide
Remove every trace of it with:
  make demo-down
END
