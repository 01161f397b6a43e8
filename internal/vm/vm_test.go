package vm

import (
	"errors"
	"testing"

	"atoll.dev/atoll/internal/vm/initramfs"
)

func TestConfigDefaults(t *testing.T) {
	good := Config{Kernel: "/k", Initramfs: []initramfs.Entry{{Path: "/init"}}, UID: 1, GID: 1}
	c, err := good.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if c.MemoryMiB != DefaultMemoryMiB || c.MaxMemoryMiB != c.MemoryMiB || c.CPUs != 1 || c.MaxCPUs != 1 || c.Accel != TCG {
		t.Errorf("defaults are %+v", c)
	}
	for name, change := range map[string]func(*Config){
		"root":         func(c *Config) { c.UID = 0 },
		"root group":   func(c *Config) { c.GID = 0 },
		"no kernel":    func(c *Config) { c.Kernel = "" },
		"no initramfs": func(c *Config) { c.Initramfs = nil },
		"tiny":         func(c *Config) { c.MemoryMiB = 8 },
		"accelerator":  func(c *Config) { c.Accel = "xen" },
		"odd scratch":  func(c *Config) { c.ScratchBytes = 1000 },
	} {
		t.Run(name, func(t *testing.T) {
			c := good
			change(&c)
			if _, err := c.withDefaults(); err == nil {
				t.Error("taken")
			}
		})
	}
}

func TestOpenTemplateRefusesNonsense(t *testing.T) {
	for _, meta := range []Meta{{}, {Version: metaVersion}, {Version: 99}} {
		if _, err := OpenTemplate(meta, nil); !errors.Is(err, ErrTemplate) {
			t.Errorf("%+v: %v", meta, err)
		}
	}
}
