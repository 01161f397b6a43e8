package usage

import (
	"errors"
	"testing"
)

func TestUsage(t *testing.T) {
	const stat = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 7 0 1000 1000000 256 18446744073709551615 0"
	u, err := parse([]byte(stat), 4096)
	if err != nil || u != (Usage{User: 1500000, System: 500000, Memory: 1 << 20, Threads: 7}) {
		t.Errorf("%+v, %v", u, err)
	}
	if _, err := parse([]byte("42 (x) S 1"), 4096); err == nil {
		t.Error("half a line was read")
	}
	if err := EnoughMemory([]byte("MemTotal: 9 kB\nMemAvailable:    300000 kB\n"), 2<<30); !errors.Is(err, ErrMemory) {
		t.Errorf("nearly out of memory: %v", err)
	}
	if err := EnoughMemory([]byte("MemAvailable:    3000000 kB\n"), 2<<30); err != nil {
		t.Error(err)
	}
}
