//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// containerDisk is a layer with one disk, as KubeVirt has it.
func containerDisk(t *testing.T, disk string) []byte {
	t.Helper()
	content, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "disk/disk.qcow2", Mode: 0o440, Uid: 107, Gid: 107, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// image pushes an image of one layer under a tag.
func (d *docker) image(repository, tag string, blob []byte) {
	d.t.Helper()
	layer, code, text := d.upload(repository, blob)
	if code != http.StatusCreated {
		d.t.Fatalf("uploading a layer: %d %s", code, text)
	}
	sum := sha256.Sum256(blob)
	settings := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, hex.EncodeToString(sum[:]))
	config, code, text := d.upload(repository, settings)
	if code != http.StatusCreated {
		d.t.Fatalf("uploading a configuration: %d %s", code, text)
	}
	resp, text := d.with(repository, "pull,push", http.MethodPut, "manifests/"+tag, ociManifest(config, len(settings), layer, len(blob)), "Content-Type", ociManifestType)
	if resp.StatusCode != http.StatusCreated {
		d.t.Fatalf("uploading a manifest: %s %s", resp.Status, text)
	}
}

// untag deletes a tag.
func (d *docker) untag(repository, tag string) {
	d.t.Helper()
	if resp, text := d.with(repository, "pull,delete", http.MethodDelete, "manifests/"+tag, nil); resp.StatusCode != http.StatusAccepted {
		d.t.Fatalf("deleting %s:%s: %s %s", repository, tag, resp.Status, text)
	}
}

// shown waits until there is an image of a name in the state wanted ("True", "False", "" for none), and returns its
// object's name and what it says.
func (n *namespace) shown(display, ready string) (name, says string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("image %s to be %q", display, ready), func() error {
		out, err := n.try("get", "virtualmachineimages", "-o", `jsonpath={range .items[*]}{.status.name}{"|"}{.metadata.name}{"|"}{.status.conditions[?(@.type=="Ready")].status}{"|"}{.status.conditions[?(@.type=="Ready")].message}{"\n"}{end}`)
		if err != nil {
			return err
		}
		got := ""
		for line := range strings.Lines(out) {
			if f := strings.SplitN(strings.TrimSpace(line), "|", 4); len(f) == 4 && f[0] == display {
				name, got, says = f[1], f[2], f[3]
			}
		}
		if got != ready {
			return fmt.Errorf("images are: %s", out)
		}
		return nil
	})
	return name, says
}

// TestMachinePublishToProject: a machine is published to the project of its namespace in the registry, machines are made
// of it there, what others push there is an image as well, and it is nobody else's.
func TestMachinePublishToProject(t *testing.T) {
	t.Parallel()
	n := machines(t)
	editor, stranger := newActor(t, n.name+"-editor"), newActor(t, n.name+"-stranger")
	n.kubectl("create", "rolebinding", "editor", "--clusterrole=atoll:edit", "--user=sso:"+editor.name+"@atoll.local")
	eventually(t, "the library of the project", func() error {
		if got, err := n.tryField("contentlibrary/registry", `.status.type}{.status.conditions[?(@.type=="Ready")].status`); err != nil || got != "RegistryTrue" {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
	n.kubectl("create", "rolebinding", "stranger", "--clusterrole=edit", "--user=sso:"+stranger.name+"@atoll.local") // but no right to push
	eventually(t, "the stranger to have the rights of an editor", func() error {
		_, err := stranger.try("", "auth", "can-i", "create", "virtualmachinepublishrequests.vmoperator.vmware.com", "-n", n.name)
		return err
	})
	stranger.refused(n.name, `
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachinePublishRequest
metadata: {name: mine}
spec: {source: {name: box}, target: {location: {name: registry}}}
`, "may not push there")
	n.kubectl("delete", "rolebinding", "stranger")
	n.createBox()
	n.exec("box", "sh", "-c", "echo mine >/data/file; sync")
	n.vm("stop", "box")
	editor.apply(n.name, `
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachinePublishRequest
metadata: {name: mine}
spec: {source: {name: box}, target: {item: {name: parts/mine}, location: {name: registry}}}
`)
	contains(t, n.vm("publish", "box", "--to", registryHost+"/"+n.name+"/golden:1.0"), "is published as golden:1.0")
	d := editor.docker()
	resp, text := d.with(n.name+"/golden", "pull", http.MethodGet, "manifests/1.0", nil, "Accept", ociManifestType)
	digest := resp.Header.Get("Docker-Content-Digest")
	if resp.StatusCode != http.StatusOK || !strings.Contains(text, "application/vnd.oci.image.layer.v1.tar") {
		t.Fatalf("%s %s", resp.Status, text)
	}
	equal(t, "digest of the item", n.kubectl("get", "contentlibraryitems", "-o", `jsonpath={.items[?(@.spec.name=="golden:1.0")].status.digest}`), digest)
	n.vm("create", "copy", "--image", "golden:1.0", "--class", "tiny", "--no-bootstrap")
	n.agent("copy")
	equal(t, "the file in the copy", n.exec("copy", "cat", "/data/file"), "mine\n")

	n.ofRegistry()
	n.shown("parts/mine", "True")
	// The same name again is refused, and a name that cannot be one.
	for item, reason := range map[string]string{"golden:1.0": "TargetItemAlreadyExists", "No Name": "TargetItemNameInvalid"} {
		name := "again-" + strings.ToLower(reason)
		n.apply(fmt.Sprintf(`
apiVersion: vmoperator.vmware.com/v1alpha5
kind: VirtualMachinePublishRequest
metadata: {name: %s}
spec: {source: {name: box}, target: {item: {name: %q}, location: {name: registry, kind: ContentLibrary}}}
`, name, item))
		eventually(t, item+" to be refused", func() error {
			if got, err := n.tryField("vmpub/"+name, `.status.conditions[?(@.type=="TargetValid")].reason`); err != nil || got != reason {
				return fmt.Errorf("it is %q", got)
			}
			return nil
		})
		n.kubectl("delete", "vmpub", name) // or it would publish as soon as the tag is gone
	}

	// What others push is an image, what is malicious is refused, and what is no disk is none.
	d.image(n.name+"/outside", "latest", containerDisk(t, diskImage(t)))
	d.image(n.name+"/evil", "latest", containerDisk(t, diskImage(t, "-b", "/etc/shadow", "-F", "raw")))
	d.artifact(n.name+"/app", 1000)
	first, _ := n.shown("outside", "True")
	if _, says := n.shown("evil", "False"); !strings.Contains(says, "backing file") {
		eventually(t, "the malicious disk to be refused", func() error {
			if _, says := n.shown("evil", "False"); !strings.Contains(says, "backing file") {
				return fmt.Errorf("it says %q", says)
			}
			return nil
		})
	}
	// A tag that moves is another image; the one that goes takes it along.
	second := filepath.Join(t.TempDir(), "second.qcow2")
	if out, err := exec.CommandContext(t.Context(), "qemu-img", "create", "-q", "-f", "qcow2", second, "32M").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	d.image(n.name+"/outside", "latest", containerDisk(t, second))
	eventually(t, "another image", func() error {
		if now, _ := n.shown("outside", "True"); now == first {
			return fmt.Errorf("it is still %s", now)
		}
		return nil
	})
	n.disksOfTheLibrary(d)
	equal(t, "images that are no disks", n.kubectl("get", "contentlibraryitems", "-o", `jsonpath={.items[?(@.spec.name=="app:1")].metadata.name}`), "")
	n.strangers(stranger)
	contains(t, atoll(t, 1, suite.atoll, "image", "rm", "--vm", "golden:1.0", "-n", n.name, "--data-dir", suite.dataDir), "atoll registry rm "+n.name+"/golden:1.0")
	d.untag(n.name+"/golden", "1.0")
	d.untag(n.name+"/outside", "latest")
	n.shown("golden:1.0", "")
	n.shown("outside", "")
	equal(t, "the file in the copy without its image", n.exec("copy", "cat", "/data/file"), "mine\n")
}

// ofRegistry brings the image golden:1.0 in by its name in the registry, for all namespaces, and boots a machine of it.
func (n *namespace) ofRegistry() {
	t := n.t
	t.Helper()
	name := n.name + "-oci"
	t.Cleanup(func() { _ = exec.Command(suite.atoll, "image", "rm", "--vm", name, "--data-dir", suite.dataDir).Run() })
	contains(t, atollOK(t, "image", "import", "oci://"+registryHost+"/"+n.name+"/golden:1.0", "--name", name), "imported "+name)
	n.vm("create", "everywhere", "--image", name, "--class", "tiny", "--no-bootstrap")
	equal(t, "kind of its image", n.field("vm/everywhere", ".spec.image.kind"), "ClusterVirtualMachineImage")
	n.agent("everywhere")
	equal(t, "the file in it", n.exec("everywhere", "cat", "/data/file"), "mine\n")
	n.kubectl("delete", "vm", "everywhere", "--wait=false")
}

// strangers: another namespace has nothing of this one's project.
func (n *namespace) strangers(stranger *actor) {
	n.t.Helper()
	other := &namespace{t: n.t, name: n.name + "-other"}
	run(n.t, "", "create", "namespace", other.name)
	n.t.Cleanup(func() { _, _ = kubectl(context.Background(), "", "delete", "namespace", other.name, "--wait=false") })
	other.apply(fmt.Sprintf(`
apiVersion: imageregistry.vmware.com/v1alpha1
kind: ContentLibrary
metadata: {name: theirs}
spec: {registry: {project: %[1]s}}
---
apiVersion: imageregistry.vmware.com/v1alpha1
kind: ContentLibraryItem
metadata: {name: stolen}
spec: {source: {oci: {reference: "%[2]s/%[1]s/golden:1.0"}}}
`, n.name, registryHost))
	for object, want := range map[string]string{"contentlibrary/theirs": "spec.registry.project", "contentlibraryitem/stolen": "not from " + n.name} {
		eventually(n.t, object+" to be refused", func() error {
			if got, err := other.tryField(object, `.status.conditions[?(@.type=="Ready")].message`); err != nil || !strings.Contains(got, want) {
				return fmt.Errorf("it says %q", got)
			}
			return nil
		})
	}
	if resp, _ := stranger.docker().with(n.name+"/golden", "pull", http.MethodGet, "manifests/1.0", nil); resp.StatusCode/100 != 4 {
		n.t.Errorf("a stranger pulls the disk: %s", resp.Status)
	}
	contains(n.t, other.refused(`
apiVersion: imageregistry.vmware.com/v1alpha1
kind: ContentLibraryItem
metadata: {name: pushed}
spec: {library: registry, source: {upload: {}}, push: {repository: golden, tag: "1.0"}}
`), "VirtualMachinePublishRequest")
	out, err := combined(n.t.Context(), "", nil, "vm", "--data-dir", suite.dataDir, "--kubeconfig", suite.dataDir+"/admin.kubeconfig", "-n", n.name, "publish", "box", "--to", registryHost+"/"+other.name+"/golden")
	if err == nil || !strings.Contains(out, "published into the project of that namespace") {
		n.t.Errorf("publishing into another namespace: %v\n%s", err, out)
	}
}

// disksOfTheLibrary: a disk that an administrator pushes to the project library is an image for all namespaces, and gone
// with its tag. Others cannot.
func (n *namespace) disksOfTheLibrary(editor *docker) {
	n.t.Helper()
	repository := "library/" + n.name
	if _, code, text := editor.upload(repository, []byte("disk")); code != http.StatusForbidden || !strings.Contains(text, "administrators") {
		n.t.Errorf("an editor pushes to the library: %d %s", code, text)
	}
	administrator := newActor(n.t, n.name+"-administrator", "administrators").docker()
	administrator.image(repository, "1", containerDisk(n.t, diskImage(n.t)))
	name := clusterImage(n.t, n.name+":1")
	run(n.t, "", "wait", "clustervirtualmachineimage/"+name, "--for=condition=Ready", timeout(patience))
	contains(n.t, run(n.t, strings.Replace(machine("shelf", "tiny"), "imageName: tiny", "imageName: "+name, 1), "-n", n.name, "apply", "--dry-run=server", "-f", "-"), "created")
	administrator.untag(repository, "1")
	run(n.t, "", "wait", "clustervirtualmachineimage/"+name, "--for=delete", timeout(patience))
}
