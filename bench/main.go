// Command bench measures what Atoll promises, side by side with runc pods on
// the same host in the same run, and prints one table and one JSON file.
//
// It is not a test: it asserts nothing. It needs a running supervisor, root, and
// the images busybox and bench loaded; `make bench` sees to that.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Row is one line of the table: values of the same measure for each runtime.
type Row struct {
	Measure string  `json:"measure"`
	Unit    string  `json:"unit"`
	N       int     `json:"n,omitempty"`
	Atoll   Value   `json:"atoll"`
	Runc    *Value  `json:"runc,omitempty"`
	Ratio   float64 `json:"ratio,omitempty"` // atoll median / runc median
	Note    string  `json:"note,omitempty"`
}

// Value is a median with its spread, in the row's unit.
type Value struct {
	P50 float64 `json:"p50"`
	P95 float64 `json:"p95,omitempty"`
	Min float64 `json:"min,omitempty"`
	Max float64 `json:"max,omitempty"`
}

type options struct {
	dataDir, runDir, output string
	n, idle, cycles         int
	only                    string
}

// bench is one measure; it may yield several rows.
type bench struct {
	name string
	run  func(context.Context, *host) ([]Row, error)
}

func main() {
	var o options
	flag.StringVar(&o.dataDir, "data-dir", "/var/lib/atoll", "data directory of the running supervisor")
	flag.StringVar(&o.runDir, "run-dir", "/run/atoll", "its run directory")
	flag.StringVar(&o.output, "output", "bench/results", "directory for the JSON file")
	flag.IntVar(&o.n, "n", 30, "repetitions of each start measurement")
	flag.IntVar(&o.idle, "idle", 300, "idle pods for the memory measurement")
	flag.IntVar(&o.cycles, "cycles", 200, "create/delete cycles for the leak check")
	flag.StringVar(&o.only, "only", "", "comma-separated names of measures: cri,cold,kubectl,density,io,tcp,leak,idle,resident")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	h, err := newHost(o)
	if err != nil {
		return err
	}
	defer h.close()
	all := []bench{
		{"resident", residentMemory},
		{"cri", withoutKubelet(criStart)},
		{"cold", withoutKubelet(criColdStart)},
		{"kubectl", kubectlStart},
		{"io", rootfsIO},
		{"tcp", guestTCP},
		{"density", densityBurst},
		{"leak", withoutKubelet(leakCycles)},
		{"idle", idleMemory},
	}
	var rows []Row
	for _, b := range all {
		if o.only != "" && !slices.Contains(strings.Split(o.only, ","), b.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s ...\n", b.name)
		got, err := b.run(ctx, h)
		rows = append(rows, got...)
		if err != nil {
			rows = append(rows, Row{Measure: b.name, Note: "failed: " + err.Error()})
		}
		if ctx.Err() != nil {
			break
		}
	}
	table(rows)
	return save(o.output, rows)
}

func table(rows []Row) {
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "MEASURE\tUNIT\tN\tATOLL P50\tP95\tMAX\tRUNC P50\tP95\tRATIO\tNOTE")
	for _, r := range rows {
		runc, runc95, ratio := "-", "-", "-"
		if r.Runc != nil {
			runc, runc95 = number(r.Runc.P50), number(r.Runc.P95)
			ratio = fmt.Sprintf("%.2f", r.Ratio)
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Measure, r.Unit, r.N,
			number(r.Atoll.P50), number(r.Atoll.P95), number(r.Atoll.Max), runc, runc95, ratio, r.Note)
	}
	w.Flush()
}

func number(v float64) string {
	switch {
	case v == 0:
		return "-"
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.0f", v)
	}
}

func save(dir string, rows []Row) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(map[string]any{"time": time.Now().UTC(), "rows": rows}, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, time.Now().UTC().Format("20060102-150405")+".json")
	if err := os.WriteFile(path, raw, 0o644); err != nil {
		return fmt.Errorf("saving the results: %w", err)
	}
	fmt.Fprintln(os.Stderr, "bench: written", path)
	return nil
}

// compare makes a row of two samples; runc may be nil.
func compare(measure, unit string, atoll, runc []float64) Row {
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

func summarize(samples []float64) Value {
	if len(samples) == 0 {
		return Value{}
	}
	s := slices.Sorted(slices.Values(samples))
	at := func(q float64) float64 { return s[min(len(s)-1, int(q*float64(len(s))))] }
	return Value{P50: at(0.5), P95: at(0.95), Min: s[0], Max: s[len(s)-1]}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
