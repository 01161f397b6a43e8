// Package report is how a measure of the bench is written down: rows of medians with their spread.
//
// It measures nothing itself. Package main of the bench and bench/machine make rows. Nothing can go wrong here.
package report

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Row is one line of the table: values of the same measure for each runtime, or for Atoll and something else.
type Row struct {
	Measure string  `json:"measure"`
	Unit    string  `json:"unit"`
	N       int     `json:"n,omitempty"`
	Atoll   Value   `json:"atoll"`
	Runc    *Value  `json:"runc,omitempty"`
	Other   *Value  `json:"other,omitempty"` // of Against, where that is not runc
	Against string  `json:"against,omitempty"`
	Ratio   float64 `json:"ratio,omitempty"` // atoll median / the other median
	Note    string  `json:"note,omitempty"`
}

// Value is a median with its spread, in the row's unit.
type Value struct {
	P50 float64 `json:"p50"`
	P95 float64 `json:"p95,omitempty"`
	Min float64 `json:"min,omitempty"`
	Max float64 `json:"max,omitempty"`
}

// Compare makes a row of two samples; runc may be nil.
func Compare(measure, unit string, atoll, runc []float64) Row {
	row := Row{Measure: measure, Unit: unit, N: len(atoll), Atoll: summarize(atoll)}
	if len(runc) > 0 {
		v := summarize(runc)
		row.Runc = &v
		if v.P50 > 0 {
			row.Ratio = row.Atoll.P50 / v.P50
		}
	}
	return row
}

// Versus makes a row of two samples of which the other is not runc.
func Versus(measure, unit string, atoll []float64, against string, other []float64) Row {
	row := Compare(measure, unit, atoll, other)
	row.Runc, row.Other, row.Against = nil, row.Runc, against
	return row
}

func summarize(samples []float64) Value {
	if len(samples) == 0 {
		return Value{}
	}
	return Value{P50: Quantile(samples, 0.5), P95: Quantile(samples, 0.95), Min: slices.Min(samples), Max: slices.Max(samples)}
}

// Milliseconds of a duration.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Quantile is the sample that a share of all is not above.
func Quantile(samples []float64, share float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[min(int(share*float64(len(sorted))), len(sorted)-1)]
}

// StatusField reads a line "Name:   123 kB" of a file of proc(5).
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
