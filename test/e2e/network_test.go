//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const webAndClient = `
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /w; hostname > /w/index.html; exec httpd -f -p 8080 -h /w"]
      ports: [{containerPort: 8080, hostPort: 18080}]
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  terminationGracePeriodSeconds: 1
  hostAliases: [{ip: 192.0.2.1, hostnames: [alias.example]}]
  dnsConfig: {options: [{name: ndots, value: "3"}]}
  containers:
    - {name: box, image: busybox, imagePullPolicy: IfNotPresent, command: [sleep, "100000"]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere}
spec: {type: ExternalName, externalName: web.%s.svc.cluster.local}
`

func TestServicesAndDNS(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(fmt.Sprintf(webAndClient, n.name))
	n.ready("web")
	n.ready("client")
	podIP := n.field("pod/web", ".status.podIP")
	nodeIP := n.field("pod/web", ".status.hostIP")
	nodePort := n.field("service/web", ".spec.ports[0].nodePort")
	fromPod := map[string]string{
		"pod address":   "http://" + podIP + ":8080/",
		"cluster name":  "http://web/",
		"full name":     "http://web." + n.name + ".svc.cluster.local/",
		"headless":      "http://headless:8080/",
		"external name": "http://elsewhere/",
		"node port":     "http://" + nodeIP + ":" + nodePort + "/",
		"host port":     "http://" + nodeIP + ":18080/",
	}
	for what, url := range fromPod {
		eventually(t, what+" from a pod", func() error {
			out, err := n.try("exec", "client", "--", "timeout", "5", "wget", "-qO-", url)
			if err == nil && out != "web\n" {
				err = fmt.Errorf("got %q", out)
			}
			return err
		})
	}
	fromHost := map[string]string{
		"pod address":         "http://" + podIP + ":8080/",
		"cluster address":     "http://" + n.field("service/web", ".spec.clusterIP") + "/",
		"node port":           "http://" + nodeIP + ":" + nodePort + "/",
		"host port":           "http://" + nodeIP + ":18080/",
		"host port, loopback": "http://127.0.0.1:18080/",
	}
	for what, url := range fromHost {
		eventually(t, what+" from the host", func() error {
			out, err := exec.Command("curl", "-fsS", "-m", "5", url).CombinedOutput()
			if err == nil && string(out) != "web\n" {
				err = fmt.Errorf("got %q", out)
			}
			return err
		})
	}
	contains(t, n.exec("client", "cat", "/etc/hosts"), "alias.example")
	contains(t, n.exec("client", "cat", "/etc/resolv.conf"), "ndots:3")
	eventually(t, "a connection by a short name", func() error {
		_, err := n.try("exec", "client", "--", "sh", "-c", "nc -w 5 kubernetes.default 443 </dev/null")
		return err
	})
}

// TestMixedRuntimes talks between a micro-VM pod and a runc pod, both ways.
func TestMixedRuntimes(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "atoll.dev/host-access=allowed")
	pod := `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  runtimeClassName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
    - {name: web, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "mkdir /w; hostname > /w/index.html; exec httpd -f -p 8080 -h /w"]}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec: {selector: {app: %[1]s}, ports: [{port: 80, targetPort: 8080}]}
---
`
	n.apply(fmt.Sprintf(pod, "atoll") + fmt.Sprintf(pod, "runc"))
	n.ready("atoll")
	n.ready("runc")
	for from, to := range map[string]string{"atoll": "runc", "runc": "atoll"} {
		eventually(t, from+" to "+to, func() error {
			out, err := n.try("exec", from, "--", "timeout", "5", "wget", "-qO-", "http://"+to+"/")
			if err == nil && out != to+"\n" {
				err = fmt.Errorf("got %q", out)
			}
			return err
		})
	}
}

// TestDNSPolicies looks at the resolv.conf that each policy makes.
func TestDNSPolicies(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "atoll.dev/host-access=allowed")
	cluster := n.clusterDNS()
	for name, tc := range map[string]struct {
		spec string
		is   []string
		not  string
	}{
		"none": {
			"dnsPolicy: None\n  dnsConfig: {nameservers: [192.0.2.53], searches: [corp.example], options: [{name: timeout, value: \"2\"}]}",
			[]string{"nameserver 192.0.2.53\n", "search corp.example\n", "options timeout:2\n"},
			cluster,
		},
		"default":        {"dnsPolicy: Default", []string{"nameserver "}, "svc.cluster.local"},
		"first":          {"dnsPolicy: ClusterFirst", []string{"nameserver " + cluster, n.name + ".svc.cluster.local", "ndots:5"}, "192.0.2.53"},
		"first-host-net": {"dnsPolicy: ClusterFirstWithHostNet", []string{"nameserver " + cluster, n.name + ".svc.cluster.local"}, "192.0.2.53"},
		"host-net":       {"hostNetwork: true\n  dnsPolicy: ClusterFirstWithHostNet", []string{"nameserver " + cluster, n.name + ".svc.cluster.local"}, "192.0.2.53"},
	} {
		n.apply(strings.Replace(script(name, "cat /etc/resolv.conf"), "spec:", "spec:\n  "+tc.spec, 1))
		equal(t, "phase", n.ended(name), "Succeeded")
		conf := n.kubectl("logs", name)
		for _, want := range tc.is {
			contains(t, conf, want)
		}
		if strings.Contains(conf, tc.not) {
			t.Errorf("%s: there is %q in:\n%s", name, tc.not, conf)
		}
	}
	// On the host's network, the cluster's names must be found as well.
	n.apply(strings.Replace(script("looks", "until nslookup kubernetes.default.svc.cluster.local; do sleep 1; done"), "spec:", "spec:\n  hostNetwork: true\n  dnsPolicy: ClusterFirstWithHostNet", 1))
	equal(t, "phase", n.ended("looks"), "Succeeded")
}

// clusterDNS is the address of the cluster's DNS service.
func (n *namespace) clusterDNS() string {
	n.t.Helper()
	return run(n.t, "", "-n", "kube-system", "get", "service", "kube-dns", "-o", "jsonpath={.spec.clusterIP}")
}

// TestBandwidth sends through the limits of a pod and asks the host's kernel whether they held data
// back. They are low enough for emulated processors to reach.
func TestBandwidth(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	pod := `
apiVersion: v1
kind: Pod
metadata: {name: %s, annotations: {%s}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "mkdir /w; head -c 1048576 /dev/zero > /w/file; exec httpd -f -p 80 -h /w"]
      readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1, timeoutSeconds: 10}
---
`
	n.apply(fmt.Sprintf(pod, "slow", "kubernetes.io/ingress-bandwidth: 2M, kubernetes.io/egress-bandwidth: 1M") + fmt.Sprintf(pod, "free", ""))
	n.ready("slow")
	n.ready("free")
	slow, free := n.field("pod/slow", ".status.podIP"), n.field("pod/free", ".status.podIP")
	shapers := map[string]shaper{}
	eventually(t, "1 MiB to be held back both ways", func() error { // guests that are slower than the limits meet none
		for from, to := range map[string]string{"slow": free, "free": slow} {
			if err := n.execIs(from, "1048576\n", "sh", "-c", "wget -qO- http://"+to+"/file | wc -c"); err != nil {
				return fmt.Errorf("bytes that %s got: %w", from, err)
			}
		}
		for what, look := range map[string]func() (shaper, error){
			"ingress": func() (shaper, error) { return shaperTowards(t, slow) },
			"egress":  func() (shaper, error) { return shaperFrom(t, slow) },
			"free":    func() (shaper, error) { return shaperTowards(t, free) },
		} {
			s, err := look()
			if err != nil {
				return err
			}
			if shapers[what] = s; what != "free" && s.Kind == "tbf" && s.Overlimits == 0 {
				return fmt.Errorf("%s: %+v", what, s)
			}
		}
		return nil
	})
	for what, rate := range map[string]int{"ingress": 2e6 / 8, "egress": 1e6 / 8} {
		s := shapers[what]
		t.Logf("%s: %+v", what, s)
		if s.Kind != "tbf" || s.Options.Rate != rate {
			t.Errorf("%s: want a token bucket of %d bytes a second, got %+v", what, rate, s)
		}
		if s.Bytes < 1<<20 || s.Overlimits == 0 {
			t.Errorf("%s: 1 MiB did not pass through the limit, or were not held back by it: %+v", what, s)
		}
	}
	if shapers["free"].Kind == "tbf" {
		t.Error("the pod without limits has one")
	}
}

// shaper is a queueing discipline as `tc -s -j qdisc` shows it.
type shaper struct {
	Kind    string
	Options struct{ Rate int }
	// Bytes have passed; Overlimits is how often a packet had to wait.
	Bytes, Overlimits int
}

// shaperFrom is on the pod's end of its link, shaperTowards on the host's end.
func shaperFrom(t *testing.T, podIP string) (shaper, error) {
	t.Helper()
	ns, err := podNetns(t, podIP)
	if err != nil {
		return shaper{}, err
	}
	return qdisc(t, "nsenter", "--net="+ns, "tc", "-s", "-j", "qdisc", "show", "dev", "eth0", "root")
}

func shaperTowards(t *testing.T, podIP string) (shaper, error) {
	t.Helper()
	type link struct {
		Index int    `json:"ifindex"`
		Peer  int    `json:"link_index"`
		Name  string `json:"ifname"`
	}
	ns, err := podNetns(t, podIP)
	if err != nil {
		return shaper{}, err
	}
	own, err := shown[link](t, "nsenter", "--net="+ns, "ip", "-j", "link", "show", "eth0")
	if err != nil {
		return shaper{}, err
	}
	all, err := shown[link](t, "ip", "-j", "link")
	if err != nil {
		return shaper{}, err
	}
	for _, l := range all {
		if l.Index == own[0].Peer {
			return qdisc(t, "tc", "-s", "-j", "qdisc", "show", "dev", l.Name, "root")
		}
	}
	return shaper{}, fmt.Errorf("the host has no link %d", own[0].Peer)
}

func qdisc(t *testing.T, command ...string) (shaper, error) {
	t.Helper()
	all, err := shown[shaper](t, command...)
	if err != nil {
		return shaper{}, err
	}
	return all[0], nil
}

// shown is what a command of the host prints as JSON, one at the least. What others change meanwhile it may complain of, or
// leave out.
func shown[T any](t *testing.T, command ...string) (all []T, err error) {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &all)
	}
	if err == nil && len(all) == 0 {
		err = errors.New("nothing")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w in %q: %s", command, err, out, stderr.String())
	}
	return all, nil
}

// podNetns finds a pod's network namespace on this host by the pod's address.
func podNetns(t *testing.T, podIP string) (string, error) {
	t.Helper()
	all, err := filepath.Glob("/run/atoll*/containerd/io.containerd.grpc.v1.cri/netns/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range all {
		out, _ := exec.CommandContext(t.Context(), "nsenter", "--net="+ns, "ip", "-4", "-o", "addr", "show", "dev", "eth0").Output()
		if strings.Contains(string(out), " "+podIP+"/") {
			return ns, nil
		}
	}
	return "", fmt.Errorf("no network namespace of the host has the address %s: %v", podIP, all)
}

// output runs a command of the host.
func output(t *testing.T, command ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
	}
	return string(out)
}
