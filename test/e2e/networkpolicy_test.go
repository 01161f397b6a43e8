//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// podOf is a pod that serves its name, and a Service for it.
const podOf = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s, kind: pod}}
spec:
  runtimeClassName: %[2]s
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /w; echo hello from $(hostname) > /w/index.html; httpd -p 81 -h /w; exec httpd -f -p 80 -h /w"]
      ports: [{name: web, containerPort: 80}]
---
`

const serviceOf = `
apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec: {type: NodePort, selector: {app: %[1]s}, ports: [{name: web, port: 80}, {name: other, port: 81}]}
---
`

// policyOf is a NetworkPolicy.
func policyOf(name, labels, spec string) string {
	return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s, labels: {%s}}\nspec: %s\n", name, labels, spec)
}

// How long one attempt may take: where it is to work guests may be slow, and where it is not nobody waits for them.
const (
	shortAttempt = 3 * time.Second
	longAttempt  = 30 * time.Second
)

// seconds is a limit as programs take it.
func seconds(limit time.Duration) string { return strconv.Itoa(int(limit.Seconds())) }

// reach asks a page from inside a pod or machine.
func (n *namespace) reach(from, url string, limit time.Duration) error {
	out, err := n.try("exec", from, "--", "timeout", seconds(limit), "wget", "-qO-", url)
	if err == nil && !strings.Contains(out, "hello from") {
		err = fmt.Errorf("%s says %q", url, out)
	}
	return err
}

// traffic checks who reaches whom by port 80 of the Services: pairs "from to" are possible, all others are not.
func (n *namespace) traffic(what string, ends []string, possible func(from, to string) bool) {
	n.t.Helper()
	for _, from := range ends {
		var not []string
		for _, to := range ends {
			if from == to {
				continue // a pod always reaches itself
			}
			url := "http://" + n.field("service/"+to, ".spec.clusterIP") + "/"
			if possible(from, to) {
				eventually(n.t, fmt.Sprintf("%s: %s to %s", what, from, to), func() error { return n.reach(from, url, longAttempt) })
			} else {
				not = append(not, url)
			}
		}
		if len(not) > 0 {
			n.noAnswer(fmt.Sprintf("%s: no way from %s to %s", what, from, strings.Join(not, ", ")), from, []string{n.name}, not...)
		}
	}
}

// TestNetworkPolicies has a pod in a micro-VM, one under runc and a virtual machine, each as sender and receiver.
func TestNetworkPolicies(t *testing.T) {
	t.Parallel()
	n := machines(t)
	run(t, "", "label", "namespace", n.name, "atoll.dev/host-access=allowed")
	n.apply(fmt.Sprintf(podOf, "micro", "atoll") + fmt.Sprintf(podOf, "plain", "runc"))
	n.apply(`
apiVersion: vmoperator.vmware.com/v1alpha2
kind: VirtualMachine
metadata: {name: box, labels: {app: box, kind: machine}}
spec: {className: tiny, imageName: tiny, storageClass: atoll, powerState: PoweredOn}
`)
	ends := []string{"micro", "plain", "box"}
	for _, name := range ends {
		n.apply(fmt.Sprintf(serviceOf, name))
	}
	n.ready("micro")
	n.ready("plain")
	n.agent("box")
	never := func(string, string) bool { return false }
	always := func(string, string) bool { return true }
	n.traffic("without policies", ends, always)

	n.apply(policyOf("deny", "", "{podSelector: {}}"))
	n.traffic("all ingress denied", ends, never)
	n.probesPass(ends)
	n.deniedIsTold("micro", "box")

	n.apply(policyOf("from-machines", "", `{podSelector: {matchLabels: {kind: pod}}, ingress: [{from: [{podSelector: {matchLabels: {kind: machine}}}], ports: [{port: web}]}]}`))
	n.apply(policyOf("from-micro", "", `{podSelector: {matchLabels: {kind: machine}}, ingress: [{from: [{podSelector: {matchLabels: {app: micro}}}], ports: [{port: 1, endPort: 80}]}]}`))
	some := func(from, to string) bool { return from == "box" || from == "micro" && to == "box" }
	n.traffic("peers and ports", ends, some)
	n.noAnswer("a port that no policy allows", "box", []string{n.name}, "http://"+n.field("service/micro", ".spec.clusterIP")+":81/")

	n.datagrams()

	n.apply(policyOf("bound", "atoll.dev/tier: administrator", `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: micro}}}]}]}`))
	n.apply(policyOf("open", "", `{podSelector: {}, ingress: [{}]}`))
	n.traffic("the administrator's bound", ends, func(from, _ string) bool { return from == "micro" })
	n.kubectl("delete", "networkpolicy", "--all")
	n.traffic("policies deleted", ends, always)

	n.egress(ends)
}

// datagrams: what is for TCP at a machine's port is not for UDP, and the other way round. The policies of before allow none.
func (n *namespace) datagrams() {
	n.t.Helper()
	address := n.field("pod/box", ".status.podIP")
	for _, from := range []string{"micro", "plain"} {
		ask := func(limit time.Duration) error { return n.datagram(from, address, limit) }
		allow := func(protocol string) {
			n.t.Helper()
			n.apply(policyOf("datagrams", "", `{podSelector: {matchLabels: {kind: machine}}, ingress: [{from: [{podSelector: {matchLabels: {app: `+from+`}}}], ports: [{port: 69, protocol: `+protocol+`}]}]}`))
		}
		allow("TCP")
		shut(n.t, "a datagram from "+from+" to the machine where only TCP is allowed", ask)
		allow("UDP")
		open(n.t, "a datagram from "+from+" to the machine", ask)
	}
	n.kubectl("delete", "networkpolicy", "datagrams")
}

// probesPass: what the host sends to its pods is not for policies.
func (n *namespace) probesPass(ends []string) {
	n.t.Helper()
	for _, name := range ends {
		url := "http://" + n.field("pod/"+name, ".status.podIP") + "/"
		eventually(n.t, "the host to "+name, func() error { return get(n.t, url, "hello from") })
	}
}

// deniedIsTold looks for both ends in the log and the counters.
func (n *namespace) deniedIsTold(from, to string) {
	n.t.Helper()
	url := "http://" + n.field("service/"+to, ".spec.clusterIP") + "/"
	eventually(n.t, "the log of what was denied", func() error {
		_ = n.reach(from, url, shortAttempt)
		out := atollOK(n.t, "network", "denied", "-n", n.name)
		for line := range strings.Lines(out) {
			if strings.Contains(line, "denied=ingress tier=owner from="+n.name+"/"+from+"(") && strings.Contains(line, " to="+n.name+"/"+to+"(") && strings.Contains(line, "port=80/TCP") {
				return nil
			}
		}
		return fmt.Errorf("the log is\n%s", out)
	})
	var list []struct {
		What, Direction, Tier, Namespace, Policy string
		Count                                    int
	}
	eventually(n.t, "the counters", func() error {
		if err := json.Unmarshal([]byte(atollOK(n.t, "network", "counters", "-n", n.name, "-o", "json")), &list); err != nil {
			return err
		}
		for _, c := range list {
			if c.What == "denied" && c.Direction == "ingress" && c.Count > 0 {
				return nil
			}
		}
		return fmt.Errorf("the counters are %v", list)
	})
}

// egress closes the way out but to DNS and one port.
func (n *namespace) egress(ends []string) {
	n.t.Helper()
	listener, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		n.t.Fatal(err)
	}
	page := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello from the host") })}
	go func() { _ = page.Serve(listener) }()
	defer page.Close()
	url := fmt.Sprintf("http://%s:%d/", n.field("pod/micro", ".status.hostIP"), listener.Addr().(*net.TCPAddr).Port)
	for _, from := range []string{"micro", "plain"} {
		eventually(n.t, "the host's port from "+from, func() error { return n.reach(from, url, longAttempt) })
	}
	n.apply(policyOf("egress", "", `
  podSelector: {}
  policyTypes: [Egress]
  egress:
    - to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]
      ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
    - to: [{podSelector: {matchLabels: {app: plain}}}]
      ports: [{port: 80}]
`))
	n.traffic("egress", ends, func(_, to string) bool { return to == "plain" })
	for _, from := range []string{"micro", "plain"} {
		n.noAnswer("no way to the host from "+from, from, []string{n.name}, url)
		eventually(n.t, "DNS from "+from, func() error {
			_, err := n.try("exec", from, "--", "nslookup", "plain."+n.name+".svc.cluster.local")
			return err
		})
	}
}

// eagerMachine asks a page again and again as soon as it can, and keeps what it got.
const eagerMachine = `
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachine
metadata: {name: %[1]s, labels: {role: %[2]s}}
spec:
  className: tiny
  imageName: tiny
  storageClass: atoll
  bootstrap: {cloudInit: {cloudConfig: {runcmd: ["for i in $(seq %[4]d); do timeout %[5]d wget -qO /data/got http://%[3]s/ && cp /data/got /data/leak && break; done; echo asked >/data/asked"]}}}
---
`

// TestPolicyOfNewPods: a pod or machine that a policy isolates has no moment without it.
func TestPolicyOfNewPods(t *testing.T) {
	t.Parallel()
	n := machines(t)
	run(t, "", "label", "namespace", n.name, "atoll.dev/host-access=allowed")
	n.apply(fmt.Sprintf(podOf, "server", "atoll"))
	n.ready("server")
	n.apply(policyOf("deny", "", `{podSelector: {matchLabels: {role: eager}}, policyTypes: [Egress]}`))
	address := n.field("pod/server", ".status.podIP")
	const eager = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {role: %[2]s}}
spec:
  runtimeClassName: %[3]s
  restartPolicy: Never
  containers:
    - name: box
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "for i in $(seq %[5]d); do timeout %[6]d wget -qO- http://%[4]s/ && exit 3; done; exit 0"]
---
`
	n.apply(fmt.Sprintf(eagerMachine, "eager-machine", "eager", address, 8, 1) + fmt.Sprintf(eagerMachine, "free-machine", "free", address, 30, 5))
	for round := range 3 { // all at once would starve the server
		want := map[string]string{}
		for _, runtime := range []string{"atoll", "runc"} {
			denied, free := fmt.Sprintf("eager-%s-%d", runtime, round), fmt.Sprintf("free-%s-%d", runtime, round)
			n.apply(fmt.Sprintf(eager, denied, "eager", runtime, address, 8, 1) + fmt.Sprintf(eager, free, "free", runtime, address, 30, 5))
			want[denied], want[free] = "Succeeded", "Failed"
		}
		for _, name := range slices.Sorted(maps.Keys(want)) {
			equal(t, name, n.ended(name), want[name])
			equal(t, "reason of "+name, n.field("pod/"+name, ".status.containerStatuses[0].state.terminated['reason','exitCode']"), map[string]string{"Succeeded": "Completed 0", "Failed": "Error 3"}[want[name]])
		}
	}
	for name, leaked := range map[string]string{"eager-machine": "asked", "free-machine": "asked leak"} {
		n.agent(name)
		eventually(t, name+" to have asked", func() error {
			_, err := n.try("exec", name, "--", "test", "-e", "/data/asked")
			return err
		})
		equal(t, "what "+name+" has", n.exec(name, "sh", "-c", "cd /data; echo $(ls asked leak 2>/dev/null)"), leaked)
	}
	contains(t, n.exec("free-machine", "cat", "/data/leak"), "hello from server")
}

// TestPoliciesOutliveTheAgent: without an agent what is denied stays denied and what is allowed goes on; afterwards
// changes are taken up.
func TestPoliciesOutliveTheAgent(t *testing.T) {
	n := newNamespace(t)
	n.apply(fmt.Sprintf(podOf, "server", "atoll") + fmt.Sprintf(podOf, "client", "atoll") + fmt.Sprintf(podOf, "stranger", "atoll"))
	for _, name := range []string{"server", "client", "stranger"} {
		n.ready(name)
	}
	url := "http://" + n.field("pod/server", ".status.podIP") + "/"
	n.apply(policyOf("p", "", `{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}`))
	check := func(when string) {
		t.Helper()
		eventually(t, when+": the client", func() error { return n.reach("client", url, longAttempt) })
		n.noAnswer(when+": not the stranger", "stranger", []string{n.name}, url)
	}
	check("before")
	if out, err := exec.Command("pkill", "-KILL", "-f", "atoll agent .*"+suite.dataDir).CombinedOutput(); err != nil {
		t.Fatalf("killing the agent: %v %s", err, out)
	}
	leaks := 0
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		// The kubelet is away, so nobody can be asked to exec: the table says whether the rules are there.
		if out, err := exec.Command("nft", "list", "chain", "inet", "atoll-policy", "known").CombinedOutput(); err != nil {
			leaks++
			t.Logf("%v: %s", err, out)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if leaks > 0 {
		t.Errorf("the rules were away %d times", leaks)
	}
	check("after")
	n.kubectl("label", "pod", "stranger", "app=client", "--overwrite")
	eventually(t, "a change after the restart", func() error { return n.reach("stranger", url, longAttempt) })
}
