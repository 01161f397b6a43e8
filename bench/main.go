// Command bench measures what Atoll promises, side by side with runc pods on
// the same host in the same run, and prints one table and one JSON file.
//
// It is not a test: it asserts nothing, but that pods and volumes leave nothing behind. It fails in the end if
// they do, or if a measure could not be taken. Volumes are measured beside what they can be compared with: the same
// pod without one, the same image opened on the host, volumes of another size. It needs a running supervisor, root, and
// the images busybox and bench loaded; `make bench` sees to that. Those of virtual machines are imported from build/vm.
//
// The parts are in the packages beside it, and what they share is in package rig.
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
	"syscall"
	"text/tabwriter"
	"time"

	"atoll.dev/atoll/bench/machines"
	"atoll.dev/atoll/bench/namespaces"
	"atoll.dev/atoll/bench/pods"
	"atoll.dev/atoll/bench/policies"
	"atoll.dev/atoll/bench/rig"
	"atoll.dev/atoll/bench/volumes"
	"atoll.dev/atoll/internal/datadir"
)

// bench is one measure; it may yield several rows.
type bench struct {
	name string
	run  rig.Part
}

func main() {
	var o rig.Options
	flag.StringVar(&o.DataDir, "data-dir", "/var/lib/atoll", "data directory of the running supervisor")
	flag.StringVar(&o.Output, "output", "bench/results", "directory for the JSON file")
	flag.IntVar(&o.N, "n", 30, "repetitions of each start measurement")
	flag.IntVar(&o.Idle, "idle", 300, "idle pods for the memory measurement")
	flag.IntVar(&o.Cycles, "cycles", 200, "create/delete cycles for the leak check")
	flag.StringVar(&o.Only, "only", "", "comma-separated names of measures: cri,cold,kubectl,density,io,tcp,policy-engine,policy-api,leak,idle,resident,ns-create,ns-admission,ns-login,ns-registry,volume-csi,volume-attach,volume-io,volume-leak,vm-start,vm-address,vm-debian,vm-memory,vm-bootdisk,vm-snapshot; volume, vm and ns are all that begin so")
	flag.IntVar(&o.PortalPort, "portal-port", 443, "port that people log in at")
	flag.IntVar(&o.Volumes, "volumes", 200, "volumes for volume-leak")
	flag.StringVar(&o.Atoll, "atoll", "bin/atoll", "the binary, for ns-login, ns-registry and importing images of virtual machines")
	flag.StringVar(&o.Images, "vm-images", "build/vm", "directory with the images of virtual machines")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	tree, err := datadir.New(o.DataDir)
	if err == nil {
		o.RunDir, o.CgroupRoot = tree.Run(), tree.CgroupRoot()
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, o rig.Options) error {
	h, err := rig.New(o)
	if err != nil {
		return err
	}
	defer h.Close()
	all := []bench{
		{"resident", pods.ResidentMemory},
		{"cri", rig.WithoutKubelet(pods.CRIStart)},
		{"cold", rig.WithoutKubelet(pods.CRIColdStart)},
		{"kubectl", pods.KubectlStart},
		{"io", pods.RootfsIO},
		{"tcp", pods.GuestTCP},
		{"policy-engine", policies.Engine},
		{"policy-api", policies.Changes},
		{"density", pods.DensityBurst},
		{"leak", rig.WithoutKubelet(pods.LeakCycles)},
		{"idle", pods.IdleMemory},
		{"ns-create", namespaces.AtOnce},
		{"ns-admission", namespaces.PodAdmission},
		{"ns-login", namespaces.LoginTime},
		{"ns-registry", namespaces.RegistryThroughput},
		{"vm-start", machines.With(machines.Burst)},
		{"vm-address", machines.With(machines.Address)},
		{"vm-debian", machines.With(machines.Debian)},
		{"vm-memory", machines.With(machines.Memory)},
		{"vm-bootdisk", rig.WithVolumes(machines.With(machines.BootDisks))},
		{"vm-snapshot", machines.With(machines.Snapshot)},
		{"volume-csi", rig.WithVolumes(volumes.CSI)},
		{"volume-attach", rig.WithVolumes(volumes.Attach)},
		{"volume-io", rig.WithVolumes(volumes.IO)},
		{"volume-leak", rig.WithVolumes(volumes.Leak)},
	}
	var rows []rig.Row
	var errs []error
	results := filepath.Join(o.Output, time.Now().UTC().Format("20060102-150405")+".json")
	for _, b := range all {
		if !selected(o.Only, b.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s ...\n", b.name)
		got, err := b.run(ctx, h)
		rows = append(rows, got...)
		if err != nil {
			rows = append(rows, rig.Row{Measure: b.name, Note: "failed: " + err.Error()})
			errs = append(errs, fmt.Errorf("%s: %w", b.name, err))
		}
		// What is measured stays, whatever happens to the next part.
		if err := save(results, rows); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if ctx.Err() != nil {
			break
		}
	}
	table(rows)
	fmt.Fprintln(os.Stderr, "bench: written", results)
	return errors.Join(errs...)
}

// selected tells whether a measure is wanted: all are, or those named, or those whose first word is named.
func selected(only, name string) bool {
	return only == "" || slices.ContainsFunc(strings.Split(only, ","), func(want string) bool {
		return name == want || strings.HasPrefix(name, want+"-")
	})
}

func table(rows []rig.Row) {
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

// save writes the results so far, whole or not at all.
func save(path string, rows []rig.Row) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(map[string]any{"time": time.Now().UTC(), "rows": rows}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", raw, 0o644); err != nil {
		return fmt.Errorf("saving the results: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("saving the results: %w", err)
	}
	return nil
}
