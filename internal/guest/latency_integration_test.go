//go:build integration

package guest_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/flatspec"
)

// cpu is the processor time QEMU has used so far: unlike wall-clock time, nearly the same on a busy
// machine.
func (v *vm) cpu() time.Duration {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", v.qemu.Process.Pid))
	if err != nil {
		v.t.Fatal(err)
	}
	var sum time.Duration
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil {
			ns, err := strconv.ParseInt(strings.Fields(string(data))[0], 10, 64)
			if err != nil {
				v.t.Fatal(err)
			}
			sum += time.Duration(ns)
		}
	}
	return sum
}

// stopwatch collects wall-clock and processor time by step.
type stopwatch struct {
	v     *vm
	names []string
	wall  map[string][]time.Duration
	cpu   map[string][]time.Duration
}

func (w *stopwatch) time(name string, f func() error) {
	w.v.t.Helper()
	if w.wall[name] == nil {
		w.names = append(w.names, name)
	}
	start, used := time.Now(), w.v.cpu()
	if err := f(); err != nil {
		w.v.t.Fatalf("%s: %v\n%s", name, err, w.v.log())
	}
	w.wall[name] = append(w.wall[name], time.Since(start))
	w.cpu[name] = append(w.cpu[name], w.v.cpu()-used)
}

func (w *stopwatch) report(t *testing.T) {
	const unit = 10 * time.Microsecond
	for _, name := range w.names {
		d, c := w.wall[name], w.cpu[name]
		slices.Sort(d)
		slices.Sort(c)
		t.Logf("%-16s median %8v  min %8v  max %8v  CPU of QEMU median %8v  min %8v", name, d[len(d)/2].Round(unit),
			d[0].Round(unit), d[len(d)-1].Round(unit), c[len(c)/2].Round(unit), c[0].Round(unit))
	}
}

// TestWarmLatency measures set-up and the first container of warmed-up micro-VMs, call by call, as
// the shim sees it. It fails only when something does not work.
func TestWarmLatency(t *testing.T) {
	spec := flatspec.Spec(criSpec("true"))
	w := &stopwatch{wall: map[string][]time.Duration{}, cpu: map[string][]time.Duration{}}
	for range 5 {
		v := boot(t)
		w.v = v
		firstContainer(t, w, v, spec)
		v.close()
	}
	w.report(t)
}

func firstContainer(t *testing.T, w *stopwatch, v *vm, spec []byte) {
	ctx := t.Context()
	w.time("warm-up", func() error {
		return errors.Join(v.rehearse(false), v.rehearse(false))
	})
	w.time("set-up to start", func() error {
		w.time("setup", func() error {
			_, err := v.guest.Setup(ctx, setupRequest())
			return err
		})
		w.time("mount", func() error {
			_, err := v.guest.MountImage(ctx, &guestv1.MountImageRequest{Id: "i", Serial: "img0"})
			return err
		})
		w.time("create", func() error {
			_, err := v.guest.CreateContainer(ctx, &guestv1.CreateContainerRequest{Id: "c", Spec: spec, Lowers: []string{"i"}})
			return err
		})
		w.time("start", func() error {
			_, err := v.guest.Start(ctx, &guestv1.ProcessRequest{ContainerId: "c"})
			return err
		})
		return nil
	})
	openStdio(t, v, &job{id: "c"})
	p := &guestv1.ProcessRequest{ContainerId: "c"}
	w.time("wait", func() error { _, err := v.guest.Wait(ctx, p); return err })
	w.time("stats", func() error { _, err := v.guest.Stats(ctx, &guestv1.StatsRequest{}); return err })
	w.time("delete", func() error { _, err := v.guest.Delete(ctx, p); return err })
	w.time("unmount", func() error {
		_, err := v.guest.UnmountImage(ctx, &guestv1.UnmountImageRequest{Id: "i"})
		return err
	})
}
