package wallclock

import (
	"errors"
	"os"
	"testing"
	"time"
)

// That a step is noticed is tested inside a micro-VM, whose clock may be set: TestClock of package
// guest.

func TestExpires(t *testing.T) {
	w, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for range 2 {
		start := time.Now()
		if err := w.Arm(20 * time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if stepped, err := w.Wait(); err != nil || stepped {
			t.Fatalf("stepped %v, %v", stepped, err)
		}
		if d := time.Since(start); d < 19*time.Millisecond {
			t.Errorf("went off after %v", d)
		}
	}
}

// TestArmReplaces: the last time counts.
func TestArmReplaces(t *testing.T) {
	w, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, d := range []time.Duration{time.Hour, time.Millisecond} {
		if err := w.Arm(d); err != nil {
			t.Fatal(err)
		}
	}
	if stepped, err := w.Wait(); err != nil || stepped {
		t.Errorf("stepped %v, %v", stepped, err)
	}
}

func TestClose(t *testing.T) {
	w, err := New()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Arm(time.Hour); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		_, err := w.Wait()
		ended <- err
	}()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("wait: %v", err)
	}
	if err := w.Arm(time.Hour); err == nil {
		t.Error("armed after it was closed")
	}
}
