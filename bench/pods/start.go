// Package pods measures pods beside runc's: how fast they start, one at a time and a hundred at once, what their disks
// and network carry, what they and the services take of the host's memory, and whether they leave something behind.
//
// The bench calls each exported function as one part. It does not measure volumes; package volumes does. CRIStart,
// CRIColdStart and LeakCycles need rig.WithoutKubelet, or the kubelet ends what they start. A part that fails in the
// middle leaves its pods behind: those of the API go with the namespace of the bench, those of CRI have to be removed.
package pods

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"atoll.dev/atoll/bench/rig"
)

// CRIStart alternates warm-pool micro-VM pods and runc pods at the level of CRI.
func CRIStart(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	samples := map[string][]float64{}
	for i := range h.Options.N + 1 {
		for _, runtime := range []string{"atoll", "runc"} {
			if err := h.FullPool(ctx); err != nil {
				return nil, err
			}
			s, took, err := h.StartCRI(ctx, runtime)
			if err != nil {
				return nil, err
			}
			h.StopCRI(s)
			if i > 0 { // the first one warms both sides
				samples[runtime] = append(samples[runtime], rig.Milliseconds(took))
			}
		}
	}
	return []rig.Row{rig.Compare("CRI start, warm pool hit", "ms", samples["atoll"], samples["runc"])}, nil
}

// CRIColdStart takes the pool's members away and measures the pods that come next.
func CRIColdStart(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	var samples []float64
	for range max(1, h.Options.N/5) {
		if err := h.FullPool(ctx); err != nil {
			return nil, err
		}
		status, err := h.PoolStatus(ctx)
		if err != nil {
			return nil, err
		}
		var taken []*rig.Sandbox
		for i := range status.Wanted + 1 {
			s, took, err := h.StartCRI(ctx, "atoll")
			if err != nil {
				return nil, err
			}
			taken = append(taken, s)
			if i == status.Wanted {
				samples = append(samples, rig.Milliseconds(took))
			}
		}
		for _, s := range taken {
			h.StopCRI(s)
		}
	}
	row := rig.Compare("CRI start, pool just emptied", "ms", samples, nil)
	row.Note = "while the pool refills on the same cores"
	return []rig.Row{row}, nil
}

// KubectlStart measures create accepted to Running seen, one pod at a time.
func KubectlStart(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	samples := map[string][]float64{}
	for i := range h.Options.N/2 + 1 {
		for _, runtime := range []string{"atoll", "runc"} {
			if err := h.FullPool(ctx); err != nil {
				return nil, err
			}
			took, err := h.StartPod(ctx, rig.Pod(fmt.Sprintf("one-%s-%d", runtime, i), runtime), rig.IsRunning)
			if err != nil {
				return nil, err
			}
			if i > 0 {
				samples[runtime] = append(samples[runtime], rig.Milliseconds(took))
			}
		}
	}
	return []rig.Row{rig.Compare("create accepted to Running, one at a time", "ms", samples["atoll"], samples["runc"])}, h.DeletePods(ctx)
}

// DensityBurst is KubeVirt's density protocol: 100 pods, 100 ms apart, raw timestamps.
func DensityBurst(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	var rows []rig.Row
	samples := map[string][]float64{}
	for _, runtime := range []string{"atoll", "runc"} {
		if err := h.FullPool(ctx); err != nil {
			return nil, err
		}
		took, err := burst(ctx, h, runtime, 100)
		if err != nil {
			return rows, err
		}
		samples[runtime] = took
		if err := h.DeletePods(ctx); err != nil {
			return rows, err
		}
	}
	return []rig.Row{rig.Compare("100 pods 100 ms apart, create to Running", "ms", samples["atoll"], samples["runc"])}, nil
}

func burst(ctx context.Context, h *rig.Host, runtime string, count int) ([]float64, error) {
	pods := h.Kube.CoreV1().Pods(rig.Namespace)
	watch, err := pods.Watch(ctx, metav1.ListOptions{LabelSelector: "bench=pod"})
	if err != nil {
		return nil, err
	}
	defer watch.Stop()
	created := make(chan map[string]time.Time, 1)
	failed := make(chan error, 1)
	go func() {
		at := map[string]time.Time{}
		for i := range count {
			name := fmt.Sprintf("burst-%s-%d", runtime, i)
			next := time.Now().Add(100 * time.Millisecond)
			if _, err := pods.Create(ctx, rig.Pod(name, runtime), metav1.CreateOptions{}); err != nil {
				failed <- err
				return
			}
			at[name] = time.Now()
			time.Sleep(time.Until(next))
		}
		created <- at
	}()
	running := map[string]time.Time{}
	timeout := time.After(15 * time.Minute)
	for len(running) < count {
		select {
		case event := <-watch.ResultChan():
			pod, ok := event.Object.(*corev1.Pod)
			if _, seen := running[podName(pod, ok)]; ok && !seen && pod.Status.Phase == corev1.PodRunning {
				running[pod.Name] = time.Now()
			}
		case err := <-failed:
			return nil, err
		case <-timeout:
			return nil, fmt.Errorf("only %d of %d %s pods run after 15 minutes", len(running), count, runtime)
		}
	}
	at := <-created
	var took []float64
	for name, end := range running {
		took = append(took, rig.Milliseconds(end.Sub(at[name])))
	}
	return took, nil
}

func podName(pod *corev1.Pod, ok bool) string {
	if !ok {
		return ""
	}
	return pod.Name
}
