// Package rig is what all parts of the bench share: its options, the supervisor under measurement, pods and claims that
// are made and taken away again, what a host has before and after, and the rows that come out.
//
// It measures nothing itself and prints nothing: the packages beside it are the parts, and main, which runs them, makes
// the one Host. It works in a namespace of its own, which New makes and Close deletes; but the host's state is that of
// the whole machine, so what else goes on there shows in the results. All that it waits for may take minutes only. A bench
// that is killed leaves behind what it has made, and inside WithoutKubelet an agent that stands still.
package rig

import (
	"context"
	"slices"
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

// Options are what the flags of the bench say.
type Options struct {
	DataDir, RunDir, CgroupRoot string // of the running supervisor
	Output                      string // directory for the results
	N                           int    // repetitions of each start
	Idle                        int    // pods at once for idle memory
	Cycles                      int    // pods made and deleted for a leak
	Volumes                     int    // volumes made and deleted for a leak
	Atoll                       string // the binary
	Images                      string // directory with images of virtual machines
	Only                        string // names of parts, by commas; all if empty
	PortalPort                  int    // where people log in
}

// Part is one part of the bench; it may yield several rows, and with an error those that it has so far.
type Part func(context.Context, *Host) ([]Row, error)

// GiB is how many bytes that is.
const GiB = 1 << 30

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

// Quantile is the sample that a share of all is not above.
func Quantile(samples []float64, share float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[min(int(share*float64(len(sorted))), len(sorted)-1)]
}

// Milliseconds is a duration as a sample.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
