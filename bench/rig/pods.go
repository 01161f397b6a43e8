package rig

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

// Pod is a sleeping pod of busybox that is not made yet, which ends at once when it is deleted.
func Pod(name, runtime string) *corev1.Pod {
	grace := int64(0)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: Namespace, Labels: map[string]string{"bench": "pod"}},
		Spec: corev1.PodSpec{
			RuntimeClassName:              &runtime,
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "main", Image: busyboxImage, ImagePullPolicy: corev1.PullIfNotPresent, Command: []string{"sleep", "100000"},
			}},
		},
	}
}

// IsRunning is true once a container runs and the others have been made.
func IsRunning(pod *corev1.Pod) bool { return pod.Status.Phase == corev1.PodRunning }

// IsReady is true once all containers run and their probes have succeeded, of which there are none here.
func IsReady(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// StartPod creates a pod, waits until it is as wanted, and deletes it.
func (h *Host) StartPod(ctx context.Context, pod *corev1.Pod, wanted func(*corev1.Pod) bool) (time.Duration, error) {
	pods, name := h.Kube.CoreV1().Pods(Namespace), pod.Name
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

// DeletePods removes every pod of the bench and waits until they are gone.
func (h *Host) DeletePods(ctx context.Context) error {
	pods := h.Kube.CoreV1().Pods(Namespace)
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
	return fmt.Errorf("pods of %s are still there after five minutes", Namespace)
}

// Tool starts a pod of the bench image and waits until it is Running.
func (h *Host) Tool(ctx context.Context, name, runtime string, command ...string) (*corev1.Pod, error) {
	pod := Pod(name, runtime)
	pod.Spec.Containers[0].Command = command
	return h.Start(ctx, pod)
}

// Start starts a pod of the bench image and waits until it is Running.
func (h *Host) Start(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	name := pod.Name
	pod.Spec.Containers[0].Image = benchImage
	pods := h.Kube.CoreV1().Pods(Namespace)
	if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	for range 600 {
		got, err := pods.Get(ctx, name, metav1.GetOptions{})
		if err == nil && got.Status.Phase == corev1.PodRunning {
			return got, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil, fmt.Errorf("pod %s did not run within two minutes", name)
}

// Exec runs a command in a pod of the bench and returns what it prints.
func (h *Host) Exec(ctx context.Context, pod string, command ...string) ([]byte, error) {
	atoll, err := filepath.Abs("bin/atoll")
	if err != nil {
		return nil, err
	}
	args := append([]string{"kubectl", "--kubeconfig", filepath.Join(h.Options.DataDir, "admin.kubeconfig"), "-n", Namespace, "exec", pod, "--"}, command...)
	out, err := exec.CommandContext(ctx, atoll, args...).Output()
	if err != nil {
		return nil, fmt.Errorf("%s in pod %s: %w", strings.Join(command, " "), pod, err)
	}
	return out, nil
}

// FioBandwidth is what the only job of a run of fio, whose output is JSON, has read or written, in MiB/s.
func FioBandwidth(out []byte, read bool) (float64, error) {
	type side struct {
		BytesPerSecond float64 `json:"bw_bytes"`
	}
	var result struct {
		Jobs []struct {
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	begin := max(0, bytes.IndexByte(out, '{')) // remarks come before it
	if err := json.Unmarshal(out[begin:], &result); err != nil || len(result.Jobs) == 0 {
		return 0, fmt.Errorf("reading fio's result from %.200q: %w", out, err)
	}
	if read {
		return result.Jobs[0].Read.BytesPerSecond / (1 << 20), nil
	}
	return result.Jobs[0].Write.BytesPerSecond / (1 << 20), nil
}

// Until waits for five minutes at most.
func Until(ctx context.Context, what string, done func() (bool, error)) error {
	var last error
	for range 3000 {
		ok, err := done()
		if ok && err == nil {
			return nil
		}
		last = err
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return errors.Join(fmt.Errorf("waiting until %s: five minutes have passed", what), last)
}
