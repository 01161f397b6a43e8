package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// tool starts a pod of the bench image and waits until it is Running.
func (h *host) tool(ctx context.Context, name, runtime string, command ...string) (*corev1.Pod, error) {
	pod := benchPod(name, runtime)
	pod.Spec.Containers[0].Command = command
	return h.start(ctx, pod)
}

// start starts a pod of the bench image and waits until it is Running.
func (h *host) start(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	name := pod.Name
	pod.Spec.Containers[0].Image = benchImage
	pods := h.kube.CoreV1().Pods(benchNamespace)
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

func (h *host) exec(ctx context.Context, pod string, command ...string) ([]byte, error) {
	atoll, err := filepath.Abs("bin/atoll")
	if err != nil {
		return nil, err
	}
	args := append([]string{"kubectl", "--kubeconfig", filepath.Join(h.o.dataDir, "admin.kubeconfig"), "-n", benchNamespace, "exec", pod, "--"}, command...)
	out, err := exec.CommandContext(ctx, atoll, args...).Output()
	if err != nil {
		return nil, fmt.Errorf("%s in pod %s: %w", strings.Join(command, " "), pod, err)
	}
	return out, nil
}

// guestTCP measures pod-to-pod TCP with iperf3.
func guestTCP(ctx context.Context, h *host) ([]Row, error) {
	samples := map[string][]float64{}
	for _, runtime := range []string{"atoll", "runc"} {
		server, err := h.tool(ctx, "tcp-server-"+runtime, runtime, "iperf3", "-s")
		if err != nil {
			return nil, err
		}
		if _, err := h.tool(ctx, "tcp-client-"+runtime, runtime, "sleep", "100000"); err != nil {
			return nil, err
		}
		for range 3 {
			out, err := h.exec(ctx, "tcp-client-"+runtime, "iperf3", "-c", server.Status.PodIP, "-t", "5", "-J")
			if err != nil {
				return nil, err
			}
			var result struct {
				End struct {
					Received struct {
						BitsPerSecond float64 `json:"bits_per_second"`
					} `json:"sum_received"`
				} `json:"end"`
			}
			if err := json.Unmarshal(out, &result); err != nil {
				return nil, fmt.Errorf("reading iperf3's result: %w", err)
			}
			samples[runtime] = append(samples[runtime], result.End.Received.BitsPerSecond/1e9)
		}
	}
	return []Row{compare("pod to pod TCP", "Gbit/s", samples["atoll"], samples["runc"])}, h.deletePods(ctx)
}

// rootfsIO measures the writable layer with fio: one large file, then many small ones.
func rootfsIO(ctx context.Context, h *host) ([]Row, error) {
	jobs := []struct {
		measure, unit string
		args          []string
		read          bool
	}{
		{"rootfs sequential write, fsync at end", "MiB/s", []string{"--rw=write", "--bs=1M", "--size=128M", "--end_fsync=1"}, false},
		{"rootfs sequential read", "MiB/s", []string{"--rw=read", "--bs=1M", "--size=128M"}, true},
		{"rootfs 4k files written", "MiB/s", []string{"--rw=write", "--bs=4k", "--nrfiles=500", "--filesize=4k", "--fsync_on_close=1"}, false},
	}
	results := make([]map[string][]float64, len(jobs))
	for _, runtime := range []string{"atoll", "runc"} {
		name := "io-" + runtime
		if _, err := h.tool(ctx, name, runtime, "sleep", "100000"); err != nil {
			return nil, err
		}
		for i, job := range jobs {
			if results[i] == nil {
				results[i] = map[string][]float64{}
			}
			for range 3 {
				args := append([]string{"fio", "--name=job", "--directory=/var/tmp", "--output-format=json", "--invalidate=1"}, job.args...)
				out, err := h.exec(ctx, name, args...)
				if err != nil {
					return nil, err
				}
				mib, err := fioBandwidth(out, job.read)
				if err != nil {
					return nil, err
				}
				results[i][runtime] = append(results[i][runtime], mib)
			}
		}
	}
	var rows []Row
	for i, job := range jobs {
		rows = append(rows, compare(job.measure, job.unit, results[i]["atoll"], results[i]["runc"]))
	}
	return rows, h.deletePods(ctx)
}

func fioBandwidth(out []byte, read bool) (float64, error) {
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
