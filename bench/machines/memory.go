package machines

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/bench/rig"
)

// machineIdles is how long a guest is left alone before it counts as idle.
const machineIdles = 30 * time.Second

// Memory measures what an idle machine takes of the host beyond the memory of its guest.
func Memory(ctx context.Context, m *Machines) ([]rig.Row, error) {
	var rows []rig.Row
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
func (m *Machines) idleMemory(ctx context.Context, kind, class string, efi bool) ([]rig.Row, error) {
	available := func() float64 { return rig.StatusField("/proc/meminfo", "MemAvailable:") / 1024 }
	before := available()
	var names []string
	for i := range max(2, m.Options.N/4) {
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
	all := rig.Row{
		Measure: "host memory per idle VM beyond its guest's, " + kind, Unit: "MiB", N: len(names),
		Atoll: rig.Value{P50: (taken - guests) / float64(len(names))},
		Note:  fmt.Sprintf("slope of MemAvailable; the bar is 60; a guest uses %.0f MiB of its own", guests/float64(len(names))),
	}
	rows := []rig.Row{all}
	for _, part := range []string{"qemu", "page tables", "shim", "swtpm"} {
		if samples := parts[part]; len(samples) > 0 {
			rows = append(rows, rig.Compare("  "+part, "MiB", samples, nil))
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
func (m *Machines) parts(ctx context.Context, name string) (map[string]float64, error) {
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
	shim := strconv.FormatFloat(rig.StatusField(status, "PPid:"), 'f', 0, 64)
	held, _, err := proportional(shim, 0)
	if err != nil {
		return nil, err
	}
	out := map[string]float64{"qemu": beyond, "guest": guest, "shim": held, "page tables": rig.StatusField(status, "VmPTE:") / 1024}
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
		return strings.TrimSpace(string(comm)) == name && strconv.FormatFloat(rig.StatusField("/proc/"+pid+"/status", "PPid:"), 'f', 0, 64) == parent
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
