package config

import (
	"os"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	const good = `{"runDir":"/run/a","dataDir":"/d","binary":"/b","kubelet":"/k"`
	c, err := Parse([]byte(good + "}"))
	if err != nil || c.UIDBase != DefaultUIDBase || c.UIDCount != DefaultUIDCount {
		t.Errorf("%+v, %v", c, err)
	}
	for text, want := range map[string]string{
		"{": "EOF", good + `,"x":1}`: "x", `{"runDir":"/r"}`: "absolute", good + `,"uidBase":5}`: "uidBase",
		good + `,"accelerator":"fast"}`: "accelerator",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	dir := t.TempDir()
	if _, err := Load(dir); err == nil {
		t.Error("a configuration that is not there was loaded")
	}
	if err := os.WriteFile(File(dir), []byte(good+"}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir); err != nil {
		t.Error(err)
	}
}
