//go:build e2e

package e2e

import (
	"fmt"
	"os/exec"
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
	n.exec("client", "sh", "-c", "nc -w 5 kubernetes.default 443 </dev/null")
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
