package restarts

import (
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

func TestPausesGrow(t *testing.T) {
	var r Restarts
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	var got []time.Duration
	for _, pod := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		got = append(got, r.Pause("vm", types.UID("pod-"+pod), now.Add(-time.Minute), now, now))
		if again := r.Pause("vm", types.UID("pod-"+pod), now.Add(-time.Minute), now, now.Add(time.Second)); again != got[len(got)-1]-time.Second {
			t.Fatalf("a second look: %s after %s", again, got[len(got)-1])
		}
	}
	if got[0] != PauseFirst || got[1] != 2*PauseFirst || got[len(got)-1] != PauseMost {
		t.Fatal(got)
	}
	if d := r.Pause("vm", "pod-z", now.Add(-time.Hour), now, now); d != PauseFirst {
		t.Fatalf("after an hour: %s", d)
	}
	if d := r.Pause("vm", "pod-y", now, now.Add(-time.Hour), now); d != 0 {
		t.Fatalf("of one that ended long ago: %s", d)
	}
}
