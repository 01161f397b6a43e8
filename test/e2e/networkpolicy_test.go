//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os/exec"
	"slices"
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

// reach asks a page from inside a pod or machine.
func (n *namespace) reach(from, url string) error {
	out, err := n.try("exec", from, "--", "timeout", "3", "wget", "-qO-", url)
	if err == nil && !strings.Contains(out, "hello from") {
		err = fmt.Errorf("%s says %q", url, out)
	}
	return err
}

// traffic checks who reaches whom by port 80 of the Services: pairs "from to" are possible, all others are not.
func (n *namespace) traffic(what string, ends []string, possible func(from, to string) bool) {
	n.t.Helper()
	for _, from := range ends {
		for _, to := range ends {
			if from == to {
				continue // a pod always reaches itself
			}
			url := "http://" + n.field("service/"+to, ".spec.clusterIP") + "/"
			if possible(from, to) {
				eventually(n.t, fmt.Sprintf("%s: %s to %s", what, from, to), func() error { return n.reach(from, url) })
				continue
			}
			eventually(n.t, fmt.Sprintf("%s: no way from %s to %s", what, from, to), func() error {
				if n.reach(from, url) == nil {
					return errors.New("it is possible")
				}
				return nil
			})
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
	if err := n.reach("box", "http://"+n.field("service/micro", ".spec.clusterIP")+":81/"); err == nil {
		t.Error("a port that no policy allows is open")
	}

	n.apply(policyOf("bound", "atoll.dev/tier: administrator", `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: micro}}}]}]}`))
	n.apply(policyOf("open", "", `{podSelector: {}, ingress: [{}]}`))
	n.traffic("the administrator's bound", ends, func(from, _ string) bool { return from == "micro" })
	n.kubectl("delete", "networkpolicy", "--all")
	n.traffic("policies deleted", ends, always)

	n.egress(ends)
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
	eventually(n.t, "the log of what was denied", func() error {
		_ = n.reach(from, "http://"+n.field("service/"+to, ".spec.clusterIP")+"/")
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
	toHost := func(from string) error { return n.reach(from, url) }
	for _, from := range []string{"micro", "plain"} {
		eventually(n.t, "the host's port from "+from, func() error { return toHost(from) })
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
		eventually(n.t, "no way to the host from "+from, func() error {
			if toHost(from) == nil {
				return errors.New("it is possible")
			}
			return nil
		})
		eventually(n.t, "DNS from "+from, func() error {
			_, err := n.try("exec", from, "--", "nslookup", "plain."+n.name+".svc.cluster.local")
			return err
		})
	}
}

// TestPolicyOfNewPods: a pod that a policy isolates has no moment without it.
func TestPolicyOfNewPods(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "atoll.dev/host-access=allowed")
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
      command: [sh, -c, "for i in 1 2 3 4 5 6 7 8; do timeout 1 wget -qO- http://%[4]s/ && exit 3; done; exit 0"]
---
`
	want := map[string]string{}
	for _, runtime := range []string{"atoll", "runc"} {
		for i := range 3 {
			denied, free := fmt.Sprintf("eager-%s-%d", runtime, i), fmt.Sprintf("free-%s-%d", runtime, i)
			n.apply(fmt.Sprintf(eager, denied, "eager", runtime, address) + fmt.Sprintf(eager, free, "free", runtime, address))
			want[denied], want[free] = "Succeeded", "Failed"
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		equal(t, name, n.ended(name), want[name])
	}
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
		eventually(t, when+": the client", func() error { return n.reach("client", url) })
		eventually(t, when+": not the stranger", func() error {
			if n.reach("stranger", url) == nil {
				return errors.New("it is possible")
			}
			return nil
		})
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
	eventually(t, "a change after the restart", func() error { return n.reach("stranger", url) })
}
