//go:build integration

package guest_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	guestv1 "atoll.dev/atoll/api/guest/v1"
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

// TestWarmLatency measures a container start in a warmed-up guest, call by call, as the shim sees
// it, and prints medians. It fails only when something does not work.
func TestWarmLatency(t *testing.T) {
	v := boot(t)
	ctx := t.Context()
	began := time.Now()
	if _, err := v.guest.Warm(ctx, &guestv1.WarmRequest{Serial: "img1", ScratchSerial: "scratch", Entropy: random(64), Rounds: 2}); err != nil {
		t.Fatalf("%v\n%s", err, v.log())
	}
	t.Logf("warm-up of two rounds: %v", time.Since(began))
	times, cpu := map[string][]time.Duration{}, map[string][]time.Duration{}
	timed := func(name string, f func() error) {
		t.Helper()
		start, used := time.Now(), v.cpu()
		if err := f(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, v.log())
		}
		times[name] = append(times[name], time.Since(start))
		cpu[name] = append(cpu[name], v.cpu()-used)
	}
	timed("setup", func() error {
		_, err := v.guest.Setup(ctx, setupRequest())
		return err
	})
	spec, err := json.Marshal(criSpec("true"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		id, image := fmt.Sprintf("c%d", i), fmt.Sprintf("i%d", i)
		p := &guestv1.ProcessRequest{ContainerId: id}
		start, used := time.Now(), v.cpu()
		timed("mount", func() error {
			_, err := v.guest.MountImage(ctx, &guestv1.MountImageRequest{Id: image, Serial: "img0"})
			return err
		})
		timed("create", func() error {
			_, err := v.guest.CreateContainer(ctx, &guestv1.CreateContainerRequest{Id: id, Spec: spec, Lowers: []string{image}})
			return err
		})
		timed("start", func() error { _, err := v.guest.Start(ctx, p); return err })
		times["mount+create+start"] = append(times["mount+create+start"], time.Since(start))
		cpu["mount+create+start"] = append(cpu["mount+create+start"], v.cpu()-used)
		if i == 0 {
			t.Logf("first container: %v, CPU of QEMU %v", time.Since(start), v.cpu()-used)
		}
		timed("stats", func() error { _, err := v.guest.Stats(ctx, &guestv1.StatsRequest{}); return err })
		j := &job{id: id}
		openStdio(t, v, j)
		timed("wait", func() error { _, err := v.guest.Wait(ctx, p); return err })
		timed("delete", func() error { _, err := v.guest.Delete(ctx, p); return err })
		timed("unmount", func() error {
			_, err := v.guest.UnmountImage(ctx, &guestv1.UnmountImageRequest{Id: image})
			return err
		})
		timed("ping", func() error { _, _ = v.guest.Pids(ctx, p); return nil })
	}
	for _, name := range []string{"setup", "mount", "create", "start", "mount+create+start", "stats", "wait", "delete", "unmount", "ping"} {
		d, c := times[name], cpu[name]
		slices.Sort(d)
		slices.Sort(c)
		const unit = 10 * time.Microsecond
		t.Logf("%-20s median %8v  min %8v  max %8v  CPU of QEMU median %8v  min %8v", name, d[len(d)/2].Round(unit),
			d[0].Round(unit), d[len(d)-1].Round(unit), c[len(c)/2].Round(unit), c[0].Round(unit))
	}
}
