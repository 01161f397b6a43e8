package qemu

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// file stands for any file: the command line only depends on whether there is one.
var file = os.Stderr

func template() Config {
	return Config{
		Binary: "/usr/bin/qemu-system-x86_64", Firmware: "qboot.rom", Accel: "tcg",
		MemoryMiB: 128, MaxMemoryMiB: 2048, MemorySlots: 8, CPUs: 1, MaxCPUs: 4,
		QMP: file, Control: file, Console: file, Tap: file, RAM: file, ShareRAM: true,
		Kernel: file, Initrd: file, Cmdline: "console=ttyS0", ScratchBytes: 16 << 30,
	}
}

func clone() Config {
	c := template()
	c.Kernel, c.Initrd, c.Cmdline, c.ShareRAM = nil, nil, "", false
	c.State, c.Scratch = file, file
	return c
}

// TestCommandLine compares with testdata, which is also the place to read what QEMU is started with.
func TestCommandLine(t *testing.T) {
	kvm := template()
	kvm.Accel = "kvm"
	boot := template()
	boot.RAM, boot.Tap, boot.ScratchBytes, boot.CPUs, boot.Paused = nil, nil, 0, 2, true
	for name, cfg := range map[string]Config{
		"template": template(), "clone": clone(), "kvm": kvm, "boot": boot,
	} {
		t.Run(name, func(t *testing.T) {
			if err := cfg.validate(); err != nil {
				t.Fatal(err)
			}
			got := strings.ReplaceAll(strings.Join(cfg.args(), "\n"), "\n-", "\n\n-") + "\n"
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("command line differs from %s; run with -update and look at the change:\n%s", golden, got)
			}
		})
	}
}

// TestCloneHasTheTemplatesDevices: QEMU only loads a state into the same devices.
func TestCloneHasTheTemplatesDevices(t *testing.T) {
	devices := func(c Config) string {
		var out []string
		args := c.args()
		for i, a := range args {
			switch a {
			case "-device", "-machine", "-cpu", "-smp", "-m", "-accel", "-bios":
				out = append(out, a, args[i+1])
			}
		}
		return strings.Join(out, "\n")
	}
	if a, b := devices(template()), devices(clone()); a != b {
		t.Errorf("template:\n%s\nclone:\n%s", a, b)
	}
}

func TestIncomingURI(t *testing.T) {
	if want := "fd:" + strings.TrimPrefix(selfFD(fdState), "/proc/self/fd/"); IncomingURI != want {
		t.Errorf("%s, want %s", IncomingURI, want)
	}
}

func TestValidate(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no binary":     func(c *Config) { c.Binary = "" },
		"accelerator":   func(c *Config) { c.Accel = "hvf" },
		"no memory":     func(c *Config) { c.MemoryMiB = 0 },
		"too many cpus": func(c *Config) { c.CPUs = 8 },
		"no monitor":    func(c *Config) { c.QMP = nil },
		"option in rom": func(c *Config) { c.Firmware = "x,y=z" },
		"two starts":    func(c *Config) { c.State = file },
	} {
		t.Run(name, func(t *testing.T) {
			c := template()
			change(&c)
			if c.validate() == nil {
				t.Error("taken")
			}
		})
	}
}
