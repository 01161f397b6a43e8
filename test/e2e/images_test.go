//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// pulled is a pod that pulls its image, with the password in a secret.
func pulled(name, image, secret string) string {
	pod := strings.Replace(script(name, "echo pulled"), "IfNotPresent", "Always", 1)
	pod = strings.Replace(pod, "image: busybox", "image: "+image, 1)
	return strings.Replace(pod, "spec:", "spec:\n  imagePullSecrets: [{name: "+secret+"}]", 1)
}

// login makes a secret with a password for the registry.
func (n *namespace) login(r *registry, secret, password string) {
	n.t.Helper()
	n.kubectl("create", "secret", "docker-registry", secret,
		"--docker-server="+r.host, "--docker-username="+registryUser, "--docker-password="+password)
}

// TestPrivateRegistry pulls from a registry that wants a password.
func TestPrivateRegistry(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	r := newRegistry(t)
	digest := r.push("team/app:1", image{})
	n.login(r, "right", registryPassword)
	n.login(r, "wrong", "12345")
	for name, ref := range map[string]string{"by-tag": "team/app:1", "by-digest": "team/app@" + digest} {
		n.apply(pulled(name, r.host+"/"+ref, "right"))
		equal(t, "phase of the pod "+name, n.ended(name), "Succeeded")
		contains(t, n.field("pod/"+name, ".status.containerStatuses[0].imageID"), digest)
	}
	for name, tc := range map[string]struct{ ref, secret, message string }{
		"wrong-password": {"team/app:1", "wrong", "401 Unauthorized"},
		"no-password":    {"team/app:1", "none", "authorization failed"},
		"no-such-tag":    {"team/app:2", "right", "team/app:2: not found"},
	} {
		n.apply(pulled(name, r.host+"/"+tc.ref, tc.secret))
		n.pullFails(name, tc.message, r.host+"/"+tc.ref)
	}
}

// TestImageOfAnotherArchitecture: the words say what is wrong, whether or not the registry knew.
func TestImageOfAnotherArchitecture(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	r := newRegistry(t)
	// A program for arm64, as far as a kernel reads it.
	program := "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9) + "\x02\x00\xb7\x00\x01" + strings.Repeat("\x00", 100)
	digest := r.push("team/arm:1", image{arch: "arm64", files: map[string]string{"app": program}})
	r.pushIndex("team/list:1", "arm64", digest)
	n.login(r, "right", registryPassword)
	n.apply(strings.Replace(pulled("list", r.host+"/team/list:1", "right"), "[sh, -ec,", "[/app,", 1))
	n.pullFails("list", "no match for platform")
	n.apply(strings.Replace(pulled("arm", r.host+"/team/arm:1", "right"), "[sh, -ec,", "[/app,", 1))
	equal(t, "phase", n.ended("arm"), "Failed")
	contains(t, n.field("pod/arm", ".status.containerStatuses[0].state.terminated.message"), "is the image for another architecture?")
}

// TestVolumeOfImage: a directory that an image declares a volume starts with the image's files and can
// be written even where the image cannot.
func TestVolumeOfImage(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	r := newRegistry(t)
	r.push("team/app:1", image{volumes: []string{"/data"}, files: map[string]string{"data/deep/file": "from the image\n"}})
	n.login(r, "right", registryPassword)
	pod := pulled("vol", r.host+"/team/app:1", "right")
	pod = strings.Replace(pod, "echo pulled", "cat /data/deep/file; echo new > /data/deep/other; cat /data/deep/other; ! touch /file 2>/dev/null", 1)
	n.apply(pod + "      securityContext: {readOnlyRootFilesystem: true}\n")
	equal(t, "phase", n.ended("vol"), "Succeeded")
	contains(t, n.kubectl("logs", "vol"), "from the image\nnew\n")
}

// TestImageAsVolume: only pods that run on the host can have it.
func TestImageAsVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "atoll.dev/host-access=allowed")
	pod := `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s}
spec:
  runtimeClassName: %[1]s
  restartPolicy: Never
  volumes: [{name: v, image: {reference: atoll.dev/tester, pullPolicy: IfNotPresent}}]
  containers:
    - name: main
      image: busybox
      imagePullPolicy: IfNotPresent
      command: [sh, -c, "test -x /v/bin/tester && test -x /programs/tester && ! touch /v/file"]
      volumeMounts: [{name: v, mountPath: /v}, {name: v, mountPath: /programs, subPath: bin}]
`
	n.apply(fmt.Sprintf(pod, "runc"))
	equal(t, "phase on the host", n.ended("runc"), "Succeeded")
	n.apply(fmt.Sprintf(pod, "atoll"))
	equal(t, "phase in a micro-VM", n.ended("atoll"), "Failed")
	message := n.field("pod/atoll", ".status.containerStatuses[0].state.terminated.message")
	contains(t, message, "an image as a volume")
	contains(t, message, `runtimeClassName "runc"`)
}

// TestImageOfWrongName: a name that no registry could have is refused at once.
func TestImageOfWrongName(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	for i, image := range []string{"Busy Box", "busybox:a:b", "busybox@sha256:abc"} {
		name := fmt.Sprintf("wrong-%d", i)
		n.apply(strings.Replace(script(name, "true"), "image: busybox", fmt.Sprintf("image: %q", image), 1))
		contains(t, n.waiting(name, "InvalidImageName"), image)
	}
}
