//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestRolloutAndRollback changes a Deployment and takes the change back.
func TestRolloutAndRollback(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: web
          image: busybox
          imagePullPolicy: IfNotPresent
          command: [sh, -c, "mkdir /w; echo $VERSION > /w/version; exec httpd -f -p 80 -h /w"]
          env: [{name: VERSION, value: one}]
          readinessProbe: {httpGet: {path: /version, port: 80}, periodSeconds: 1, timeoutSeconds: 10}
`)
	// served waits for the rollout and checks the version that each pod serves.
	served := func(want string) {
		t.Helper()
		n.kubectl("rollout", "status", "deployment/web", timeout(patience))
		pods := strings.Fields(n.kubectl("get", "pods", "-l", "app=web", "-o", `jsonpath={range .items[?(@.status.phase=="Running")]}{.metadata.deletionTimestamp}{.metadata.name}{"\n"}{end}`))
		count := 0
		for _, pod := range pods {
			if !strings.HasPrefix(pod, "web-") {
				continue // it is being deleted
			}
			equal(t, "version of "+pod, n.exec(pod, "cat", "/w/version"), want)
			count++
		}
		if count != 2 {
			t.Fatalf("%d pods of version %s, want 2: %v", count, want, pods)
		}
	}
	served("one")
	n.kubectl("set", "env", "deployment/web", "VERSION=two")
	served("two")
	contains(t, n.kubectl("rollout", "undo", "deployment/web"), "rolled back")
	served("one")
	equal(t, "revision", n.field("deployment/web", `.metadata.annotations.deployment\.kubernetes\.io/revision`), "3")
}

func TestIndexedJob(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: batch/v1
kind: Job
metadata: {name: count}
spec:
  completions: 4
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      restartPolicy: Never
      containers:
        - {name: main, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, "echo index $JOB_COMPLETION_INDEX"]}
`)
	n.kubectl("wait", "--for=condition=Complete", "job/count", timeout(patience))
	equal(t, "succeeded", n.field("job/count", ".status.succeeded"), "4")
	logs := n.kubectl("logs", "-l", "job-name=count", "--tail=-1")
	for i := range 4 {
		contains(t, logs, fmt.Sprintf("index %d\n", i))
	}
}

func TestCrashLoop(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(strings.Replace(script("crashes", "exit 3"), "restartPolicy: Never", "restartPolicy: Always", 1))
	eventually(t, "CrashLoopBackOff", func() error {
		out, err := n.try("get", "pod", "crashes", "--no-headers")
		if err != nil || !strings.Contains(out, "CrashLoopBackOff") {
			return fmt.Errorf("kubectl shows %q", out)
		}
		return nil
	})
	equal(t, "exit code", n.field("pod/crashes", ".status.containerStatuses[0].lastState.terminated.exitCode"), "3")
	n.says("pod/crashes", "Back-off restarting failed container")
}

// TestWrongManifests: what is wrong is named, nothing is dropped in silence.
func TestWrongManifests(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	const manifest = `
apiVersion: v1
kind: Pod
metadata: {name: wrong}
spec:
  restartPolicy: Never
  containers: [{name: main, image: busybox}]
`
	for _, tc := range []struct{ what, old, new, message string }{
		{"unknown field", "image: busybox", "image: busybox, imagePullPolicie: Never", `unknown field "spec.containers[0].imagePullPolicie"`},
		{"wrong type", "image: busybox", `image: busybox, ports: [{containerPort: "eighty"}]`, "containerPort"},
		{"wrong value", "restartPolicy: Never", "restartPolicy: Sometimes", `Unsupported value: "Sometimes"`},
		{"missing volume", "image: busybox", "image: busybox, volumeMounts: [{name: v, mountPath: /v}]", `spec.containers[0].volumeMounts[0].name: Not found: "v"`},
		{"unknown class", "restartPolicy: Never", "runtimeClassName: wasm", `RuntimeClass "wasm" not found`},
	} {
		t.Log(tc.what)
		contains(t, n.refused(strings.Replace(manifest, tc.old, tc.new, 1)), tc.message)
	}
}
