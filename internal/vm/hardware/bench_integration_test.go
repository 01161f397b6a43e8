//go:build integration

package hardware_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/vm/hardware"
)

// overhead is what a QEMU holds of the host's memory beyond the memory of its guest: its proportional set size
// without the mapping that is as large as the guest's memory. Both in KiB; parts are the largest others.
func overhead(t testing.TB, pid int, guest int64) (beyond, ram int64, parts []string) {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	must(t, err)
	var name string
	var size int64
	sums := map[string]int64{}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		var from, to int64
		if n, _ := fmt.Sscanf(f[0], "%x-%x", &from, &to); n == 2 {
			name, size = "anonymous", to-from
			if len(f) > 5 {
				name = filepath.Base(f[5])
			}
			if name == "anonymous" && size >= 8<<20 {
				name = fmt.Sprintf("anonymous of %d MiB", size>>20)
			}
		}
		if f[0] != "Pss:" {
			continue
		}
		var kib int64
		_, err := fmt.Sscan(f[1], &kib)
		must(t, err)
		if size == guest {
			ram += kib
			continue
		}
		beyond += kib
		sums[name] += kib
	}
	for n, kib := range sums {
		if kib > 512 {
			parts = append(parts, fmt.Sprintf("%s %d", n, kib))
		}
	}
	slices.Sort(parts)
	return beyond, ram, parts
}

// TestOverhead holds an idle machine to its share of the host's memory, beyond that of its guest.
func TestOverhead(t *testing.T) {
	cfg, _ := machine(t)
	cfg.Machine.Memory.Bytes, cfg.Machine.Memory.Max = 1<<30, 0
	m := start(t, cfg)
	m.up(t)
	m.sh(t, "sleep 5; true")
	beyond, ram, parts := overhead(t, m.PID(), 1<<30)
	t.Logf("%d KiB beyond the guest's memory, of which it uses %d KiB; %v", beyond, ram, parts)
	if beyond > 60<<10 {
		t.Errorf("%d KiB are more than 60 MiB", beyond)
	}
}

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
