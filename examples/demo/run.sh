#!/bin/bash
# The demo: starts a supervisor on this host. The administrator makes a namespace
# with limits and a user, dana; dana logs in, pushes images to the namespace's
# project in the registry, and runs a small web application with a database in
# micro-VMs and virtual machines beside it. `make demo` calls this; doing it again
# is fine, and the databases keep what they have.
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
# dana's home directory: a password, and after the login a kubeconfig.
home=$data/demo

say() { printf '\n== %s\n' "$*"; }
# The administrator, dana, and dana in the namespace demo.
kubectl() { "$atoll" kubectl --kubeconfig "$data/admin.kubeconfig" "$@"; }
dana() { HOME=$home KUBECONFIG=$home/.kube/config "$atoll" "$@"; }
demo() { dana kubectl -n demo "$@"; }

# show <kubectl arguments>: prints the command as a person would type it, and
# runs it.
show() {
	printf '$ kubectl -n demo %s\n' "$*"
	demo "$@"
}

# refused <what it must say>... -- <kubectl arguments>: the same for what must be
# refused, all of it, and for these reasons.
refused() {
	local said wants=()
	while [ "$1" != -- ]; do
		wants+=("$1")
		shift
	done
	shift
	printf '$ kubectl -n demo %s\n' "$*"
	if said=$(demo "$@" 2>&1) || grep -q ' created$' <<<"$said"; then
		echo "this should have been refused: $said" >&2
		exit 1
	fi
	echo "$said"
	for want in "${wants[@]}"; do
		if ! grep -qF -- "$want" <<<"$said"; then
			echo "this should have been refused for another reason: $want" >&2
			exit 1
		fi
	done
}

# secret <name> <key> <command> <kubectl>: makes a Secret of what a command
# prints, unless there is one: what it protects must stay readable.
secret() {
	"${@:4}" get secret "$1" -o name 2>/dev/null && return
	$3 | "${@:4}" create secret generic "$1" --from-file="$2=/dev/stdin"
}
password() { head -c 18 /dev/urandom | base64 | tr -d '\n'; }
key() { head -c 32 /dev/urandom; }

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

say "importing disks of virtual machines (built from Debian packages)"
for disk in tiny debian-12-postgres; do
	"$atoll" image import --data-dir "$data" "$disks/$disk.qcow2" --name "$disk" && continue
	# The disk of an earlier build has that name. Machines made of it keep theirs.
	"$atoll" image rm --data-dir "$data" --vm "$disk"
	"$atoll" image import --data-dir "$data" "$disks/$disk.qcow2" --name "$disk"
done

say "the administrator: a user, and a namespace with limits (examples/demo/namespace.yaml)"
mkdir -p -m 0700 "$home"
[ -s "$home/password" ] || (umask 077 && password >"$home/password")
kubectl get user.atoll.dev dana -o name 2>/dev/null ||
	"$atoll" user create dana --data-dir "$data" --must-change=false --password-stdin <"$home/password"
secret demo key key kubectl -n atoll-keys
kubectl apply -f "$here/namespace.yaml"
kubectl wait --for=condition=Ready supervisornamespace/demo --timeout=120s

address=$(kubectl get nodes -o 'jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}')
say "dana: logs in, and pushes the images (built from Debian packages) to registry.atoll.local/demo"
fingerprint=$("$atoll" login fingerprint --data-dir "$data") # what the administrator tells people, with the address
printf '$ atoll login --server %s --user dana --fingerprint %s\n' "$address" "$fingerprint"
dana login --server "$address" --user dana --fingerprint "$fingerprint" --password-stdin <"$home/password"
show auth whoami
for image in busybox nginx postgres; do
	printf '$ atoll image push %s registry.atoll.local/demo/%s:1\n' "$image.tar" "$image"
	dana image push "$images/$image.tar" "registry.atoll.local/demo/$image:1"
done

say "dana: applies examples/demo"
secret db password password demo
# The client runs once: a Job cannot be changed, so an old one goes first.
demo delete job client --ignore-not-found >/dev/null 2>&1 || true
demo apply -f "$here/database.yaml" -f "$here/demo.yaml" -f "$here/machines.yaml"

say "what is too much is refused: by whom it was bounded, what is used, what was asked (examples/demo/too-much.yaml)"
refused 'requested: limits.memory=' spec.images spec.vmClasses -- create -f "$here/too-much.yaml"
refused forbidden -- -n default get pods
refused forbidden -- patch resourcequota demo-quota --type=merge -p '{"spec":{"hard":{"limits.memory":"1Ti"}}}'

say "waiting for the application"
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
lines() { demo logs deployment/ledger --tail=2 | grep row; }
try 180 lines

say "kubectl on a virtual machine: logs and attach are its serial console, exec goes to its guest agent"
show logs vmdb --tail=5
try 120 demo exec vmdb -- uname -a
show exec vmdb -- sh -c 'lsblk -o NAME,SIZE,MOUNTPOINTS; systemctl is-active postgresql@15-main'
printf '$ kubectl -n demo attach -it hello-vm    # "hostname" is typed there\n'
# attach does not end by itself; the prompt of the guest shows that it was there.
attached() {
	(sleep 3; echo hostname; sleep 5) |
		HOME=$home KUBECONFIG=$home/.kube/config script -qec "timeout --foreground 15 '$atoll' kubectl -n demo attach -it hello-vm" /dev/null |
		cat >"$home/attach" || true
	grep -q 'root@hello-vm' "$home/attach"
}
try 120 attached
tail -n 3 "$home/attach"

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

say "what the namespace uses of its limits"
"$atoll" ns describe demo --data-dir "$data"

say "the host"
"$atoll" status --data-dir "$data"

option=
[ "$data" = /var/lib/atoll ] || option=" --data-dir $data"
cat <<END

The demo works. Try, as dana:
  export KUBECONFIG=$home/.kube/config
  $atoll kubectl get pods
  $atoll kubectl exec -it deploy/web -- sh
  $atoll kubectl exec -it db-0 -- psql    # SELECT * FROM visits;
  $atoll kubectl edit configmap page      # the page follows within a minute
  $atoll kubectl run box --image=registry.atoll.local/demo/busybox:1 -it --rm -- sh
  $atoll vm ls -n demo
  $atoll vm console -n demo vmdb
  $atoll vm create mine -n demo --image tiny --class demo-tiny
and as the administrator:
  $atoll ns ls$option
  $atoll ns top demo$option
  $atoll ns edit demo$option --memory-limit 6Gi    # at once
  $atoll user ls$option
  $atoll status$option -o wide
Remove every trace of it with:
  make demo-down
END
