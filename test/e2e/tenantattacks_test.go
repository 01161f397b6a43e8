//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// attack is one thing that a tenant tries and must not be able to.
type attack struct {
	args  []string // of kubectl
	yaml  string   // its input
	wants []string // what the refusal says
}

// try runs the attacks as one person; each must fail, and for the reason that it says.
func (p *actor) attempt(attacks map[string]attack) {
	p.t.Helper()
	// Who asks as somebody else is not even told which kinds there are, if that is not known from before.
	eventually(p.t, "all kinds to be listed", func() error { // one that is served apart may be away for a moment
		_, err := p.try("", "api-resources")
		return err
	})
	for what, a := range attacks {
		out, err := p.try(a.yaml, a.args...)
		if err == nil {
			p.t.Errorf("%s: %s succeeded with kubectl %s\n%s\n%s", what, p.name, strings.Join(a.args, " "), a.yaml, out)
			continue
		}
		for _, want := range a.wants {
			if !strings.Contains(out, want) {
				p.t.Errorf("%s: %q is not in: %s", what, want, out)
			}
		}
		if strings.Contains(out, "exceeded quota") && !slices.Contains(a.wants, "exceeded quota") {
			p.t.Errorf("%s: refused for want of room only: %s", what, out)
		}
	}
}

// two are an attacker's namespace and a victim's, both with everything allowed that an administrator may leave open.
func two(t *testing.T, spec string) (attacker, victim *tenant) {
	t.Helper()
	return newTenant(t, "-m", spec), newTenant(t, "-v", "")
}

// TestAttackObjects: an owner reads, writes and runs nothing in another namespace and nothing of the cluster.
func TestAttackObjects(t *testing.T) {
	t.Parallel()
	m, v := two(t, "")
	v.apply(sleeper)
	run(t, "", "-n", v.name, "create", "secret", "generic", "treasure", "--from-literal=gold=much")
	v.ready("box")
	me := "sso:" + m.owner.name + "@atoll.local"
	forbidden := func(args ...string) attack { return attack{args: args, wants: []string{"orbidden", me}} }
	in := func(args ...string) attack { return forbidden(append([]string{"-n", v.name}, args...)...) }
	m.owner.attempt(map[string]attack{
		"read a secret":           in("get", "secret", "treasure"),
		"list secrets":            in("get", "secrets"),
		"list secrets of all":     forbidden("get", "secrets", "-A"),
		"list pods":               in("get", "pods"),
		"watch pods of all":       forbidden("get", "pods", "-A", "--watch", "--request-timeout=60s"),
		"write":                   in("create", "configmap", "mine"),
		"delete":                  in("delete", "pod", "box"),
		"delete all":              in("delete", "pods", "--all"),
		"exec":                    in("exec", "box", "--", "id"),
		"attach":                  in("attach", "box"),
		"logs":                    in("logs", "box"),
		"port-forward":            in("port-forward", "box", "18099:80"),
		"debug":                   in("debug", "box", "--image=busybox", "--", "id"),
		"proxy":                   forbidden("get", "--raw", "/api/v1/namespaces/"+v.name+"/pods/box:80/proxy/"),
		"top":                     in("get", "--raw", "/apis/metrics.k8s.io/v1beta1/namespaces/"+v.name+"/pods"),
		"the node's proxy":        forbidden("get", "--raw", "/api/v1/nodes/"+nodeName(t)+"/proxy/pods"),
		"token of an account":     in("create", "token", "default"),
		"the namespace":           forbidden("delete", "namespace", v.name),
		"its bounds":              forbidden("delete", "supervisornamespace", v.name),
		"a machine":               in("create", "-f", writeFile(t, machine("box", "tiny"))),
		"images of machines":      in("get", "virtualmachineimages"),
		"snapshots":               in("get", "volumesnapshots.snapshot.storage.k8s.io"),
		"passwords of people":     forbidden("-n", "atoll-system", "get", "secrets"),
		"keys of volumes":         forbidden("-n", "atoll-keys", "get", "secrets"),
		"people":                  forbidden("patch", "user.atoll.dev", m.owner.name, "--type=merge", "-p", `{"spec":{"fullName":"root"}}`),
		"another's password":      forbidden("-n", "atoll-system", "delete", "secret", "user-"+v.owner.name),
		"groups":                  forbidden("patch", "group.atoll.dev", "administrators", "--type=merge", "-p", `{"spec":{"members":["`+m.owner.name+`"]}}`),
		"a group of one's own":    forbidden("create", "-f", writeFile(t, `{"apiVersion": "atoll.dev/v1alpha1", "kind": "Group", "metadata": {"name": "administrators2"}}`)),
		"identity providers":      forbidden("get", "identityproviders.atoll.dev"),
		"nodes":                   forbidden("cordon", nodeName(t)),
		"admission webhooks":      forbidden("delete", "validatingwebhookconfigurations", "--all"),
		"custom resources":        forbidden("delete", "crd", "supervisornamespaces.atoll.dev"),
		"cluster roles":           forbidden("create", "clusterrolebinding", "mine", "--clusterrole=cluster-admin", "--user="+me),
		"certificate requests":    forbidden("create", "-f", writeFile(t, `{"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": {"name": "mine"}, "spec": {"request": "", "signerName": "kubernetes.io/kube-apiserver-client", "usages": ["client auth"]}}`)),
		"metrics of the server":   forbidden("get", "--raw", "/metrics"),
		"tokens of others":        forbidden("create", "-f", writeFile(t, `{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "x"}}`)),
		"rights of others":        forbidden("create", "-f", writeFile(t, `{"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {"user": "`+me+`", "resourceAttributes": {"verb": "get", "resource": "secrets"}}}`)),
		"rights of others, local": forbidden("-n", m.name, "create", "-f", writeFile(t, `{"apiVersion": "authorization.k8s.io/v1", "kind": "LocalSubjectAccessReview", "metadata": {"namespace": "`+m.name+`"}, "spec": {"user": "root", "resourceAttributes": {"namespace": "`+m.name+`", "verb": "get", "resource": "secrets"}}}`)),
		"as an administrator":     forbidden("get", "secrets", "-A", "--as=sso:administrator@atoll.local"),
		"as a group":              forbidden("get", "secrets", "-A", "--as="+me, "--as-group=system:masters"),
		"as an account":           forbidden("-n", v.name, "get", "secrets", "--as=system:serviceaccount:"+v.name+":default"),
		"as oneself":              forbidden("get", "secrets", "-A", "--as="+me, "--as-group=sso:administrators@atoll.local"),
	})
	equal(t, "the victim's pod", v.field("pod/box", ".status.phase"), "Running")
}

func nodeName(t *testing.T) string {
	t.Helper()
	return strings.Fields(run(t, "", "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"))[0]
}

// TestAttackBounds: an owner does not change what bounds the namespace, nor gives a role to anybody.
func TestAttackBounds(t *testing.T) {
	t.Parallel()
	m := newTenant(t, "", `"resources": {"memoryLimit": "1Gi", "memoryLimitDefault": "64Mi"}, "network": {"isolation": "Isolated"}`)
	here := func(args ...string) attack {
		return attack{args: append([]string{"-n", m.name}, args...), wants: []string{"orbidden"}}
	}
	me := "sso:" + m.owner.name + "@atoll.local"
	policies := strings.Fields(run(t, "", "-n", m.name, "get", "networkpolicy", "-l", "atoll.dev/tier=administrator", "-o", "jsonpath={.items[*].metadata.name}"))
	if len(policies) == 0 {
		t.Fatal("an isolated namespace has no policy of the administrator's tier")
	}
	tier := func(name, labels string) string {
		return fmt.Sprintf(`{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": %q, "labels": {%s}}, "spec": {"podSelector": {}, "ingress": [{}], "egress": [{}], "policyTypes": ["Ingress", "Egress"]}}`, name, labels)
	}
	attacks := map[string]attack{
		"quota, edited":           here("patch", "resourcequota", m.name+"-quota", "--type=merge", "-p", `{"spec":{"hard":{"limits.memory":"1Ti"}}}`),
		"quota, deleted":          here("delete", "resourcequota", "--all"),
		"quota, new":              here("create", "quota", "mine", "--hard=pods=1"),
		"defaults":                here("delete", "limitrange", "--all"),
		"a policy, deleted":       here("delete", "networkpolicy", policies[0]),
		"a policy, edited":        here("patch", "networkpolicy", policies[0], "--type=merge", "-p", `{"spec":{"ingress":[{}]}}`),
		"a policy, label taken":   here("label", "networkpolicy", policies[0], "atoll.dev/tier-"),
		"a policy of the tier":    here("create", "-f", writeFile(t, tier("mine", `"atoll.dev/tier": "administrator"`))),
		"a policy as one of it":   here("create", "-f", writeFile(t, tier("mine", `"atoll.dev/supervisor-namespace": "`+m.name+`"`))),
		"the role's binding":      here("patch", "rolebinding", "atoll-owner", "--type=json", "-p", `[{"op":"replace","path":"/roleRef/name","value":"cluster-admin"}]`),
		"a binding, deleted":      here("delete", "rolebinding", "atoll-view"),
		"a binding to admin":      here("create", "rolebinding", "mine", "--clusterrole=admin", "--user="+me),
		"a binding to its own":    here("create", "rolebinding", "mine", "--clusterrole=atoll:owner", "--user=sso:friend@atoll.local"),
		"a role":                  here("create", "role", "mine", "--verb=*", "--resource=*"),
		"labels of the host":      {args: []string{"label", "--overwrite", "namespace", m.name, "atoll.dev/host-access=allowed"}, wants: []string{"orbidden"}},
		"labels of pod security":  {args: []string{"label", "--overwrite", "namespace", m.name, "pod-security.kubernetes.io/enforce=privileged"}, wants: []string{"orbidden"}},
		"the label of its bounds": {args: []string{"label", "namespace", m.name, "atoll.dev/supervisor-namespace-"}, wants: []string{"orbidden"}},
		"limits":                  {args: []string{"patch", "supervisornamespace", m.name, "--type=merge", "-p", `{"spec":{"resources":{"memoryLimit":"1Ti"}}}`}, wants: []string{"orbidden"}},
		"isolation":               {args: []string{"patch", "supervisornamespace", m.name, "--type=merge", "-p", `{"spec":{"network":{"isolation":"Open"}}}`}, wants: []string{"orbidden"}},
		"what is enforced":        {args: []string{"patch", "supervisornamespace", m.name, "--subresource=status", "--type=merge", "-p", `{"status":{"effective":null}}`}, wants: []string{"orbidden"}},
		"finalizers":              {args: []string{"patch", "namespace", m.name, "--type=merge", "-p", `{"metadata":{"finalizers":[]}}`}, wants: []string{"orbidden"}},
		"a template":              {args: []string{"create", "-f", writeFile(t, `{"apiVersion": "atoll.dev/v1alpha1", "kind": "SupervisorNamespaceTemplate", "metadata": {"name": "mine"}, "spec": {"template": {}, "selfService": {"enabled": true}}}`)}, wants: []string{"orbidden"}},
		"a storage class":         {args: []string{"create", "-f", writeFile(t, `{"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "mine"}, "provisioner": "csi.atoll.dev"}`)}, wants: []string{"orbidden"}},
		"a runtime class":         {args: []string{"create", "-f", writeFile(t, `{"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "mine"}, "handler": "runc"}`)}, wants: []string{"orbidden"}},
		"priority":                {args: []string{"create", "priorityclass", "mine", "--value=1000000000"}, wants: []string{"orbidden"}},
		"a network of the host":   here("create", "-f", writeFile(t, `{"apiVersion": "netoperator.vmware.com/v1alpha1", "kind": "Network", "metadata": {"name": "mine"}, "spec": {"type": "vsphere-distributed"}}`)),
		"a class of machines":     here("create", "-f", writeFile(t, `{"apiVersion": "vmoperator.vmware.com/v1alpha5", "kind": "VirtualMachineClass", "metadata": {"name": "mine"}, "spec": {"hardware": {"cpus": 1}}}`)),
		"endpoints elsewhere":     here("create", "-f", writeFile(t, `{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "mine", "labels": {"kubernetes.io/service-name": "x"}}, "addressType": "IPv4", "endpoints": [{"addresses": ["127.0.0.1"]}], "ports": [{"port": 2379}]}`)),
	}
	m.owner.attempt(attacks)
	for what, a := range attacks { // what an owner may not, an editor may not
		if out, err := m.editor.try(a.yaml, a.args...); err == nil {
			t.Errorf("%s: the editor could\n%s", what, out)
		}
	}
	m.settled()
	equal(t, "the quota", m.field("resourcequota/"+m.name+"-quota", `.spec.hard.limits\.memory`), "1Gi")
}

// TestAttackPods: pods that reach for the host, for another's account, or past the limits.
func TestAttackPods(t *testing.T) {
	t.Parallel()
	m, v := two(t, `"resources": {"memoryLimit": "960Mi", "memoryLimitDefault": "64Mi", "cpuLimit": "1400m", "cpuLimitDefault": "100m"}, "storageClasses": [{"name": "atoll", "limit": "200Mi"}], "podRuntime": {"privilegedAllowed": true}`)
	m.editor.apply(m.name, strings.Replace(sleeper, "image: busybox", "resources: {limits: {memory: 512Mi, cpu: 1}}, image: busybox", 1))
	v.editor.apply(v.name, claim("data", "atoll", "")+"---"+fmt.Sprintf(writer, "one", "atoll", "data"))
	v.ready("one")
	v.exec("one", "sh", "-c", "echo gold >/data/treasure; sync")
	v.editor.apply(v.name, `{"apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot", "metadata": {"name": "before"}, "spec": {"volumeSnapshotClassName": "atoll", "source": {"persistentVolumeClaimName": "data"}}}`)
	volume := v.bound("data")
	with := func(old, text string, wants ...string) attack {
		return attack{
			args:  []string{"-n", m.name, "create", "-f", "-"},
			yaml:  strings.Replace(strings.Replace(sleeper, "name: box}", "name: evil}", 1), old, text, 1),
			wants: wants,
		}
	}
	volumes := func(list string, wants ...string) attack {
		return with("  containers:", "  volumes: ["+list+"]\n  containers:", wants...)
	}
	object := func(text string, wants ...string) attack {
		return attack{args: []string{"-n", m.name, "create", "-f", "-"}, yaml: text, wants: wants}
	}
	resize := func(patch string) attack {
		return attack{args: []string{"-n", m.name, "patch", "pod", "box", "--subresource=resize", "-p", patch}, wants: []string{"exceeded quota"}}
	}
	attacks := map[string]attack{
		"host files":            volumes("{name: v, hostPath: {path: /}}", "orbidden", "hostPath"),
		"host files, one":       volumes("{name: v, hostPath: {path: /etc/hosts, type: File}}", "orbidden", "hostPath"),
		"a projected host file": volumes("{name: v, local: {path: /}}", "unknown field"),
		"host network":          with("spec:", "spec:\n  hostNetwork: true", "orbidden"),
		"host processes":        with("spec:", "spec:\n  hostPID: true", "orbidden"),
		"host IPC":              with("spec:", "spec:\n  hostIPC: true", "orbidden"),
		"host port":             with("image: busybox", "ports: [{containerPort: 443, hostPort: 443}], image: busybox", "orbidden", "hostPort"),
		"host port, API":        with("image: busybox", "ports: [{containerPort: 6443, hostPort: 6443}], image: busybox", "orbidden", "hostPort"),
		"runc":                  with("spec:", "spec:\n  runtimeClassName: runc", "orbidden"),
		"a machine's runtime":   with("spec:", "spec:\n  runtimeClassName: atoll-vm", "orbidden"),
		"another runtime":       with("spec:", "spec:\n  runtimeClassName: none", "orbidden"),
		"a probe of the host":   with("image: busybox", "livenessProbe: {httpGet: {host: 127.0.0.1, port: 10250, path: /}}, image: busybox", "orbidden"),
		"a hook at the host":    with("image: busybox", "lifecycle: {postStart: {httpGet: {host: 127.0.0.1, port: 2379, path: /}}}, image: busybox", "orbidden"),
		"less overhead":         with("spec:", "spec:\n  overhead: {memory: 1Ki, cpu: 1m}", "orbidden"),
		"no limit by overhead":  with("image: busybox", "resources: {limits: {memory: 350Mi}}, image: busybox", "exceeded quota"),
		"an init container":     with("  containers:", "  initContainers: [{name: i, image: busybox, resources: {limits: {memory: 2Gi}}}]\n  containers:", "exceeded quota"),
		"a sidecar":             with("  containers:", "  initContainers: [{name: i, image: busybox, restartPolicy: Always, resources: {limits: {memory: 2Gi}}}]\n  containers:", "exceeded quota"),
		"pod-level limits":      with("spec:", "spec:\n  resources: {limits: {memory: 2Gi}}", "exceeded quota"),
		"system priority":       with("spec:", "spec:\n  priorityClassName: system-node-critical", "orbidden"),
		"another's account":     with("spec:", "spec:\n  serviceAccountName: "+v.name, "orbidden"),
		"a mirror pod":          with("metadata: {name: evil}", "metadata: {name: evil, annotations: {kubernetes.io/config.mirror: x}}", "mirror"),
		"more memory":           resize(`{"spec":{"containers":[{"name":"box","resources":{"requests":{"memory":"2Gi"},"limits":{"memory":"2Gi"}}}]}}`),
		"more processors":       resize(`{"spec":{"containers":[{"name":"box","resources":{"requests":{"cpu":"1500m"},"limits":{"cpu":"1500m"}}}]}}`),
		"a machine's devices":   with("metadata: {name: evil}", "metadata: {name: evil, annotations: {atoll.dev/machine: '{}'}}", "made by the system"),
		"a machine's address":   with("metadata: {name: evil}", "metadata: {name: evil, annotations: {atoll.dev/address-key: x}}", "made by the system"),
		"a machine's identity":  with("metadata: {name: evil}", "metadata: {name: evil, labels: {atoll.dev/vm-uid: x}}", "made by the system"),
		"a volume of another":   object(strings.Replace(claim("theft", `""`, ", volumeName: "+volume), "64Mi", "1Mi", 1), "spec.storageClasses"),
		"a volume by hand": object(fmt.Sprintf(`{"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "%s-pv"}, "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "csi": {"driver": "csi.atoll.dev", "volumeHandle": "default/%s"}}}`, m.name, volume),
			"orbidden"),
		"a server's volume": volumes("{name: v, nfs: {server: 127.0.0.1, path: /}}", "spec.volumes[0].nfs"),
		"an inline volume":  volumes("{name: v, csi: {driver: csi.atoll.dev, volumeAttributes: {handle: default/"+volume+"}}}", "spec.volumes[0].csi"),
		"content of a snapshot": object(fmt.Sprintf(`{"apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshotContent", "metadata": {"name": "%s-c"}, "spec": {"deletionPolicy": "Retain", "driver": "csi.atoll.dev", "source": {"volumeHandle": "default/%s"}, "volumeSnapshotRef": {"name": "s", "namespace": "%s"}}}`, m.name, volume, m.name),
			"orbidden"),
		"an attachment":    object(`{"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment", "metadata": {"name": "mine"}, "spec": {"attacher": "csi.atoll.dev", "nodeName": "x", "source": {"persistentVolumeName": "`+volume+`"}}}`, "orbidden"),
		"external address": object(`{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "evil"}, "spec": {"externalIPs": ["`+nodeAddress(t)+`"], "ports": [{"port": 443}]}}`, "externalIPs"),
	}
	m.editor.attempt(attacks)
	m.editor.kubectl("-n", m.name, "wait", "--for=condition=Ready", "pod/box", timeout(patience))
	claimAttacks(m, v, volume)
	equal(t, "the owner of the volume", run(t, "", "get", "pv", volume, "-o", "jsonpath={.spec.claimRef.namespace}"), v.name)
	contains(t, v.exec("one", "ls", "-d", "/data"), "/data")
	// An ephemeral container has the bounds of the rest: what is allowed in one namespace is not in the other.
	debug := func(n *tenant, pod string) []string {
		return []string{"-n", n.name, "debug", pod, "--image=busybox", "--profile=baseline", "--attach=false", "--quiet", "--custom=" + writeFile(t, `{"securityContext": {"privileged": true}}`), "--", "id"}
	}
	v.editor.denied(debug(v, "one"), "must not set securityContext.privileged=true", "namespace \""+v.name+"\": administrators can change it")
	m.editor.kubectl(debug(m, "box")...)
}

// claimAttacks names the victim's volume and a snapshot of it in claims, which are made, and used by pods: these stay
// without a volume, or get one with nothing in it.
func claimAttacks(m, v *tenant, volume string) {
	t := m.t
	t.Helper()
	v.kubectl("wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/before", timeout(patience))
	content := v.field("volumesnapshot/before", ".status.boundVolumeSnapshotContentName")
	const snapshot = ", %s: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: %s%s}"
	m.editor.apply(m.name, `{"apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot", "metadata": {"name": "stolen"}, "spec": {"volumeSnapshotClassName": "atoll", "source": {"volumeSnapshotContentName": "`+content+`"}}}`)
	m.editor.apply(m.name, strings.Replace(claim("by-name", "atoll", ", volumeName: "+volume), "64Mi", "1Mi", 1)+"---"+
		claim("by-content", "atoll", fmt.Sprintf(snapshot, "dataSource", "stolen", ""))+"---"+
		claim("by-snapshot", "atoll", fmt.Sprintf(snapshot, "dataSourceRef", "before", ", namespace: "+v.name)))
	for _, name := range []string{"by-name", "by-content", "by-snapshot"} {
		m.editor.apply(m.name, fmt.Sprintf(writer, name, "atoll", name))
	}
	m.says("pvc/by-name", "already bound to a different claim")
	m.says("volumesnapshot/stolen", "is dynamically provisioned while expecting a pre-provisioned one")
	m.says("pvc/by-content", "snapshot stolen not bound")
	// Kubernetes forgets a source in another namespace: the claim is one without a source.
	equal(t, "the source in another namespace", m.field("pvc/by-snapshot", ".spec.dataSourceRef}{.spec.dataSource"), "")
	m.ready("by-snapshot")
	equal(t, "what is in its volume", m.exec("by-snapshot", "ls", "-A", "/data"), "a\nlost+found")
	for _, name := range []string{"by-name", "by-content"} {
		equal(t, "claim "+name, m.field("pvc/"+name, ".status.phase"), "Pending")
		equal(t, "pod "+name, m.field("pod/"+name, ".status.phase"), "Pending")
	}
	volumes := run(t, "", "get", "pv", "-o", `jsonpath={range .items[?(@.spec.claimRef.namespace=="`+m.name+`")]}{.spec.claimRef.name} {end}`)
	equal(t, "the attacker's volumes", volumes, "by-snapshot")
	equal(t, "the snapshot", m.field("volumesnapshot/stolen", ".status.readyToUse"), "false")
	equal(t, "the victim's snapshot", v.field("volumesnapshot/before", ".status.readyToUse"), "true")
	equal(t, "the victim's volume", v.exec("one", "cat", "/data/treasure"), "gold")
}

// TestAttackCredentials: what a pod has leads nowhere else, and the token of one namespace opens no other.
func TestAttackCredentials(t *testing.T) {
	t.Parallel()
	m, v := two(t, `"podRuntime": {"privilegedAllowed": true}`)
	run(t, "", "-n", v.name, "create", "secret", "generic", "treasure", "--from-literal=gold=much")
	m.editor.apply(m.name, strings.Replace(strings.Replace(sleeper, "image: busybox", "securityContext: {privileged: true}, image: atoll.dev/tester", 1), "name: box}", "name: spy}", 1))
	m.ready("spy")
	get := func(path, want string) {
		t.Helper()
		eventually(t, "an answer to GET "+path+" from a pod", func() error {
			out, err := m.try("exec", "spy", "--", "tester", "get", path)
			if err == nil {
				t.Fatalf("GET %s from a pod: %s", path, out)
			}
			if !strings.Contains(out, want) {
				return fmt.Errorf("want %q: %w", want, err)
			}
			return nil
		})
	}
	get("/api/v1/namespaces/"+v.name+"/secrets/treasure", "403 Forbidden")
	get("/api/v1/secrets", "403 Forbidden")
	get("/api/v1/nodes", "403 Forbidden")
	get("/apis/atoll.dev/v1alpha1/supervisornamespaces", "403 Forbidden")
	// A token of the victim's account is for the victim's namespace, also where the attacker may act.
	token := strings.TrimSpace(run(t, "", "-n", v.name, "create", "token", "default"))
	as := m.owner.bearer
	if out, err := as(token, "-n", m.name, "get", "pods"); err == nil || !strings.Contains(out, "system:serviceaccount:"+v.name+":default") {
		t.Errorf("an account of another namespace: %v\n%s", err, out)
	}
	for what, bad := range map[string]string{
		"garbage":     "x",
		"not signed":  "eyJhbGciOiJub25lIn0.eyJzdWIiOiJzc286YWRtaW5pc3RyYXRvckBhdG9sbC5sb2NhbCJ9.",
		"cut":         token[:len(token)-4],
		"a long one":  strings.Repeat("A", 20000),
		"empty parts": "..",
	} {
		if out, err := as(bad, "get", "pods", "-A"); err == nil || !strings.Contains(out, "nauthorized") && !strings.Contains(out, "must be logged in") && !strings.Contains(out, "431") {
			t.Errorf("a token that is %s: %v\n%s", what, err, out)
		}
	}
	if out, err := as("", "get", "pods", "-A"); err == nil {
		t.Errorf("nobody may list pods: %s", out)
	}
	node := nodeAddress(t)
	m.reachForHost(node)
	// The kubelet's port answers nobody without a right to it, nor with an account's token or a person's.
	for _, path := range []string{"/pods", "/exec/" + v.name + "/x/y?command=id", "/metrics", "/configz", "/runningpods/"} {
		for _, header := range []string{"", "Bearer " + token, "Bearer " + m.owner.token()} {
			if code := kubeletStatus(t, node, path, header); code != http.StatusUnauthorized && code != http.StatusForbidden {
				t.Errorf("the kubelet's %s with %.10q: status %d", path, header, code)
			}
		}
	}
}

// reachForHost looks for credentials of the node in the pod spy, and for ways to what listens on the host's loopback only;
// the pod has every right in a kernel of its own.
func (n *tenant) reachForHost(node string) {
	t := n.t
	t.Helper()
	spy := func(script string) (string, error) { return n.try("exec", "spy", "--", "busybox", "sh", "-c", script) }
	found, err := spy(`busybox find / -path /proc -prune -o -path /sys -prune -o \( -name token -o -name '*kubeconfig*' -o -name '*.key' -o -name 'kubelet*' \) -print`)
	if err != nil || !strings.Contains(found, "/serviceaccount/") {
		t.Fatalf("looking for credentials: %v\n%s", err, found)
	}
	for file := range strings.Lines(found) {
		if !strings.Contains(file, "/serviceaccount/") {
			t.Errorf("a credential in a pod: %s", file)
		}
	}
	// What connects says so; the API server is what this pod may connect to.
	connect := func(prepare, address string, ports ...string) (string, error) {
		out, err := spy("set -e; " + prepare + "; echo prepared; for p in " + strings.Join(ports, " ") + "; do (if busybox nc -w 3 " + address + " $p </dev/null; then echo connected to $p; else echo not to $p; fi) & done; wait; echo all")
		if err != nil || !strings.Contains(out, "prepared") || strings.Count(out, "not to ")+strings.Count(out, "connected to ") != len(ports) {
			return out, fmt.Errorf("connecting to %s: %w\n%s", address, err, out)
		}
		return out, nil
	}
	eventually(t, "the pod to connect to the API server", func() error {
		out, err := connect("true", node, "6443")
		return errors.Join(err, is(fmt.Sprint(strings.Contains(out, "connected to 6443")), "true"))
	})
	local := loopbackPorts(t)
	if !slices.Contains(local, "2379") || !slices.Contains(local, "9443") {
		t.Fatalf("on the host's loopback listen %v: not etcd and the webhooks", local)
	}
	const routed = "busybox ip addr flush dev lo; echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet; gw=$(busybox ip route | busybox awk '/^default/ {print $3}'); "
	for what, c := range map[string]struct{ prepare, address string }{
		"the node's address":        {"true", node},
		"loopback by the interface": {routed + "busybox ip route replace 127.0.0.2/32 via $gw dev eth0 onlink", "127.0.0.2"},
		"loopback of the host":      {routed + "busybox ip route replace 127.0.0.0/8 via $gw dev eth0 onlink", "127.0.0.1"},
	} {
		// A guest that stands still sends nothing before nc gives up, which proves nothing.
		eventually(t, what+": each port to be asked", func() error {
			sent := n.sent()
			out, err := connect(c.prepare, c.address, local...)
			if strings.Contains(out, "\nconnected to ") {
				t.Fatalf("%s: a pod could connect to what only the host may:\n%s", what, out)
			}
			if err != nil {
				return err
			}
			if grown := n.sent() - sent; grown < len(local) {
				return fmt.Errorf("to %d ports the pod has sent %d packets only", len(local), grown)
			}
			return nil
		})
	}
}

// sent is how many packets the pod spy has sent.
func (n *tenant) sent() int {
	n.t.Helper()
	out := n.exec("spy", "busybox", "cat", "/sys/class/net/eth0/statistics/tx_packets")
	count, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		n.t.Fatal(err)
	}
	return count
}

// loopbackPorts are the ports that listen on the host's loopback and nowhere else.
func loopbackPorts(t *testing.T) []string {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	var ports []string
	everywhere := map[string]bool{}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[3] != "0A" { // listening
			continue
		}
		address, hex, _ := strings.Cut(f[1], ":")
		port, err := strconv.ParseUint(hex, 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		if name := strconv.FormatUint(port, 10); address == "0100007F" {
			ports = append(ports, name)
		} else {
			everywhere[name] = true
		}
	}
	return slices.DeleteFunc(ports, func(p string) bool { return everywhere[p] })
}

// TestAttackLogin: guessing is stopped and says nothing; sessions that were revoked are worth nothing.
func TestAttackLogin(t *testing.T) {
	t.Parallel()
	n := newTenant(t, "", "")
	victim := newActor(t, n.name+"-victim")
	nobody := account(t, n.name+"-nobody")
	first, err := victim.guess("wrong")
	if err == nil {
		t.Fatal("a wrong password was taken")
	}
	unknown, err := nobody.guess("wrong")
	if err == nil || strings.ReplaceAll(unknown, nobody.name, "X") != strings.ReplaceAll(first, victim.name, "X") {
		t.Errorf("the answers tell who exists:\n%s\n%s", first, unknown)
	}
	victim.guessed()
	n.owner.login() // nobody else suffers
	if _, err := victim.try("", "auth", "whoami"); err != nil {
		t.Errorf("being locked ended the session that there was: %v", err)
	}
	host(t, "", "user", "unlock", victim.name)
	eventually(t, "the unlocked user to log in", func() error {
		_, err := victim.tryLogin(victim.password)
		return err
	})
	gone := func(what string, p *actor) {
		t.Helper()
		eventually(t, what, func() error { return loggedOut(p.try("", "auth", "whoami")) })
	}
	contains(t, victim.kubectl("auth", "whoami"), "sso:"+victim.name+"@atoll.local")
	host(t, "", "user", "revoke", victim.name)
	gone("a revoked session to end", victim)
	victim.login()
	host(t, "", "user", "disable", victim.name)
	gone("the session of a disabled user to end", victim)
	if out, err := victim.tryLogin(victim.password); err == nil {
		t.Errorf("a disabled user could log in: %s", out)
	}
	host(t, "", "user", "enable", victim.name)
	victim.login()
	// Who is deleted and made again is somebody else.
	host(t, "", "user", "delete", victim.name)
	gone("the session of a deleted user to end", victim)
	victim.create()
	if out, err := victim.try("", "auth", "whoami"); err == nil {
		t.Errorf("the session of a deleted user came back: %s", out)
	}
	// A name is not another's by case, domain or unicode.
	for _, name := range []string{strings.ToUpper(n.owner.name), n.owner.name + "@evil.example", "sso:" + n.owner.name, n.owner.name + "\u0000", " " + n.owner.name, "system:admin", "../" + n.owner.name} {
		if out, err := account(t, name).guess(n.owner.password + "x"); err == nil {
			t.Errorf("%q: logged in: %s", name, out)
		}
	}
	if out, err := tryHost(context.Background(), n.owner.password+"\n", "user", "create", "system:masters", "--password-stdin"); err == nil {
		t.Errorf("a user could be made that is one of Kubernetes' own: %s", out)
	}
}
