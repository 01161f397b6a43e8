package tsc

import (
	"errors"
	"testing"
	"time"
)

func TestKHz(t *testing.T) {
	a, err := KHz(50 * time.Millisecond)
	if errors.Is(err, ErrUnsteady) {
		t.Log("this host's counter is not steady, which is a legal answer")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if a < 100_000 || a > 20_000_000 {
		t.Errorf("%d kHz is no processor", a)
	}
	if b, err := KHz(50 * time.Millisecond); err != nil || max(a, b)-min(a, b) > a/1000 {
		t.Errorf("%d kHz, then %d, %v", a, b, err)
	}
}
