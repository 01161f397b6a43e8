//go:build integration

package tap

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenIsolated(t *testing.T) {
	f, err := OpenIsolated("tap0")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := os.Stat("/sys/class/net/tap0"); err == nil {
		t.Error("the tap is in the host's namespace")
	}
	ns, err := Namespace(f)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var a, b unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &a); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat("/proc/self/ns/net", &b); err != nil {
		t.Fatal(err)
	}
	if a.Ino == b.Ino {
		t.Error("the tap says it is in the host's namespace")
	}
}
