package kubelet

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/configmap"
	upstream "k8s.io/kubernetes/pkg/volume/emptydir"
	mount "k8s.io/mount-utils"

	"atoll.dev/atoll/internal/datadir/handover"
)

// volumeHost is the kubelet as a plugin sees it; calls that no test makes panic.
type volumeHost struct {
	volume.VolumeHost
	dir string
}

func (h volumeHost) GetPodsDir() string { return filepath.Join(h.dir, "pods") }
func (h volumeHost) GetPodVolumeDir(uid types.UID, plugin, name string) string {
	return filepath.Join(h.GetPodsDir(), string(uid), "volumes", plugin, name)
}
func (h volumeHost) GetMounter() mount.Interface { return nil }

func TestEmptyDirMetrics(t *testing.T) {
	host := volumeHost{dir: t.TempDir()}
	plugins := append(configmap.ProbeVolumePlugins(), upstream.ProbeVolumePlugins()...)
	if err := measureEmptyDirs(plugins); err != nil {
		t.Fatal(err)
	}
	p := plugins[len(plugins)-1]
	if err := p.Init(host); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u-1"}}
	spec := volume.NewSpecFromVolume(&corev1.Volume{Name: "cache", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
	m, err := p.NewMounter(spec, pod)
	if err != nil {
		t.Fatal(err)
	}
	onHost := filepath.Join(host.dir, "pods/u-1/volumes/kubernetes.io~empty-dir/cache")
	if m.GetPath() != onHost {
		t.Errorf("path %s", m.GetPath())
	}
	if err := os.MkdirAll(onHost, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(onHost, "file"), []byte(strings.Repeat("x", 1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}

	// A pod under runc: upstream looks at the directory.
	got, err := m.GetMetrics()
	if err != nil || got.Used.Value() < 1<<20 || got.Inodes == nil {
		t.Errorf("on the host: %+v, %v", got, err)
	}
	// A micro-VM pod: the shim knows.
	file := handover.EmptyDirUsage(filepath.Join(host.dir, "pods/u-1"), "cache")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := (handover.Usage{Bytes: 5, Inodes: 2, Capacity: 100, Available: 40}).Write(file); err != nil {
		t.Fatal(err)
	}
	got, err = m.GetMetrics()
	if err != nil {
		t.Fatal(err)
	}
	if got.Used.Value() != 5 || got.InodesUsed.Value() != 2 || got.Capacity.Value() != 100 || got.Available.Value() != 40 || got.Time.IsZero() {
		t.Errorf("in the guest: %+v", got)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := m.GetMetrics(); err == nil {
		t.Errorf("from a broken file: %+v", got)
	}
}

func TestMeasureEmptyDirsNeedsThePlugin(t *testing.T) {
	if err := measureEmptyDirs(configmap.ProbeVolumePlugins()); err == nil {
		t.Error("there is none")
	}
}
