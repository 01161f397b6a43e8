package registry

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

func TestRecords(t *testing.T) {
	r := New(t.TempDir())
	if all, err := r.List(); len(all) != 0 || err != nil {
		t.Errorf("empty: %v, %v", all, err)
	}
	if err := r.Create(); err != nil {
		t.Fatal(err)
	}
	e := Entry{Member: "m1", PID: os.Getpid(), UID: 7, QEMU: 1 << 22}
	if err := os.Mkdir(r.Dir("m1"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.Put(e); err != nil {
		t.Fatal(err)
	}
	e.Sandbox = "pod"
	for range 2 {
		if err := r.Put(e); err != nil {
			t.Fatal(err)
		}
	}
	got, ok, err := r.Find("pod")
	if !ok || err != nil || got.UID != 7 || got.Member != "m1" || got.Sandbox != "pod" {
		t.Errorf("found %+v, %v, %v", got, ok, err)
	}
	if _, ok, err := r.Find("other"); ok || err != nil {
		t.Errorf("found another: %v, %v", ok, err)
	}
	for _, id := range []string{"", "a/b", ".."} {
		if _, _, err := r.Find(id); err == nil && id != ".." {
			t.Errorf("id %q is accepted", id)
		}
	}
	if _, alive := got.Process(); alive {
		t.Error("this test is no shim daemon")
	}
	// Ending it must leave this process alone: its arguments are others.
	if err := r.End(t.Context(), got); err != nil {
		t.Error(err)
	}
	if all, err := r.List(); len(all) != 0 || err != nil {
		t.Errorf("after the end: %v, %v", all, err)
	}
	if _, ok, _ := r.Find("pod"); ok {
		t.Error("found after the end")
	}
}

func TestBrokenRecord(t *testing.T) {
	r := New(t.TempDir())
	if err := r.Create(); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(r.Dir("m"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Dir("m"), "state.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := r.List()
	if err != nil || len(all) != 1 || all[0].Member != "m" {
		t.Fatalf("%v, %v", all, err)
	}
	if err := r.End(t.Context(), all[0]); err != nil {
		t.Error(err)
	}
}

// TestEnd ends a process that looks like a shim daemon.
func TestEnd(t *testing.T) {
	r := New(t.TempDir())
	if err := r.Create(); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(r.Dir("m2"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `trap "" TERM; echo; while :; do sleep 1; done`, Role, "m2")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	e := Entry{Member: "m2", PID: cmd.Process.Pid}
	if _, alive := e.Process(); !alive {
		t.Fatal("not found")
	}
	if err := r.End(t.Context(), e); err != nil {
		t.Error(err)
	}
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Error("it still runs")
	}
}
