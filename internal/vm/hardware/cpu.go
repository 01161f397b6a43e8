package hardware

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/hardware/cpumodel"
	"atoll.dev/atoll/internal/vm/qemu"
)

const (
	// hostModel is the model that is the host's own processor.
	hostModel = "host"
	// mostModel is what QEMU calls all that there can be: with KVM that is the host's processor too.
	mostModel = "max"
)

// The models of processors, and where a saved machine can go on:
//
//   - none given, KVM: a baseline that the host supports with what the host has against attacks on it (package
//     cpumodel), and else as with "host". It is kept with the saved memory, so every host that supports it can take the
//     machine on. A machine with nested virtualisation has what its host has.
//   - none given, TCG: "max", all that QEMU emulates. It depends on QEMU's version only.
//   - "host", "max": all that the host has and QEMU can save, or emulates. The machine goes on only on a host with the same
//     processor, which is checked.
//   - a name of QEMU's, such as EPYC-v3: the same processor on every host that has its features. One that has not
//     is refused at the start (enforce), under KVM. The versioned names never change.
func cpuArg(c machinev1.CPU, accel vm.Accel) string {
	model := c.Model
	own := likeHost(model)
	switch {
	case own && accel == vm.KVM:
		model = "host,migratable=on"
	case own:
		model = mostModel
	case accel == vm.KVM:
		model += ",enforce"
	}
	if !c.Nested {
		model += "," + qemu.NotNested
	}
	if accel == vm.TCG {
		return model + "," + qemu.EmulatedCPU
	}
	return model + ",la57=off"
}

// likeHost tells whether a model, or none, is all that the host has.
func likeHost(model string) bool { return model == "" || model == hostModel || model == mostModel }

// chooseModel is the model of a machine that boots and names none, "" for what the host has or QEMU emulates.
func (c *Config) chooseModel(ctx context.Context) string {
	if c.Machine.CPU.Model != "" || c.Machine.CPU.Nested || c.Accel != vm.KVM {
		return ""
	}
	groups, err := qemu.Groups(string(c.Accel))
	var offer cpumodel.Offer
	if err == nil {
		offer, err = cpumodel.Supported(ctx, c.QEMU, string(c.Accel), qemu.Credential{UID: c.UID, GID: c.GID, Groups: groups})
	}
	if err != nil {
		slog.Warn("finding out which processors machines can have; this one has the host's", "machine", c.Machine.Name, "error", err)
		return ""
	}
	cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
	return cpumodel.Choose(cpumodel.Vendor(cpuinfo), offer)
}

// cpu is the processor of a machine with the model that was chosen for it.
func (s *shape) cpu(c machinev1.CPU) machinev1.CPU {
	c.Model = cmp.Or(c.Model, s.Model)
	return c
}

// hostCPU tells whether the processor of the guest depends on the host's.
func (s *shape) hostCPU(c machinev1.CPU) bool {
	return likeHost(s.cpu(c).Model) && s.Accel == string(vm.KVM)
}

// hostProcessor is the model and the features of the host's processor, as short text.
func hostProcessor() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	return processor(data)
}

func processor(cpuinfo []byte) string {
	var model string
	var flags []string
	for line := range bytes.Lines(cpuinfo) {
		key, value, _ := strings.Cut(string(line), ":")
		switch strings.TrimSpace(key) {
		case "model name":
			model = strings.TrimSpace(value)
		case "flags":
			flags = strings.Fields(value)
		}
		if model != "" && flags != nil {
			break
		}
	}
	slices.Sort(flags)
	return fmt.Sprintf("%s (%08x)", model, checksum(strings.Join(flags, " ")))
}

// topology is the argument of -smp.
func topology(c machinev1.CPU, count int) string {
	n := sockets(c)
	return fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=%d,cores=%d,threads=1", count, n*c.CoresPerSocket, n, c.CoresPerSocket)
}
