package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const minimal = `{"runDir":"/run/a","dataDir":"/d","binary":"/b","kernel":"/k","execHelper":"/e","kubelet":"/kl","containerd":"/c"`

func TestDefaults(t *testing.T) {
	name := filepath.Join(t.TempDir(), "c.json")
	if err := os.WriteFile(name, []byte(minimal+"}"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(name)
	if err != nil {
		t.Fatal(err)
	}
	if *c.Warm != DefaultWarm || c.MemoryMiB != DefaultMemoryMiB || c.UIDBase != DefaultUIDBase ||
		c.Accelerator != Auto || c.MaxMemoryMiB < c.MemoryMiB || c.MaxCPUs < 1 || c.Socket() != "/run/a/pool.sock" {
		t.Errorf("%+v", c)
	}
	if c, err = Parse([]byte(minimal + `,"warm":0}`)); err != nil || *c.Warm != 0 {
		t.Errorf("no warm members: %v, %v", c.Warm, err)
	}
}

func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		`{}`:                            "absolute path",
		minimal + `,"unknown":1}`:       "unknown",
		minimal + `,"warm":65}`:         "warm",
		minimal + `,"warm":-1}`:         "warm",
		minimal + `,"memoryMiB":8}`:     "memoryMiB",
		minimal + `,"uidBase":5}`:       "uidBase",
		minimal + `,"uidCount":3}`:      "uidBase",
		minimal + `,"scratchBytes":7}`:  "scratchBytes",
		minimal + `,"maxCPUs":300}`:     "maxCPUs",
		minimal + `,"modules":"x"}`:     "modules",
		minimal + `,"accelerator":"x"}`: "accelerator",
		"[":                             "EOF",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := Load("/no/such/file"); err == nil {
		t.Error("a missing file was loaded")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal + "}"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = Parse(b) })
}
