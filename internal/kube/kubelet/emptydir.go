package kubelet

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/pkg/volume"

	"atoll.dev/atoll/internal/datadir/handover"
)

// emptyDirName is the name of upstream's plugin.
const emptyDirName = "kubernetes.io/empty-dir"

// measureEmptyDirs makes the kubelet see what emptyDirs of micro-VM pods take, and so evict pods over a
// volume's sizeLimit: on the host, where upstream looks, they are empty.
func measureEmptyDirs(plugins []volume.VolumePlugin) error {
	for i, p := range plugins {
		if p.GetPluginName() == emptyDirName {
			plugins[i] = &emptyDirPlugin{VolumePlugin: p}
			return nil
		}
	}
	return fmt.Errorf("there is no volume plugin %s", emptyDirName)
}

// emptyDirPlugin is upstream's, but for the metrics of what it mounts.
type emptyDirPlugin struct {
	volume.VolumePlugin
	host volume.VolumeHost
}

func (p *emptyDirPlugin) Init(host volume.VolumeHost) error {
	p.host = host
	return p.VolumePlugin.Init(host)
}

func (p *emptyDirPlugin) NewMounter(spec *volume.Spec, pod *corev1.Pod) (volume.Mounter, error) {
	m, err := p.VolumePlugin.NewMounter(spec, pod)
	if err != nil {
		return nil, err
	}
	podDir := filepath.Join(p.host.GetPodsDir(), string(pod.UID))
	return &emptyDir{Mounter: m, usage: handover.EmptyDirUsage(podDir, spec.Name())}, nil
}

// emptyDir is one volume.
type emptyDir struct {
	volume.Mounter
	usage string // file in which the shim says what it takes in the guest
}

// GetMetrics returns what the shim has written down. Pods without a micro-VM, and those whose containers
// have not been looked at yet, are measured by upstream.
func (d *emptyDir) GetMetrics() (*volume.Metrics, error) {
	u, at, err := handover.ReadUsage(d.usage)
	if errors.Is(err, fs.ErrNotExist) {
		return d.Mounter.GetMetrics()
	}
	if err != nil {
		return nil, err
	}
	bytes := func(n int64) *resource.Quantity { return resource.NewQuantity(n, resource.BinarySI) }
	return &volume.Metrics{
		Time: metav1.NewTime(at), Used: bytes(u.Bytes), InodesUsed: bytes(u.Inodes),
		Capacity: bytes(u.Capacity), Available: bytes(u.Available),
	}, nil
}
