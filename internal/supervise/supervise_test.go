package supervise

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// runIn starts a supervisor and returns it with a function that stops it.
func runIn(t *testing.T, cfg Config) (s *Supervisor, stop func()) {
	t.Helper()
	cfg.Logger = slog.New(slog.DiscardHandler)
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	return s, func() { cancel(); <-done }
}

func untilDone(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

func TestNewRefuses(t *testing.T) {
	tests := map[string][]Service{
		"used twice":      {{Name: "a", Run: untilDone}, {Name: "a", Run: untilDone}},
		"empty":           {{Run: untilDone}},
		"needs Run":       {{Name: "a"}},
		"not before it":   {{Name: "a", Run: untilDone, After: []string{"b"}}, {Name: "b", Run: untilDone}},
		"Process, not bo": {{Name: "a", Run: untilDone, Process: &Process{}}},
	}
	for want, services := range tests {
		_, err := New(Config{Services: services, Logger: slog.New(slog.DiscardHandler)})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New error = %v, want %q", err, want)
		}
	}
}

func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var events []string
		service := func(name string, after ...string) Service {
			readyAt := time.Now().Add(time.Second)
			return Service{
				Name: name, After: after,
				Run: func(ctx context.Context) error {
					mu.Lock()
					events = append(events, "+"+name)
					mu.Unlock()
					<-ctx.Done()
					time.Sleep(time.Second)
					mu.Lock()
					events = append(events, "-"+name)
					mu.Unlock()
					return nil
				},
				Ready: func(context.Context) error {
					mu.Lock()
					defer mu.Unlock()
					if time.Now().Before(readyAt) || !slices.Contains(events, "+"+name) {
						return errors.New("not yet")
					}
					return nil
				},
			}
		}
		s, stop := runIn(t, Config{Services: []Service{service("a"), service("b", "a"), service("c", "a", "b")}})
		if err := s.WaitReady(t.Context(), "c"); err != nil {
			t.Fatal(err)
		}
		for _, st := range s.Snapshot() {
			if st.State != Ready || st.Error != "" {
				t.Errorf("%s is %s (%s), want ready", st.Name, st.State, st.Error)
			}
		}
		stop()
		if want := []string{"+a", "+b", "+c", "-c", "-b", "-a"}; !slices.Equal(events, want) {
			t.Errorf("events = %v, want %v", events, want)
		}
		for _, st := range s.Snapshot() {
			if st.State != Stopped {
				t.Errorf("%s is %s, want stopped", st.Name, st.State)
			}
		}
	})
}

func TestRestartBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var starts []time.Duration
		began := time.Now()
		s, stop := runIn(t, Config{MinDelay: time.Second, MaxDelay: 4 * time.Second, Services: []Service{{
			Name: "flaky",
			Run: func(ctx context.Context) error {
				starts = append(starts, time.Since(began))
				if len(starts) == 5 { // long enough for the delay to start anew
					time.Sleep(10 * time.Second)
				}
				if len(starts) == 7 {
					return untilDone(ctx)
				}
				return errors.New("broken")
			},
		}}})
		time.Sleep(time.Minute)
		stop()
		var want []time.Duration
		for _, sec := range []int{0, 1, 3, 7, 11, 22, 24} {
			want = append(want, time.Duration(sec)*time.Second)
		}
		if !slices.Equal(starts, want) {
			t.Errorf("starts = %v, want %v", starts, want)
		}
		if got := s.Snapshot()[0].Restarts; got != 6 {
			t.Errorf("Restarts = %d, want 6", got)
		}
	})
}

func TestNeverReadyIsRestarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		runs := 0
		s, stop := runIn(t, Config{Services: []Service{
			{
				Name: "dull", ReadyTimeout: time.Minute,
				Run:   func(ctx context.Context) error { runs++; return untilDone(ctx) },
				Ready: func(context.Context) error { return errors.New("no answer") },
			},
			{Name: "after", After: []string{"dull"}, Run: untilDone},
		}})
		time.Sleep(150 * time.Second)
		snap := s.Snapshot()
		stop()
		if runs != 3 {
			t.Errorf("runs = %d, want 3", runs)
		}
		if snap[0].Error != "no answer" || snap[0].Restarts != 2 {
			t.Errorf("status = %+v", snap[0])
		}
		if snap[1].State != Waiting {
			t.Errorf("the service after it is %s, want waiting", snap[1].State)
		}
	})
}

func TestStopOne(t *testing.T) {
	s, stop := runIn(t, Config{Services: []Service{{Name: "a", Run: untilDone}, {Name: "b", Run: untilDone}}})
	defer stop()
	if err := s.WaitReady(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.WaitReady(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	if st := s.Snapshot()[0].State; st != Stopped {
		t.Errorf("a is %s, want stopped", st)
	}
	if err := s.Stop(t.Context(), "c"); err == nil {
		t.Error("Stop of an unknown service succeeded")
	}
}

func TestProcessLogsAndRestarts(t *testing.T) {
	log := filepath.Join(t.TempDir(), "sub", "sh.log")
	s, stop := runIn(t, Config{MinDelay: 10 * time.Millisecond, Services: []Service{{
		Name:    "sh",
		Process: &Process{Path: "/bin/sh", Args: []string{"sh", "-c", "echo out; echo err >&2; exec sleep 1000"}, Log: log},
		Ready: func(context.Context) error {
			text, err := os.ReadFile(log)
			if err == nil && !strings.Contains(string(text), "err") {
				err = errors.New("no output yet")
			}
			return err
		},
	}}})
	defer stop()
	for want := range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		_, err := s.units[0].status.Wait(ctx, func(st Status) bool { return st.State == Ready && st.Restarts == want })
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(s.Snapshot()[0].PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(log)
	if err != nil || strings.Count(string(text), "out\n") < 1 {
		t.Errorf("log = %q, %v", text, err)
	}
}

// TestLastWords: the status says what the process said, but not what an earlier one did.
func TestLastWords(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, []byte("Error: of an earlier run\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for script, want := range map[string]string{
		`echo "Error: no data"; echo "more of it"; exit 3`: "exit status 3: no data",
		`echo "no Error: here"; exit 4`:                    "exit status 4",
	} {
		s, stop := runIn(t, Config{MinDelay: time.Hour, Services: []Service{{
			Name: "sh", Process: &Process{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Log: log},
		}}})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		st, err := s.units[0].status.Wait(ctx, func(st Status) bool { return st.State == Backoff })
		cancel()
		stop()
		if err != nil || st.Error != want {
			t.Errorf("%s: got %q, %v, want %q", script, st.Error, err, want)
		}
	}
}

func TestProcessThatIgnoresSIGTERMIsKilled(t *testing.T) {
	s, stop := runIn(t, Config{Services: []Service{{
		Name: "stubborn",
		Process: &Process{
			Path: "/bin/sh", Args: []string{"sh", "-c", `trap "" TERM; while :; do sleep 1; done`},
			Log: filepath.Join(t.TempDir(), "log"), StopTimeout: 100 * time.Millisecond,
		},
	}}})
	if err := s.WaitReady(t.Context(), "stubborn"); err != nil {
		t.Fatal(err)
	}
	pid := s.Snapshot()[0].PID
	stop()
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the process is still there: %v", err)
	}
}

// TestParentDeath runs this test binary again as a supervisor, kills it, and
// expects its child to be gone.
func TestParentDeath(t *testing.T) {
	const env = "ATOLL_TEST_SUPERVISOR"
	if dir := os.Getenv(env); dir != "" {
		child := &Process{Path: "/bin/sleep", Args: []string{"sleep", "1000"}, Log: filepath.Join(dir, "log")}
		s, _ := runIn(t, Config{Services: []Service{{Name: "sleep", Process: child}}})
		if err := s.WaitReady(t.Context(), "sleep"); err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString(strconv.Itoa(s.Snapshot()[0].PID) + "\n")
		time.Sleep(time.Minute)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestParentDeath$")
	cmd.Env = append(os.Environ(), env+"="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, err := out.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(buf[:n])))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d outlived its supervisor", pid)
		}
	}
}

func TestRotate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.log")
	f, err := OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := &Rotator{Dir: dir, MaxBytes: 4, Keep: 2, Logger: slog.New(slog.DiscardHandler)}
	for _, line := range []string{"one\n", "two\n", "three\n", "x\n"} {
		if _, err := f.WriteString(line); err != nil {
			t.Fatal(err)
		}
		if err := r.rotateAll(); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"a.log": "x\n", "a.log.1": "three\n", "a.log.2": "two\n"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != want {
			t.Errorf("%s = %q, %v, want %q", name, got, err, want)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "a.log.3")); err == nil {
		t.Error("too many copies are kept")
	}
}

func TestLatest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Latest[int]
		go func() {
			for i := range 5 {
				time.Sleep(time.Second)
				l.Set(i)
			}
		}()
		got, err := l.Wait(t.Context(), func(v int) bool { return v >= 3 })
		if got != 3 || err != nil {
			t.Errorf("Wait = %d, %v, want 3", got, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := l.Wait(ctx, func(v int) bool { return v > 4 }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wait = %v, want the context's error", err)
		}
	})
}
