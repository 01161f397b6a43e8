// Command bench measures what Atoll promises, side by side with runc pods on
// the same host in the same run, and prints one table and one JSON file.
//
// It is not a test: it asserts nothing, but that pods and volumes leave nothing behind. It fails in the end if
// they do, or if a measure could not be taken. Volumes are measured beside what they can be compared with: the same
// pod without one, the same image opened on the host, volumes of another size. It needs a running supervisor, root, and
// the images busybox and bench loaded; `make bench` sees to that. Those of virtual machines are imported from build/vm.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"atoll.dev/atoll/bench/machine"
	"atoll.dev/atoll/bench/report"
	"atoll.dev/atoll/internal/datadir"
)

// Row is one line of the table.
type Row = report.Row

// Value is a median with its spread.
type Value = report.Value

type options struct {
	dataDir, runDir, output string
	n, idle, cycles         int
	volumes                 int
	atoll, images           string
	only                    string
	portalPort              int
}

// bench is one measure; it may yield several rows.
type bench struct {
	name string
	run  func(context.Context, *host) ([]Row, error)
}

func main() {
	var o options
	flag.StringVar(&o.dataDir, "data-dir", "/var/lib/atoll", "data directory of the running supervisor")
	flag.StringVar(&o.output, "output", "bench/results", "directory for the JSON file")
	flag.IntVar(&o.n, "n", 30, "repetitions of each start measurement")
	flag.IntVar(&o.idle, "idle", 300, "idle pods for the memory measurement")
	flag.IntVar(&o.cycles, "cycles", 200, "create/delete cycles for the leak check")
	flag.StringVar(&o.only, "only", "", "comma-separated names of measures: cri,cold,kubectl,density,io,tcp,policy-engine,policy-api,leak,idle,resident,ns-create,ns-admission,ns-login,ns-registry,volume-csi,volume-attach,volume-io,volume-leak,vm-start,vm-address,vm-debian,vm-memory,vm-bootdisk,vm-snapshot; volume, vm and ns are all that begin so")
	flag.IntVar(&o.portalPort, "portal-port", 443, "port that people log in at")
	flag.IntVar(&o.volumes, "volumes", 200, "volumes for volume-leak")
	flag.StringVar(&o.atoll, "atoll", "bin/atoll", "the binary, for ns-login, ns-registry and importing images of virtual machines")
	flag.StringVar(&o.images, "vm-images", "build/vm", "directory with the images of virtual machines")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	tree, err := datadir.New(o.dataDir)
	if err == nil {
		o.runDir = tree.Run()
		err = run(ctx, o)
	}
	if err != nil {
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
		{"policy-engine", policyEngine},
		{"policy-api", policyChanges},
		{"density", densityBurst},
		{"leak", withoutKubelet(leakCycles)},
		{"idle", idleMemory},
		{"ns-create", namespacesAtOnce},
		{"ns-admission", podAdmission},
		{"ns-login", loginTime},
		{"ns-registry", registryThroughput},
		{"vm-start", withMachines(machine.Burst)},
		{"vm-address", withMachines(machine.Address)},
		{"vm-debian", withMachines(machine.Debian)},
		{"vm-memory", withMachines(machine.Memory)},
		{"vm-bootdisk", withVolumes(withMachines(machine.BootDisks))},
		{"vm-snapshot", withMachines(machine.Snapshot)},
		{"volume-csi", withVolumes(volumeCSI)},
		{"volume-attach", withVolumes(volumeAttach)},
		{"volume-io", withVolumes(volumeIO)},
		{"volume-leak", withVolumes(volumeLeak)},
	}
	var rows []Row
	var errs []error
	for _, b := range all {
		if !selected(o.only, b.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s ...\n", b.name)
		got, err := b.run(ctx, h)
		rows = append(rows, got...)
		if err != nil {
			rows = append(rows, Row{Measure: b.name, Note: "failed: " + err.Error()})
			errs = append(errs, fmt.Errorf("%s: %w", b.name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	table(rows)
	return errors.Join(append(errs, save(o.output, rows))...)
}

// withMachines measures virtual machines.
func withMachines(run func(context.Context, *machine.Host) ([]Row, error)) func(context.Context, *host) ([]Row, error) {
	return func(ctx context.Context, h *host) ([]Row, error) {
		return machine.With(ctx, machine.Config{
			Rest: h.rest, Namespace: benchNamespace, Class: benchClass, DataDir: h.o.dataDir, Atoll: h.o.atoll, Images: h.o.images, N: h.o.n,
		}, run)
	}
}

// selected tells whether a measure is wanted: all are, or those named, or those whose first word is named.
func selected(only, name string) bool {
	return only == "" || slices.ContainsFunc(strings.Split(only, ","), func(want string) bool {
		return name == want || strings.HasPrefix(name, want+"-")
	})
}

func table(rows []Row) {
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "MEASURE\tUNIT\tN\tATOLL P50\tP95\tMAX\tAGAINST\tP50\tP95\tRATIO\tNOTE")
	for _, r := range rows {
		against, p50, p95, ratio := "-", "-", "-", "-"
		if other := cmp.Or(r.Runc, r.Other); other != nil {
			against, p50, p95 = cmp.Or(r.Against, "runc"), number(other.P50), number(other.P95)
			ratio = fmt.Sprintf("%.2f", r.Ratio)
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Measure, r.Unit, r.N,
			number(r.Atoll.P50), number(r.Atoll.P95), number(r.Atoll.Max), against, p50, p95, ratio, r.Note)
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
	return report.Compare(measure, unit, atoll, runc)
}

// versus makes a row of two samples of which the other is not runc.
func versus(measure, unit string, atoll []float64, against string, other []float64) Row {
	return report.Versus(measure, unit, atoll, against, other)
}

func milliseconds(d time.Duration) float64 { return report.Milliseconds(d) }
