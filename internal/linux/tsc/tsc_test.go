package tsc

import (
	"errors"
	"testing"
	"time"
)

func TestKHz(t *testing.T) {
	var rates [2]uint64
	for i := range rates {
		khz, err := KHz(50 * time.Millisecond)
		if errors.Is(err, ErrUnsteady) {
			t.Log("this host's counter is not steady, which is a legal answer")
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if khz < 100_000 || khz > 20_000_000 {
			t.Errorf("%d kHz is no processor", khz)
		}
		rates[i] = khz
	}
	if a, b := rates[0], rates[1]; max(a, b)-min(a, b) > a/1000 {
		t.Errorf("%d kHz, then %d", a, b)
	}
}
