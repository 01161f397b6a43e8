package pods

import (
	"context"
	"encoding/json"
	"fmt"

	"atoll.dev/atoll/bench/rig"
)

// GuestTCP measures pod-to-pod TCP with iperf3.
func GuestTCP(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	samples := map[string][]float64{}
	for _, runtime := range []string{"atoll", "runc"} {
		server, err := h.Tool(ctx, "tcp-server-"+runtime, runtime, "iperf3", "-s")
		if err != nil {
			return nil, err
		}
		if _, err := h.Tool(ctx, "tcp-client-"+runtime, runtime, "sleep", "100000"); err != nil {
			return nil, err
		}
		for range 3 {
			out, err := h.Exec(ctx, "tcp-client-"+runtime, "iperf3", "-c", server.Status.PodIP, "-t", "5", "-J")
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
	return []rig.Row{rig.Compare("pod to pod TCP", "Gbit/s", samples["atoll"], samples["runc"])}, h.DeletePods(ctx)
}

// RootfsIO measures the writable layer with fio: one large file, then many small ones.
func RootfsIO(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
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
		if _, err := h.Tool(ctx, name, runtime, "sleep", "100000"); err != nil {
			return nil, err
		}
		for i, job := range jobs {
			if results[i] == nil {
				results[i] = map[string][]float64{}
			}
			for range 3 {
				args := append([]string{"fio", "--name=job", "--directory=/var/tmp", "--output-format=json", "--invalidate=1"}, job.args...)
				out, err := h.Exec(ctx, name, args...)
				if err != nil {
					return nil, err
				}
				mib, err := rig.FioBandwidth(out, job.read)
				if err != nil {
					return nil, err
				}
				results[i][runtime] = append(results[i][runtime], mib)
			}
		}
	}
	var rows []rig.Row
	for i, job := range jobs {
		rows = append(rows, rig.Compare(job.measure, job.unit, results[i]["atoll"], results[i]["runc"]))
	}
	return rows, h.DeletePods(ctx)
}
