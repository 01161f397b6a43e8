// Package volumes measures volumes: the operations of the CSI driver, attaching, throughput beside the same image opened
// on the host, and what many volumes leave behind.
//
// The bench calls each exported function as one part, inside rig.WithVolumes, which makes the storage classes and cleans
// up. Only volumes of the directory datastore can be compared with qemu-img; it is opened beside the product, which fails
// if somebody else has the volume. Attach and Leak wait until no volume of the host is attached, and fail if somebody
// else's is.
package volumes

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"atoll.dev/atoll/bench/rig"
)

// devicePath is where a pod finds a block volume.
const devicePath = "/dev/volume"

// volumePod is a pod that ends when it is told to: one that is deleted by force would be gone before its volume is
// free.
func volumePod(name, runtime string) *corev1.Pod {
	pod, grace := rig.Pod(name, runtime), int64(10)
	pod.Spec.TerminationGracePeriodSeconds = &grace
	pod.Spec.Containers[0].Command = []string{"sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"}
	return pod
}

// withClaim adds a volume to a pod.
func withClaim(pod *corev1.Pod, claim string, block bool) *corev1.Pod {
	c := &pod.Spec.Containers[0]
	pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{
		PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
	}})
	if block {
		c.VolumeDevices = append(c.VolumeDevices, corev1.VolumeDevice{Name: "v", DevicePath: devicePath})
	} else {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "v", MountPath: "/data"})
	}
	return pod
}

// Attach starts the same pod with and without a volume.
func Attach(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	if err := h.Claim(ctx, "attach", rig.VolumeClass, 1<<10, false); err != nil {
		return nil, err
	}
	if err := h.Bound(ctx); err != nil {
		return nil, err
	}
	without, with, late := "without", "with", "new"
	samples := map[string][]float64{}
	for i := range h.Options.N/2 + 1 {
		for _, kind := range []string{without, with, late} {
			if err := h.FullPool(ctx); err != nil {
				return nil, err
			}
			pod := volumePod(fmt.Sprintf("%s-%d", kind, i), "atoll")
			switch kind {
			case with:
				pod = withClaim(pod, "attach", false)
			case late:
				if err := h.Claim(ctx, pod.Name, rig.LateClass, 1<<10, false); err != nil {
					return nil, err
				}
				pod = withClaim(pod, pod.Name, false)
			}
			took, err := h.StartPod(ctx, pod, rig.IsReady)
			if err != nil {
				return nil, err
			}
			if err := errors.Join(h.DeletePods(ctx), h.Detached(ctx)); err != nil {
				return nil, err
			}
			if i > 0 { // the first one warms all sides, and makes the file system
				samples[kind] = append(samples[kind], rig.Milliseconds(took))
			}
		}
	}
	const against = "the same pod without a volume"
	attach := rig.Versus("pod with a volume, create to Ready", "ms", samples[with], against, samples[without])
	attach.Note = fmt.Sprintf("attaching takes %.0f ms, the difference of the medians; the bar is 300", attach.Atoll.P50-attach.Other.P50)
	first := rig.Versus("pod with a new claim, create to Ready", "ms", samples[late], against, samples[without])
	first.Note = fmt.Sprintf("the volume is made, attached and formatted: %.0f ms", first.Atoll.P50-first.Other.P50)
	return []rig.Row{attach, first}, nil
}
