package vm

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/vm/initramfs"
)

func TestRing(t *testing.T) {
	text := strings.Repeat("0123456789abcdef", 100)
	for _, chunk := range []int{1, 3, 16, 63, 64, 65, 1000} {
		g := newRing(64)
		for i := 0; i < len(text); i += chunk {
			end := min(i+chunk, len(text))
			g.write([]byte(text[i:end]))
			want := text[max(0, end-64):end]
			if got := string(g.bytes()); got != want {
				t.Fatalf("after %d bytes in chunks of %d: %q, want %q", end, chunk, got, want)
			}
		}
	}
	g := newRing(64)
	g.drain(bytes.NewReader([]byte(text)))
	if got := string(g.bytes()); got != text[len(text)-64:] {
		t.Errorf("drained %q", got)
	}
}

func TestLastLines(t *testing.T) {
	for in, want := range map[string]string{
		"":                           "",
		"\n\n":                       "",
		"a\r\n\nb\nc":                "b | c",
		"\x1b[31mred\x07\u009b\nx\n": "[31mred | x",
	} {
		if got := lastLines(in, 2); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}

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

func TestCheckSerial(t *testing.T) {
	for s, ok := range map[string]bool{
		"a": true, "pvc-0123.x_Y": true, strings.Repeat("x", 36): true,
		"": false, strings.Repeat("x", 37): false, "a b": false, `a"`: false, "a,b": false, "ä": false,
	} {
		if err := checkSerial(s); (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestOpenTemplateRefusesNonsense(t *testing.T) {
	for _, meta := range []Meta{{}, {Version: metaVersion}, {Version: 99}} {
		if _, err := OpenTemplate(meta, nil); !errors.Is(err, ErrTemplate) {
			t.Errorf("%+v: %v", meta, err)
		}
	}
}
