package hardware

import (
	"errors"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/vm"
)

// TestProcessorModel: what QEMU is told of the processor, and on which hosts a saved machine can go on.
func TestProcessorModel(t *testing.T) {
	for name, c := range map[string]struct {
		accel           vm.Accel
		named, chosen   string
		cpu             string
		later           string // model that the class names when it is to go on
		elsewhere, goes bool   // on a host with another processor
	}{
		"chosen":                 {vm.KVM, "", "Haswell-v4", "Haswell-v4,enforce,vmx=off,svm=off,la57=off", "", true, true},
		"chosen, guarded":        {vm.KVM, "", "Haswell-v4,ssbd=on,md-clear=on", "Haswell-v4,ssbd=on,md-clear=on,enforce,vmx=off,svm=off,la57=off", "", true, true},
		"chosen, more":           {vm.KVM, "", "Haswell-v4,pmu=on", "Haswell-v4,pmu=on,enforce,vmx=off,svm=off,la57=off", "", false, false},
		"chosen, host now":       {vm.KVM, "", "Haswell-v4", "Haswell-v4,enforce,vmx=off,svm=off,la57=off", "host", false, false},
		"no baseline":            {vm.KVM, "", "", "host,migratable=on,vmx=off,svm=off,la57=off", "", false, true},
		"no baseline, elsewhere": {vm.KVM, "", "", "host,migratable=on,vmx=off,svm=off,la57=off", "", true, false},
		"host":                   {vm.KVM, "host", "", "host,migratable=on,vmx=off,svm=off,la57=off", "host", false, true},
		"host, elsewhere":        {vm.KVM, "host", "", "host,migratable=on,vmx=off,svm=off,la57=off", "host", true, false},
		"max":                    {vm.KVM, "max", "", "host,migratable=on,vmx=off,svm=off,la57=off", "max", false, true},
		"max, elsewhere":         {vm.KVM, "max", "", "host,migratable=on,vmx=off,svm=off,la57=off", "max", true, false},
		"emulated max":           {vm.TCG, "max", "", "max,vmx=off,svm=off,la57=off,erms=off,fsrm=off,smap=off", "max", true, true},
		"named":                  {vm.KVM, "EPYC-v3", "", "EPYC-v3,enforce,vmx=off,svm=off,la57=off", "EPYC-v3", true, true},
		"not one of ours":        {vm.KVM, "", "Nehalem-v1", "Nehalem-v1,enforce,vmx=off,svm=off,la57=off", "", false, false},
		"emulated":               {vm.TCG, "", "", "max,vmx=off,svm=off,la57=off,erms=off,fsrm=off,smap=off", "", true, true},
		"emulated host":          {vm.TCG, "host", "", "max,vmx=off,svm=off,la57=off,erms=off,fsrm=off,smap=off", "host", true, true},
		"emulated, named":        {vm.TCG, "Nehalem-v1", "", "Nehalem-v1,vmx=off,svm=off,la57=off,erms=off,fsrm=off,smap=off", "Nehalem-v1", true, true},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := small(t)
			cfg.Accel, cfg.Machine.CPU.Model = c.accel, c.named
			cfg, err := cfg.withDefaults()
			if err != nil {
				t.Fatal(err)
			}
			s, err := cfg.newShape(c.chosen)
			if err != nil {
				t.Fatal(err)
			}
			if s.CPU != c.cpu {
				t.Errorf("-cpu %s", s.CPU)
			}
			if c.elsewhere && s.Host != "" {
				s.Host = "another"
			}
			h := header{Machine: cfg.Machine, Shape: s}
			cfg.Machine.CPU.Model = c.later
			if err := h.fits(&cfg); (err == nil) != c.goes || err != nil && !errors.Is(err, ErrMemoryImage) {
				t.Errorf("going on: %v", err)
			} else if err != nil && c.named == "" && c.later != "" {
				for _, want := range []string{"extraConfig[atoll.dev/cpu-model]", "former class", "PoweredOff"} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("going on: %v: without %q", err, want)
					}
				}
			}
		})
	}
	nested := small(t)
	nested.Machine.CPU.Nested, nested.Accel, nested.QEMU = true, vm.KVM, "/there/is/none"
	if got := nested.chooseModel(t.Context()); got != "" {
		t.Errorf("a machine with nested virtualisation gets %q", got)
	}
	if s, err := nested.newShape(""); err != nil || !strings.HasPrefix(s.CPU, "host,") {
		t.Errorf("%v", err)
	}
}
