package rig

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Resident adds up what the services have in memory now, in MiB. Pages that several of them share, such as those of
// the program, count once.
func (h *Host) Resident(ctx context.Context) (total float64, parts map[string]float64, err error) {
	out, err := exec.CommandContext(ctx, "pgrep", "-f", "-a", h.Options.DataDir).Output()
	if err != nil {
		return 0, nil, fmt.Errorf("looking for the services: %w", err)
	}
	parts = map[string]float64{}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || !strings.HasPrefix(filepath.Base(fields[1]), "atoll") || strings.Contains(line, "shim-daemon") {
			continue
		}
		mib := StatusField("/proc/"+fields[0]+"/smaps_rollup", "Pss:") / 1024
		parts[filepath.Base(fields[1])+" "+fields[2]] += mib
		total += mib
	}
	return total, parts, nil
}

// StatusField reads a "Name:   123 kB" line.
func StatusField(path, name string) float64 {
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), name); ok {
			v, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return v
		}
	}
	return 0
}
