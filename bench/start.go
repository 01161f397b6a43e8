package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

// criStart alternates warm-pool micro-VM pods and runc pods at the level of CRI.
func criStart(ctx context.Context, h *host) ([]Row, error) {
	samples := map[string][]float64{}
	for i := range h.o.n + 1 {
		for _, runtime := range []string{"atoll", "runc"} {
			if err := h.fullPool(ctx); err != nil {
				return nil, err
			}
			s, took, err := h.startCRI(ctx, runtime)
			if err != nil {
				return nil, err
			}
			h.stopCRI(s)
			if i > 0 { // the first one warms both sides
				samples[runtime] = append(samples[runtime], milliseconds(took))
			}
		}
	}
	return []Row{compare("CRI start, warm pool hit", "ms", samples["atoll"], samples["runc"])}, nil
}

// criColdStart takes the pool's members away and measures the pods that come next.
func criColdStart(ctx context.Context, h *host) ([]Row, error) {
	var samples []float64
	for range max(1, h.o.n/5) {
		if err := h.fullPool(ctx); err != nil {
			return nil, err
		}
		status, err := h.poolStatus(ctx)
		if err != nil {
			return nil, err
		}
		var taken []*sandbox
		for i := range status.Wanted + 1 {
			s, took, err := h.startCRI(ctx, "atoll")
			if err != nil {
				return nil, err
			}
			taken = append(taken, s)
			if i == status.Wanted {
				samples = append(samples, milliseconds(took))
			}
		}
		for _, s := range taken {
			h.stopCRI(s)
		}
	}
	row := compare("CRI start, pool just emptied", "ms", samples, nil)
	row.Note = "while the pool refills on the same cores"
	return []Row{row}, nil
}

func benchPod(name, runtime string) *corev1.Pod {
	grace := int64(0)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: benchNamespace, Labels: map[string]string{"bench": "pod"}},
		Spec: corev1.PodSpec{
			RuntimeClassName:              &runtime,
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "main", Image: busyboxImage, ImagePullPolicy: corev1.PullIfNotPresent, Command: []string{"sleep", "100000"},
			}},
		},
	}
}

// kubectlStart measures create accepted to Running seen, one pod at a time.
func kubectlStart(ctx context.Context, h *host) ([]Row, error) {
	samples := map[string][]float64{}
	for i := range h.o.n/2 + 1 {
		for _, runtime := range []string{"atoll", "runc"} {
			if err := h.fullPool(ctx); err != nil {
				return nil, err
			}
			took, err := h.startPod(ctx, benchPod(fmt.Sprintf("one-%s-%d", runtime, i), runtime), isRunning)
			if err != nil {
				return nil, err
			}
			if i > 0 {
				samples[runtime] = append(samples[runtime], milliseconds(took))
			}
		}
	}
	return []Row{compare("create accepted to Running, one at a time", "ms", samples["atoll"], samples["runc"])}, h.deletePods(ctx)
}

func isRunning(pod *corev1.Pod) bool { return pod.Status.Phase == corev1.PodRunning }

// isReady is true once all containers run and their probes have succeeded, of which there are none here.
func isReady(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// startPod creates a pod, waits until it is as wanted, and deletes it.
func (h *host) startPod(ctx context.Context, pod *corev1.Pod, wanted func(*corev1.Pod) bool) (time.Duration, error) {
	pods, name := h.kube.CoreV1().Pods(benchNamespace), pod.Name
	watch, err := pods.Watch(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()})
	if err != nil {
		return 0, err
	}
	defer watch.Stop()
	if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		return 0, fmt.Errorf("creating pod %s: %w", name, err)
	}
	begin := time.Now()
	timeout := time.After(2 * time.Minute)
	for {
		select {
		case event := <-watch.ResultChan():
			if pod, ok := event.Object.(*corev1.Pod); ok && wanted(pod) {
				took := time.Since(begin)
				return took, pods.Delete(ctx, name, metav1.DeleteOptions{})
			}
		case <-timeout:
			return 0, fmt.Errorf("pod %s did not start within two minutes", name)
		}
	}
}

// deletePods removes every pod of the bench and waits until they are gone.
func (h *host) deletePods(ctx context.Context) error {
	pods := h.kube.CoreV1().Pods(benchNamespace)
	if err := pods.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		return err
	}
	for range 1200 {
		list, err := pods.List(ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(250 * time.Millisecond):
		}
	}
	return fmt.Errorf("pods of %s are still there after five minutes", benchNamespace)
}

// densityBurst is KubeVirt's density protocol: 100 pods, 100 ms apart, raw timestamps.
func densityBurst(ctx context.Context, h *host) ([]Row, error) {
	var rows []Row
	samples := map[string][]float64{}
	for _, runtime := range []string{"atoll", "runc"} {
		if err := h.fullPool(ctx); err != nil {
			return nil, err
		}
		took, err := h.burst(ctx, runtime, 100)
		if err != nil {
			return rows, err
		}
		samples[runtime] = took
		if err := h.deletePods(ctx); err != nil {
			return rows, err
		}
	}
	return []Row{compare("100 pods 100 ms apart, create to Running", "ms", samples["atoll"], samples["runc"])}, nil
}

func (h *host) burst(ctx context.Context, runtime string, count int) ([]float64, error) {
	pods := h.kube.CoreV1().Pods(benchNamespace)
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
			if _, err := pods.Create(ctx, benchPod(name, runtime), metav1.CreateOptions{}); err != nil {
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
		took = append(took, milliseconds(end.Sub(at[name])))
	}
	return took, nil
}

func podName(pod *corev1.Pod, ok bool) string {
	if !ok {
		return ""
	}
	return pod.Name
}
