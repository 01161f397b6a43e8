package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	tail := " S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2"
	for _, command := range []string{"(sh)", "(a b)", "(evil) S 1 (x)", "())"} {
		info, err := parseStat([]byte("12 " + command + tail))
		if err != nil || info.PPID != 7 || info.start != 4711 {
			t.Errorf("parseStat with command %s = %+v, %v", command, info, err)
		}
	}
	for _, bad := range []string{"", "1 (a", "1 (a) S 1", "1 (a) S x" + tail} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("parseStat(%q) succeeded", bad)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (sh) S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = parseStat(b) })
}

func TestSelf(t *testing.T) {
	all, err := List()
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(all, func(i Info) bool { return i.PID == os.Getpid() })
	if at < 0 {
		t.Fatal("this process is not in the list")
	}
	self := all[at]
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if self.Exe != exe || self.PPID != os.Getppid() || !slices.Equal(self.Args, os.Args) || !self.Alive() {
		t.Errorf("self = %+v", self)
	}
	m, err := self.Memory()
	if err != nil || m.Anon <= 0 || m.PSS < m.Anon || m.RSS < m.PSS {
		t.Errorf("Memory = %+v, %v", m, err)
	}
}

func TestEnd(t *testing.T) {
	start := func(script string) Info {
		cmd := exec.Command("/bin/sh", "-c", script)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		info, err := Read(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = cmd.Wait() }()
		return info
	}
	meek := start("echo; exec sleep 1000")
	stubborn := start(`trap "" TERM; echo; while :; do sleep 1; done`)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := meek.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait for a running process = %v", err)
	}
	if err := End(t.Context(), 200*time.Millisecond, meek, stubborn); err != nil {
		t.Fatal(err)
	}
	if meek.Alive() || stubborn.Alive() {
		t.Error("a process is still there")
	}
	if err := End(t.Context(), time.Second, meek); err != nil {
		t.Errorf("End of an ended process = %v", err)
	}
	recycled := Info{PID: os.Getpid(), start: 1}
	if err := recycled.Signal(9); err != nil { // must not kill this test
		t.Errorf("Signal = %v", err)
	}
}
