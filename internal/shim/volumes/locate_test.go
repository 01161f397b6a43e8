package volumes

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/shim/spec"
)

const (
	testUID     = "3f1c6f6e-0c0e-4c0d-9d55-0d3f6a7f3b11"
	testKubelet = "/var/lib/atoll/kubelet"
	testPod     = testKubelet + "/pods/" + testUID
)

// testMounts is cut from a real host: the kubelet's directory on the root file system, a Secret on a
// tmpfs, and subPath mounts of both, one with a space in its name.
const testMounts = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
90 22 0:60 / ` + testPod + `/volumes/kubernetes.io~secret/key rw,relatime shared:9 - tmpfs tmpfs rw,size=1024k
91 22 254:0 ` + testPod + `/volumes/kubernetes.io~configmap/page/..2026_01_02/a\040b.conf ` + testPod + `/volume-subpaths/page/nginx/2 rw - ext4 /dev/vda rw
92 22 0:60 /..2026_01_02/tls.key ` + testPod + `/volume-subpaths/key/nginx/3 ro - tmpfs tmpfs rw
93 22 254:0 /srv/secret ` + testPod + `/volume-subpaths/evil/nginx/4 rw - ext4 /dev/vda rw
94 22 254:0 ` + testPod + `/volumes/kubernetes.io~empty-dir/cache/sub//deleted ` + testPod + `/volume-subpaths/cache/nginx/5 rw - ext4 /dev/vda rw
95 22 254:0 ` + testKubelet + `/pods/other/volumes/kubernetes.io~secret/x ` + testPod + `/volume-subpaths/x/nginx/6 rw - ext4 /dev/vda rw
`

func testRoots(t *testing.T) Roots {
	t.Helper()
	name := filepath.Join(t.TempDir(), "mountinfo")
	if err := os.WriteFile(name, []byte(testMounts), 0o600); err != nil {
		t.Fatal(err)
	}
	return Roots{Kubelet: testKubelet, Containerd: "/var/lib/atoll/containerd", Mountinfo: name}
}

func TestLocate(t *testing.T) {
	r := testRoots(t)
	vol := func(kind Kind, plugin, name, sub string) Location {
		return Location{Kind: kind, ID: "v-" + name, Host: testPod + "/volumes/kubernetes.io~" + plugin + "/" + name, Sub: sub}
	}
	image := "/var/lib/atoll/containerd/io.containerd.grpc.v1.cri/containers/abc/volumes/0123"
	for source, want := range map[string]Location{
		testPod + "/volumes/kubernetes.io~empty-dir/cache":      vol(KindEmptyDir, "empty-dir", "cache", ""),
		testPod + "/volumes/kubernetes.io~configmap/page":       vol(KindPushed, "configmap", "page", ""),
		testPod + "/volumes/kubernetes.io~projected/kube-api-x": vol(KindPushed, "projected", "kube-api-x", ""),
		testPod + "/volumes/kubernetes.io~downward-api/info":    vol(KindPushed, "downward-api", "info", ""),
		testPod + "/volume-subpaths/page/nginx/2":               vol(KindPushed, "configmap", "page", "..2026_01_02/a b.conf"),
		testPod + "/volume-subpaths/key/nginx/3":                vol(KindPushed, "secret", "key", "..2026_01_02/tls.key"),
		testPod + "/volume-subpaths/cache/nginx/5":              vol(KindEmptyDir, "empty-dir", "cache", "sub"),
		testPod + "/etc-hosts":                                  {Kind: KindHosts, Host: testPod + "/etc-hosts"},
		testPod + "/containers/nginx/1a2b3c4d":                  {Kind: KindTerminationLog, Host: testPod + "/containers/nginx/1a2b3c4d"},
		image:                                                   {Kind: KindImage, ID: "i-0123", Host: image},
	} {
		if got, err := r.Locate(source); err != nil || got != want {
			t.Errorf("%s:\n got %+v, %v\nwant %+v", source, got, err, want)
		}
	}
}

func TestLocateRefuses(t *testing.T) {
	r := testRoots(t)
	for source, text := range map[string]string{
		"/etc": "path",
		"/run/atoll/containerd/io.containerd.grpc.v1.cri/image-volumes/a/b": "an image as a volume",
		testPod + "/volumes/kubernetes.io~nfs/pvc":                          `"pvc" of kind kubernetes.io/nfs`,
		testPod + "/volumes/kubernetes.io~csi/pvc/vol_data.json":            `"pvc" of kind kubernetes.io/csi`,
		testPod + "/volumes/kubernetes.io~empty-dir/../x":                   "source",
		testPod + "/volumes/kubernetes.io~empty-dir":                        "path",
		testPod + "/plugins/x":                                              "path",
		testPod + "/volume-subpaths/evil/nginx/4":                           "subPath",
		testPod + "/volume-subpaths/x/nginx/6":                              "subPath",
		testKubelet + "/pods":                                               "path",
		testKubelet + "-evil/pods/u/etc-hosts":                              "path",
		"/var/lib/atoll/containerd/io.containerd/x/../y":                    "source",
		"/var/lib/atoll/containerd/containers/a/volumes/-b":                 "path",
		"relative": "source",
	} {
		_, err := r.Locate(source)
		if !errors.Is(err, spec.ErrUnsupported) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v", source, err)
		}
	}
	if _, err := r.Locate(testPod + "/volume-subpaths/none/nginx/9"); err == nil {
		t.Error("a subPath that is not mounted was found")
	}
	if _, err := (Roots{}).Locate("/pods/u/etc-hosts"); !errors.Is(err, spec.ErrUnsupported) {
		t.Errorf("without roots: %v", err)
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add(testMounts)
	f.Add(`1 2 3 \0 \04 \777`)
	f.Fuzz(func(_ *testing.T, s string) {
		table, err := parseMounts(strings.NewReader(s))
		if err == nil {
			_, _ = table.origins(testPod + "/volume-subpaths/page/nginx/2")
		}
	})
}
