package swtpm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestArgs(t *testing.T) {
	got := strings.Join(args(Config{Binary: "/usr/bin/swtpm", Dir: "/secret/place"}), " ")
	want := "/usr/bin/swtpm socket --tpm2 --ctrl type=unixio,clientfd=3 --tpmstate dir=/proc/self/fd/4,mode=0600 --seccomp action=kill --terminate"
	if got != want {
		t.Errorf("%s", got)
	}
}

func TestRefusals(t *testing.T) {
	if _, err := Start(t.Context(), Config{Binary: "/nonexistent", UID: 1, GID: 1, Dir: t.TempDir()}); !errors.Is(err, ErrMissing) {
		t.Errorf("%v", err)
	}
	if _, err := Start(t.Context(), Config{Dir: t.TempDir()}); err == nil {
		t.Error("it runs as root")
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	if _, err := stateDir(Config{Dir: link, UID: 1, GID: 1}); err == nil {
		t.Error("a link was followed")
	}
}
