//go:build integration

package hardware_test

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"atoll.dev/atoll/internal/vm/hardware"
)

// BenchmarkStart measures from the call of Start to QEMU running.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		cfg, _ := machine(b)
		b.StartTimer()
		m, err := hardware.Start(b.Context(), cfg)
		must(b, err)
		b.StopTimer()
		must(b, m.Close())
		b.StartTimer()
	}
}

// BenchmarkSave measures how long an idle guest of 1 GiB stands still while its memory and disk are saved.
func BenchmarkSave(b *testing.B) {
	cfg, top := machine(b)
	cfg.Machine.Memory.Bytes, cfg.Machine.Memory.Max = 1<<30, 0
	m := start(b, cfg)
	m.up(b)
	m.sh(b, "dd if=/dev/urandom of=/run/fill bs=1M count=256 2>/dev/null") // something to save
	file, err := os.Create(filepath.Join(b.TempDir(), "memory"))
	must(b, err)
	var pauses []time.Duration
	var bytes int64
	for b.Loop() {
		_, err := file.Seek(0, io.SeekStart)
		must(b, err)
		saved, err := m.SaveMemory(b.Context(), file, hardware.SaveOptions{AtPause: func() error {
			top = m.snapshot(b, "boot", top)
			return nil
		}})
		must(b, err)
		pauses, bytes = append(pauses, saved.Pause), saved.Bytes
	}
	slices.Sort(pauses)
	b.ReportMetric(float64(pauses[len(pauses)/2].Milliseconds()), "pause-ms")
	b.ReportMetric(float64(pauses[len(pauses)-1].Milliseconds()), "longest-ms")
	b.ReportMetric(float64(bytes>>20), "MiB")
}
