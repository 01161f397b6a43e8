package machine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/bench/report"
)

// machineIdles is how long a guest is left alone before it counts as idle.
const machineIdles = 30 * time.Second

// Memory measures what an idle machine takes of the host beyond the memory of its guest.
func Memory(ctx context.Context, m *Host) ([]report.Row, error) {
	var rows []report.Row
	for _, kind := range []struct {
		name, class string
		efi         bool
	}{{"BIOS", tinyClass, false}, {"EFI and TPM", efiClass, true}} {
		more, err := m.idleMemory(ctx, kind.name, kind.class, kind.efi)
		rows = append(rows, more...)
		if err != nil {
			return rows, err
		}
	}
	return rows, nil
}

// idleMemory has several machines idle at once. The slope of the host's available memory, without what the guests use
// of theirs, is all of it; the parts are what the processes themselves hold.
func (m *Host) idleMemory(ctx context.Context, kind, class string, efi bool) ([]report.Row, error) {
	available := func() float64 { return report.StatusField("/proc/meminfo", "MemAvailable:") / 1024 }
	before := available()
	var names []string
	for i := range max(2, m.N/4) {
		vm := m.machine(fmt.Sprintf("idle-%s-%d", class, i), tinyImage, class)
		if efi {
			vm.Spec.BootOptions = &vmopv1.VirtualMachineBootOptions{Firmware: vmopv1.VirtualMachineBootOptionsFirmwareTypeEFI}
			vm.Spec.Crypto = &vmopv1.VirtualMachineCryptoSpec{}
		}
		if err := m.Create(ctx, vm); err != nil {
			return nil, fmt.Errorf("making machine %s: %w", vm.Name, err)
		}
		names = append(names, vm.Name)
	}
	for _, name := range names {
		if err := m.up(ctx, name); err != nil {
			return nil, err
		}
	}
	time.Sleep(machineIdles)
	taken := before - available()
	parts := map[string][]float64{}
	var guests float64
	for _, name := range names {
		p, err := m.parts(ctx, name)
		if err != nil {
			return nil, err
		}
		guests += p["guest"]
		for part, mib := range p {
			parts[part] = append(parts[part], mib)
		}
	}
	all := report.Row{
		Measure: "host memory per idle VM beyond its guest's, " + kind, Unit: "MiB", N: len(names),
		Atoll: report.Value{P50: (taken - guests) / float64(len(names))},
		Note:  fmt.Sprintf("slope of MemAvailable; the bar is 60; a guest uses %.0f MiB of its own", guests/float64(len(names))),
	}
	rows := []report.Row{all}
	for _, part := range []string{"qemu", "page tables", "shim", "swtpm"} {
		if samples := parts[part]; len(samples) > 0 {
			rows = append(rows, report.Compare("  "+part, "MiB", samples, nil))
		}
	}
	for _, name := range names {
		if err := m.remove(ctx, name); err != nil {
			return rows, err
		}
	}
	return rows, nil
}

// parts are what the processes of a machine hold, in MiB: proportional sizes, of QEMU without the guest's memory, which
// is "guest".
func (m *Host) parts(ctx context.Context, name string) (map[string]float64, error) {
	vm := m.machine(name, "", "")
	if err := m.Get(ctx, client.ObjectKeyFromObject(vm), vm); err != nil {
		return nil, err
	}
	qemu, err := processWith("atoll-vm", vm.Status.BiosUUID)
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", name, err)
	}
	memory := vm.Status.Hardware.Memory.Total.Value()
	beyond, guest, err := proportional(qemu, memory)
	if err != nil {
		return nil, err
	}
	status := "/proc/" + qemu + "/status"
	shim := strconv.FormatFloat(report.StatusField(status, "PPid:"), 'f', 0, 64)
	held, _, err := proportional(shim, 0)
	if err != nil {
		return nil, err
	}
	out := map[string]float64{"qemu": beyond, "guest": guest, "shim": held, "page tables": report.StatusField(status, "VmPTE:") / 1024}
	if vm.Spec.Crypto != nil {
		tpm, err := child(shim, "swtpm")
		if err != nil {
			return nil, fmt.Errorf("machine %s: %w", name, err)
		}
		if out["swtpm"], _, err = proportional(tpm, 0); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// processWith finds the process of a name that has a word among its arguments.
func processWith(name, word string) (string, error) {
	return find(func(pid string) bool {
		comm, _ := os.ReadFile("/proc/" + pid + "/comm") // it may have ended
		args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
		return strings.TrimSpace(string(comm)) == name && strings.Contains(string(args), word)
	})
}

// child finds the child of a process that has a name.
func child(parent, name string) (string, error) {
	return find(func(pid string) bool {
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		return strings.TrimSpace(string(comm)) == name && strconv.FormatFloat(report.StatusField("/proc/"+pid+"/status", "PPid:"), 'f', 0, 64) == parent
	})
}

func find(is func(pid string) bool) (string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil && is(e.Name()) {
			return e.Name(), nil
		}
	}
	return "", errors.New("its process is not found")
}

// proportional is the proportional set size of a process in MiB, without mappings of exactly that many bytes, and that of
// those.
func proportional(pid string, without int64) (size, others float64, err error) {
	f, err := os.Open(filepath.Join("/proc", pid, "smaps"))
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	var bytes int64
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var from, to int64
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x ", &from, &to); n == 2 {
			bytes = to - from
			continue
		}
		text, ok := strings.CutPrefix(lines.Text(), "Pss:")
		if !ok {
			continue
		}
		kib, err := strconv.ParseFloat(strings.Fields(text)[0], 64)
		if err != nil {
			return 0, 0, err
		}
		if bytes == without {
			others += kib / 1024
		} else {
			size += kib / 1024
		}
	}
	return size, others, nil
}

// Snapshot snapshots an idle machine of 1 GiB with its memory, and measures how long its guest does not answer.
func Snapshot(ctx context.Context, m *Host) ([]report.Row, error) {
	const name = "pause"
	if err := m.boot(ctx, m.machine(name, tinyImage, gibClass)); err != nil {
		return nil, err
	}
	vm := m.machine(name, "", "")
	address, err := m.address(ctx, vm)
	if err != nil {
		return nil, err
	}
	if err := answers80(ctx, address); err != nil {
		return nil, err
	}
	time.Sleep(machineIdles)
	var pauses, gaps, took, quiet []float64
	for i := range 5 {
		gap, err := longestGap(ctx, address, func() error { time.Sleep(5 * time.Second); return nil })
		if err != nil {
			return nil, err
		}
		quiet = append(quiet, gap)
		var pause float64
		begin := time.Now()
		gap, err = longestGap(ctx, address, func() (err error) { pause, err = m.snapshot(ctx, name, i); return err })
		if err != nil {
			return nil, err
		}
		gaps, pauses, took = append(gaps, gap), append(pauses, pause), append(took, report.Milliseconds(time.Since(begin)))
	}
	seen := report.Compare("snapshot with RAM of an idle 1 GiB VM, longest time without an answer", "ms", gaps, nil)
	seen.Note = fmt.Sprintf("the bar is 1000; without a snapshot the longest is %.0f", slices.Max(quiet))
	return []report.Row{
		seen,
		report.Compare("  the machine stood still", "ms", pauses, nil),
		report.Compare("  created to ready", "ms", took, nil),
	}, nil
}

// snapshot takes one and returns for how many milliseconds the machine stood still.
func (m *Host) snapshot(ctx context.Context, name string, i int) (float64, error) {
	snap := &vmopv1.VirtualMachineSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: fmt.Sprintf("%s-%d", name, i)}}
	snap.Spec.VMName, snap.Spec.Memory = name, true
	// What was done is forgotten as soon as it is known, so it must be waited for from the beginning.
	type result struct {
		st  machinev1.State
		err error
	}
	taken := make(chan result, 1)
	watching := make(chan struct{})
	go func() {
		var before map[string]bool // operations that are not ours
		st, err := m.state(ctx, name, "the snapshot is taken", func(st machinev1.State) bool {
			if before == nil {
				before = map[string]bool{}
				for _, o := range st.Operations {
					before[o.ID] = true
				}
				close(watching)
			}
			return slices.ContainsFunc(st.Operations, func(o machinev1.OperationState) bool { return o.Done && !before[o.ID] })
		})
		taken <- result{st, err}
	}()
	select {
	case <-watching:
	case r := <-taken:
		return 0, r.err
	}
	if err := m.Create(ctx, snap); err != nil {
		return 0, fmt.Errorf("making snapshot %s: %w", snap.Name, err)
	}
	r := <-taken
	if r.err != nil {
		return 0, r.err
	}
	var pause float64
	for _, o := range r.st.Operations {
		switch {
		case !strings.Contains(o.ID, string(snap.UID)):
		case o.Error != "":
			return 0, fmt.Errorf("snapshot %s: %s", snap.Name, o.Error)
		default:
			pause = float64(o.PauseMillis)
		}
	}
	return pause, until(ctx, "snapshot "+snap.Name+" is ready", func() (bool, error) {
		err := m.Get(ctx, client.ObjectKeyFromObject(snap), snap)
		return slices.ContainsFunc(snap.Status.Conditions, func(c metav1.Condition) bool {
			return c.Type == vmopv1.VirtualMachineSnapshotReadyCondition && c.Status == metav1.ConditionTrue
		}), err
	})
}

// longestGap asks a guest's web server without a pause while something is done, and returns the longest time between two
// answers in milliseconds.
func longestGap(ctx context.Context, address string, do func() error) (float64, error) {
	c := http.Client{Timeout: time.Minute}
	defer c.CloseIdleConnections()
	done := make(chan error, 1)
	go func() { done <- do() }()
	longest, last := time.Duration(0), time.Now()
	for {
		select {
		case err := <-done:
			return report.Milliseconds(longest), err
		case <-time.After(5 * time.Millisecond):
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/hostname", nil)
		if err != nil {
			return 0, err
		}
		resp, err := c.Do(req)
		if err != nil {
			return 0, errors.Join(err, <-done)
		}
		_ = resp.Body.Close()
		longest, last = max(longest, time.Since(last)), time.Now()
	}
}
