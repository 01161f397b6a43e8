package hardware

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/qemu"
)

// The models of processors, and where a saved machine can go on:
//
//   - none given, KVM: "host", all that the host has and QEMU can save. The machine goes on only on a host with
//     the same processor, which is checked.
//   - none given, TCG: "max", all that QEMU emulates. It depends on QEMU's version only.
//   - a name of QEMU's, such as EPYC-v3: the same processor on every host that has its features. One that has not
//     is refused at the start (enforce), under KVM. The versioned names never change.
func cpuArg(c machinev1.CPU, accel vm.Accel) string {
	model := c.Model
	switch {
	case model == "" && accel == vm.KVM:
		model = "host,migratable=on"
	case model == "":
		model = "max"
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

// hostCPU tells whether the processor of the guest depends on the host's.
func (s *shape) hostCPU(c machinev1.CPU) bool { return c.Model == "" && s.Accel == string(vm.KVM) }

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
